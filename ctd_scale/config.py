"""Every knob of the pipeline: one strict, frozen model per stage.

A TOML file gives what differs from the defaults; `--set stage.key=value` gives what differs from the file.
Unknown keys and wrong types are refused with the path of the field.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Mapping, Sequence
from functools import reduce
from operator import getitem
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, model_validator

from ctd_scale.config_baselines import BaselinesConfig
from ctd_scale.config_diffusion import DiffusionConfig
from ctd_scale.config_resources import ResourcesConfig
from ctd_scale.config_section import (
    HOW_IT_WORKS,
    Count,
    EpochsConfig,
    Fraction,
    NotNegative,
    Positive,
    PositiveFloat,
    Section,
)
from ctd_scale.config_serving import ServingConfig

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


class ConfigError(ValueError):
    """The configuration cannot be used; the message names the field, what was got and what was expected."""


class InteractionsConfig(Section):
    """Where the raw rows come from and which of them are used."""

    dataset: Literal["files", "ml-100k", "software", "beauty", "lastfm"] = "files"
    interactions: str = Field("", description="Parquet, CSV or JSONL file, folder or glob (dataset = files)")
    items: str = Field("", description="the catalogue, same formats (dataset = files)")
    data_dir: str = Field("", description="folder of the ready-made sets; empty = env CTD_DATA_DIR")
    user_column: str = "user_id"
    item_column: str = "item_id"
    order_column: str = Field("", description="time column; empty = `timestamp` or `position`, whichever exists")
    title_column: str = "title"
    category_column: str = "category"
    attribute_columns: Annotated[tuple[str, ...], Field(strict=False)] = Field(
        (), description="columns of the catalogue with numbers (price, year) that requests may filter by"
    )
    duplicates: Literal["keep", "first", "last"] = Field("keep", description="repeated (user, item) pairs")
    min_user_interactions: Positive = 1
    min_item_interactions: Positive = 1
    split: Literal["leave_one_out", "global_time"] = Field(
        "leave_one_out",
        description="what is withheld: each user's last two items, or everything after two times that are the same "
        "for all; the latter needs timestamps",
    )
    withheld_fraction: Annotated[float, Field(gt=0.0, lt=0.5)] = Field(
        0.1, description="share of the interactions in each of validation and test, where split = global_time"
    )
    withheld_users: Count = Field(
        0, description="of how many users, drawn at random, items are withheld; the others train whole; 0 = all"
    )
    max_bad_fraction: Fraction = 0.01
    max_title_chars: Positive = 512

    @model_validator(mode="after")
    def _one_source(self) -> InteractionsConfig:
        if self.dataset != "files" and (self.interactions or self.items):
            raise ValueError(
                f"interactions.dataset={self.dataset!r} is a ready-made set, and interactions.interactions and "
                "interactions.items are not read beside it; leave these out, or set interactions.dataset='files'"
            )
        return self

    @model_validator(mode="after")
    def _attributes_have_names_of_their_own(self) -> InteractionsConfig:
        names = self.attribute_columns
        taken = [name for name in names if name in ("", "item_id", "title", "category") or names.count(name) > 1]
        if taken:
            raise ValueError(
                f"interactions.attribute_columns={list(names)}: {taken[0]!r} is empty, given twice or the name of "
                "another column of the catalogue; rename the column"
            )
        return self


class GraphConfig(Section):
    """LightGCN on sampled neighbourhoods (method: graph encoder)."""

    embed_dim: Positive = 64
    num_layers: Positive = 2
    fanout: Annotated[tuple[int, ...], Field(strict=False, min_length=1)] = (16, 8)
    replace: bool = Field(False, description="draw with replacement where a node has more neighbours than its fanout")
    hub_cap: Count = Field(0, description="a node hears from so many neighbours at most; 0 = all")
    time_respecting: bool = Field(False, description="train each edge on what was older than it; needs timestamps")
    epochs: Positive = 40
    batch_size: Positive = Field(2048, description="positive edges per optimizer step, all workers together")
    learning_rate: PositiveFloat = 1e-2
    l2: NotNegative = 1e-4
    table_dtype: Literal["float32", "bfloat16"] = Field(
        "float32", description="how embeddings and moments are stored; bfloat16 halves them and rounds at random"
    )
    negatives: Literal["uniform", "popularity", "in_batch"] = Field(
        "uniform", description="where negatives come from; the loss is corrected for their probability"
    )
    popularity_exponent: PositiveFloat = Field(0.75, description="of an item's degree, where negatives = popularity")
    streaming: Annotated[Literal["auto", "ray_data", "in_process"], HOW_IT_WORKS] = Field(
        "auto", description="who samples: Ray Data actors, or a thread of the trainer (auto: small graphs)"
    )
    sampler_actors: Annotated[Positive, HOW_IT_WORKS] = 1
    stall_seconds: Annotated[PositiveFloat, HOW_IT_WORKS] = Field(
        600.0, description="training fails when no minibatch comes for so long"
    )
    checkpoint_every_steps: Annotated[Positive, HOW_IT_WORKS] = 200
    propagation_chunk: Annotated[Positive, HOW_IT_WORKS] = Field(
        65_536, description="rows of one chunk of the exact propagation"
    )

    @model_validator(mode="after")
    def _one_fanout_per_layer(self) -> GraphConfig:
        if len(self.fanout) != self.num_layers or min(self.fanout) < 1:
            raise ValueError(
                f"graph.fanout={list(self.fanout)} needs one positive number per layer; "
                f"graph.num_layers={self.num_layers}"
            )
        return self


class TokenizerConfig(Section):
    """Additive K-way tokenizer with masking (method: tokenizer)."""

    num_ways: Positive = 2
    hidden_dim: Positive = 256
    mask_ratio: Fraction = 0.1
    decorrelation_weight: NotNegative = 0.01
    variance_weight: NotNegative = 0.01
    steps: Positive = 1000
    batch_size: Positive = 256
    learning_rate: PositiveFloat = 2e-3
    checkpoint_every_steps: Annotated[Positive, HOW_IT_WORKS] = 500


class HistoryConfig(EpochsConfig):
    """What reads the vectors of a history's items, trained with them before the LLM (method: LLM). Sizes, item vectors
    and the softmax over items are those of `llm`."""

    num_blocks: Count = Field(0, description="blocks of self-attention; 0 = item vectors are learned with the LLM")
    dropout: Fraction = 0.5
    epochs: Positive = 30
    ema_decay: Fraction = 0.999
    validate_every: Positive = 1
    validation_users: Count = 1000
    patience: Positive = 3


class LLMConfig(Section):
    """The preference model: backbone, prompt, losses and ZeRO fine-tuning (method: LLM)."""

    backbone: str = Field("smollm2-135m", description="`smollm2-135m` (from its wheel) or a folder of an HF causal LM")
    num_hidden_layers: Count = Field(8, description="keep the first n layers; 0 = all")
    trainable: Literal["full", "lora"] = "full"
    lora_rank: Positive = 16
    lora_alpha: Positive = 32
    max_history: Positive = 50
    max_windows: Count = Field(0, description="train on each user's latest n windows of max_history items; 0 = all")
    max_title_tokens: Positive = 6
    use_user_tokens: bool = Field(
        False, description="a known user's tokens first; a served history has no user, and so none: for study only"
    )
    epochs: Positive = 5
    validation_users: Count = Field(
        1000, description="whose validation items choose the epoch that is kept; 0 = keep the last"
    )
    batch_tokens: Positive = Field(
        4096,
        description="about so many tokens per optimizer step, all workers together; the instruction is not counted",
    )
    accumulation_steps: Annotated[Positive, HOW_IT_WORKS] = Field(
        1, description="read a worker's share of a step in so many parts"
    )
    gradient_checkpointing: Annotated[bool, HOW_IT_WORKS] = Field(
        False, description="forget activations and compute them again"
    )
    learning_rate: PositiveFloat = 2e-4
    head_learning_rate: PositiveFloat = 1e-3
    weight_decay: NotNegative = 0.01
    warmup_fraction: Fraction = 0.05
    gradient_clip: PositiveFloat = 1.0
    item_tokens: Literal["kway", "projected", "none"] = Field(
        "kway",
        description="what stands beside a title: the tokenizer's K tokens, one token projected from the collaborative "
        "embedding, or nothing",
    )
    token_schedule: Literal["always", "curriculum", "second_half"] = Field(
        "always",
        description="when item tokens are read in training: a share that grows from none to all (LLaRA), or none, and "
        "then all with the backbone frozen (CoLLM)",
    )
    token_dropout: Fraction = Field(0.0, description="share of items whose continuous tokens are dropped in training")
    item_vectors: Literal["learned", "joined", "collaborative"] = Field(
        "learned",
        description="what the retriever searches: vectors learned with the LLM, the same plus a learned projection of "
        "what the words of a title and category say, or the frozen collaborative embeddings",
    )
    input_dropout: Fraction = Field(
        0.0, description="of what is read, words and tokens alike; each worker draws its own"
    )
    head_dropout: Fraction = Field(0.0, description="of the hidden states from which preferences are read")
    recency: bool = Field(True, description="the preference begins with the vectors of the latest four items")
    preference_dim: Positive = Field(64, description="C; equals graph.embed_dim when item_vectors = collaborative")
    temperature: PositiveFloat = 0.075
    text_weight: NotNegative = 0.1
    text_every: Positive = Field(4, description="every n-th sequence also carries a text answer")
    full_softmax_limit: Positive = 100_000
    sampled_negatives: Positive = 4096
    zero_stage: Annotated[Literal[0, 1, 2, 3], HOW_IT_WORKS] = 2
    offload: Annotated[Literal["none", "optimizer", "parameters"], HOW_IT_WORKS] = Field(
        "none", description="what ZeRO keeps in host memory; `parameters` includes the optimizer and needs zero_stage=3"
    )
    dtype: Literal["auto", "bfloat16", "float32"] = Field(
        "auto", description="auto: bfloat16 where the device multiplies it fast (GPU, CPU with AVX-512), else float32"
    )
    checkpoint_every_steps: Annotated[Positive, HOW_IT_WORKS] = 100
    generate_texts: bool = True
    text_choices: Literal["preferred", "catalogue", "category", "free"] = Field(
        "preferred",
        description="what a text names: an item that the preference ranks first, any item of the catalogue, "
        "a category of the catalogue, or anything",
    )
    text_shortlist: Positive = Field(50, description="how many items, where text_choices = preferred")
    max_new_tokens: Positive = 32
    inference_batch: Annotated[Positive, HOW_IT_WORKS] = 64

    @model_validator(mode="after")
    def _stage_can_offload(self) -> LLMConfig:
        least = {"none": 0, "optimizer": 1, "parameters": 3}[self.offload]
        if self.zero_stage < least:
            raise ValueError(f"llm.offload={self.offload!r} needs llm.zero_stage={least}, got {self.zero_stage}")
        return self


class RetrievalConfig(Section):
    """Hybrid retriever: cos * (1 + pi * match) over dense and text candidates (method: hybrid retriever)."""

    engine: Literal["auto", "exact", "scann", "faiss"] = Field(
        "auto", description="who searches by vector; auto: exact up to exact_limit, above it ScaNN, or faiss without it"
    )
    exact_limit: Positive = Field(50_000, description="exact search up to this many items, where engine = auto")
    target_recall: Fraction = 0.95
    shards: Positive = Field(1, description="parts of the catalogue that are built one by one and searched together")
    neighbors: Count = Field(
        100, description="how many of the items that are chosen next to an item are kept of each; 0: none are counted"
    )
    text_candidates: Positive = Field(20, description="size of the match set of a text")


class EvaluationConfig(Section):
    """Full-catalogue ranking of the validation and test targets."""

    mask_seen: bool = True
    report_unmasked: bool = Field(False, description="also write the table with seen items kept")
    know_validation: bool = Field(
        True,
        description="at test the graph and what is counted (neighbours, popularity, item-kNN) know what others chose "
        "for validation, as what is served does",
    )
    chunk_users: Annotated[Positive, HOW_IT_WORKS] = 256
    calibration_users: Positive = Field(5000, description="validation users that choose the fusion weights")
    text_factors: Annotated[tuple[float, ...], Field(strict=False, min_length=1)] = (0.0, 0.02, 0.05, 0.1, 0.2)


class RunConfig(Section):
    """The whole pipeline."""

    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    interactions: InteractionsConfig = InteractionsConfig()
    graph: GraphConfig = GraphConfig()
    tokenizer: TokenizerConfig = TokenizerConfig()
    history: HistoryConfig = HistoryConfig()
    llm: LLMConfig = LLMConfig()
    diffusion: DiffusionConfig = DiffusionConfig()
    retrieval: RetrievalConfig = RetrievalConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    baselines: BaselinesConfig = BaselinesConfig()
    serving: ServingConfig = ServingConfig()
    resources: ResourcesConfig = ResourcesConfig()

    @model_validator(mode="after")
    def _spaces_agree(self) -> RunConfig:
        if self.llm.item_vectors == "collaborative" and self.llm.preference_dim != self.graph.embed_dim:
            raise ValueError(
                f"llm.preference_dim={self.llm.preference_dim} but graph.embed_dim={self.graph.embed_dim}; "
                "with llm.item_vectors='collaborative' both must be equal"
            )
        return self

    @model_validator(mode="after")
    def _the_chain_reads_the_tokenizer(self) -> RunConfig:
        if self.llm.item_tokens != "kway":
            raise ValueError(
                f"llm.item_tokens={self.llm.item_tokens!r} is for the baselines text_only, collm and llara, which set "
                "it themselves; the chain reads the tokenizer's tokens: 'kway'"
            )
        return self


def section_values(config: RunConfig, sections: Sequence[str]) -> dict[str, Any]:
    """The named sections or values (such as `llm`, `baselines.sasrec` or `evaluation.mask_seen`), as JSON has them,
    without what is marked `HOW_IT_WORKS`."""
    values = config.shaping_values()
    return {name: reduce(getitem, name.split("."), values) for name in sections}


def section_hash(config: RunConfig, sections: Sequence[str]) -> str:
    """Hash of `section_values` and the seed, hex, 64 characters: what decides whether a stage must rerun."""
    payload = {"seed": config.seed, **section_values(config, sections)}
    return hashlib.sha256(json.dumps(payload, sort_keys=True).encode()).hexdigest()


def load_config(path: str | Path | None = None, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a TOML file (or a shipped name such as `ml100k`), apply `stage.key=value` overrides and validate.

    Raises ConfigError: file missing or no TOML, override malformed, unknown key, wrong type.
    """
    values: dict[str, Any] = {} if path is None else _read_toml(resolve_config(path))
    for override in overrides:
        _apply_override(values, override)
    return validate_config(values, source=str(path) if path is not None else "defaults")


def validate_config(values: Mapping[str, Any], source: str) -> RunConfig:
    """Build a RunConfig from plain values, with every problem named by field path."""
    try:
        return RunConfig.model_validate(values)
    except ValidationError as error:
        lines = [f"{source}: {len(error.errors())} problem(s)"]
        for problem in error.errors():
            field = ".".join(str(part) for part in problem["loc"]) or "(whole config)"
            if problem["type"] == "extra_forbidden":
                lines.append(f"  {field}: unknown key; check the spelling against ctd_scale/config.py")
            else:
                lines.append(f"  {field}: {problem['msg']} (got {problem['input']!r:.80})")
        raise ConfigError("\n".join(lines)) from None


def resolve_config(path: str | Path) -> Path:
    """A path as given, or the shipped config of that name."""
    given = Path(path)
    if given.is_file():
        return given
    shipped = Path(__file__).resolve().parent.parent / "jobs" / "configs"
    named = shipped / f"{given.name.removesuffix('.toml')}.toml"
    if given.name == str(path) and named.is_file():
        return named
    names = ", ".join(sorted(file.stem for file in shipped.glob("*.toml")))
    raise ConfigError(f"config {str(path)!r} is neither a file nor a shipped config; shipped: {names}")


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid TOML: {error}") from None


def _apply_override(values: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise ConfigError(f"override {override!r} must be stage.key=value, such as llm.epochs=3")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text  # a bare word is a string
    *parents, last = key.strip().split(".")
    node = values
    for parent in parents:
        child = node.setdefault(parent, {})
        if not isinstance(child, dict):
            raise ConfigError(f"override {override!r}: {parent} is a value, not a section")
        node = child
    node[last] = value
