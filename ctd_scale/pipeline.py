"""The stages in order: what each reads, what it makes, and when it may be skipped.

A stage is current when its artifacts carry the hash of its configuration and of its inputs' digests, and when no
byte of them has changed. Anything else is made again; a stage that was interrupted resumes from its checkpoint.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial, reduce
from operator import getitem
from typing import Any

import numpy as np
from numpy import ndarray

from ctd_scale.artifacts import ArtifactError, Run
from ctd_scale.baselines.names import DISCRETE, TRAINED, VARIANTS
from ctd_scale.batches import InteractionLog, NodeArrays, Preferences, Split
from ctd_scale.checkpoints import discard, discard_staged
from ctd_scale.config import ConfigError, LLMConfig, RunConfig, section_hash, section_values, validate_config
from ctd_scale.config_diffusion import DiffusionConfig
from ctd_scale.config_section import Section
from ctd_scale.llm.backbone_files import folder_digest, given_folder
from ctd_scale.terminal import console

# What the reader of histories shares with the LLM.
OF_HISTORY = (
    *("backbone", "max_history", "max_title_tokens", "item_vectors", "preference_dim", "temperature"),
    *("full_softmax_limit", "sampled_negatives"),
)
# How a trained model is asked: nothing is learned anew for these.
OF_SPEAKING = ("generate_texts", "text_choices", "text_shortlist", "max_new_tokens")
OF_ASKING = ("num_draws", "draw_temperature", "error_candidates", "error_evaluations")
OF_SAMPLING = ("sampler", "sampling_steps", "guidance", "distill_steps")  # but a student learns from its teacher's
CALIBRATION_USERS = 5000  # whose histories may calibrate the index of the graph


Sections = tuple[str, ...]


@dataclass(frozen=True)
class Stage:
    """One step of the chain. `sections` of the config and `inputs` decide whether it must run."""

    name: str
    make: Callable[[Run, RunConfig, str], object]
    sections: Sections | Callable[[RunConfig], Sections]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    checkpoints: str = ""
    # Raised where the same settings and inputs give something else than before: what was made is then made again.
    revision: int = 0


# Each stage imports what it needs when it runs: together they take as long as a small stage.


def _prepare(run: Run, config: RunConfig, config_hash: str) -> None:
    from ctd_scale.interactions.prepare import prepare_interactions

    prepare_interactions(config.interactions, run, config_hash)


def _graph(run: Run, config: RunConfig, config_hash: str) -> None:
    from ctd_scale.graph.train import train_graph

    train_graph(run, config, config_hash)


def _tokenizer(run: Run, config: RunConfig, config_hash: str) -> None:
    from ctd_scale.llm.backbone import backbone_folder, hidden_size
    from ctd_scale.tokenizer.train import train_tokenizer

    train_tokenizer(run, config, config_hash, hidden_size(backbone_folder(config.llm)))


def _history(run: Run, config: RunConfig, config_hash: str) -> None:
    from ctd_scale.llm.history import train_history

    train_history(run, config, config_hash)


def _llm(run: Run, config: RunConfig, config_hash: str) -> None:
    from ctd_scale.llm.train import train_llm

    train_llm(run, config, config_hash, history=run.fetch("models/history"))


def _preferences(run: Run, config: RunConfig, config_hash: str) -> None:
    from ctd_scale.llm.export import export_preferences

    export_preferences(run, config, config_hash)


def _diffusion(run: Run, config: RunConfig, config_hash: str) -> None:
    from ctd_scale.diffusion.train import train_diffusion
    from ctd_scale.llm.weights import load_vectors

    train_diffusion(run, config, config_hash, load_vectors(run.fetch("models/llm").path))


def _index(run: Run, config: RunConfig, config_hash: str) -> None:
    from ctd_scale.graph.csr import BipartiteGraph
    from ctd_scale.graph.train import DEGREES
    from ctd_scale.llm.weights import load_vectors
    from ctd_scale.retrieval.build import build_graph_index, build_index
    from ctd_scale.retrieval.neighbors import count_neighbors

    interactions, llm = run.fetch("interactions"), run.fetch("models/llm")
    preferences, graph = run.fetch("preferences"), run.fetch("graph")
    embeddings, at_test = run.fetch("embeddings"), run.fetch("embeddings_at_test")
    log = InteractionLog.load(interactions.path)
    asked = Preferences.load(preferences.path, "validation")
    histories = [log.history(user, "validation") for user in asked.users[:CALIBRATION_USERS].tolist()]
    degrees = BipartiteGraph.load(graph.path).degrees[log.num_users :]
    known: dict[Split, tuple[ndarray, ndarray]] = {
        "validation": (NodeArrays.load(embeddings.path).items, degrees),
        "test": (NodeArrays.load(at_test.path).items, np.load(at_test.path / DEGREES)),
    }
    settings, seed = config.retrieval, config.seed
    facts: dict[str, Any] = {}
    made_from = (interactions, llm, preferences, graph, embeddings, at_test)
    inputs = {artifact.name: artifact.digest for artifact in made_from}
    with run.publish("index", config_hash=config_hash, inputs=inputs, facts=facts) as folder:
        facts |= build_index(load_vectors(llm.path), log.catalogue, settings, folder, seed, asked.vectors, degrees)
        for split, (items, by_then) in known.items():
            near = count_neighbors(log, log.known_lengths(split), settings.neighbors) if settings.neighbors else None
            facts |= build_graph_index(items, by_then, settings, folder, seed, histories, split, near)


def _ranking(run: Run, config: RunConfig, config_hash: str) -> None:
    from ctd_scale.calibrate import calibrate_ranking

    calibrate_ranking(run, config, config_hash)


def _evaluate(run: Run, config: RunConfig, config_hash: str) -> None:
    from ctd_scale.evaluate import evaluate

    evaluate(run, config, config_hash)


def _trained(run: Run, config: RunConfig, config_hash: str, *, name: str) -> None:
    if name in VARIANTS:
        from ctd_scale.baselines.llm import train_variant

        train_variant(name, run, config, config_hash)
    else:
        from ctd_scale.baselines.train import train_baseline

        train_baseline(name, run, config, config_hash)


def _but(section: str, model: type[Section], without: Collection[str]) -> Sections:
    """What shapes a section, but for these."""
    return tuple(f"{section}.{name}" for name in model.shaping() if name not in without)


def _of_denoiser(config: RunConfig) -> Sections:
    asked = OF_ASKING if config.diffusion.sampler == "distilled" else (*OF_ASKING, *OF_SAMPLING)
    return _but("diffusion", DiffusionConfig, asked)


OF_LLM = _but("llm", LLMConfig, OF_SPEAKING)

STAGES = (
    Stage("prepare_interactions", _prepare, ("interactions",), (), ("interactions",), revision=1),
    Stage("train_graph", _graph, ("graph",), ("interactions",), ("graph", "embeddings", "embeddings_at_test"), "graph"),
    Stage(
        "train_tokenizer",
        _tokenizer,
        ("tokenizer", "llm.backbone"),  # a token is as long as the vectors of its words
        ("embeddings",),
        ("models/tokenizer", "tokens"),
        "tokenizer",
    ),
    Stage(
        "train_history",
        _history,
        ("history", "evaluation.mask_seen", *(f"llm.{name}" for name in OF_HISTORY)),
        ("interactions", "embeddings"),
        ("models/history",),
        "history",
    ),
    Stage(
        "train_llm",
        _llm,
        (*OF_LLM, "history.dropout", "evaluation.mask_seen"),
        ("interactions", "embeddings", "tokens", "models/history"),
        ("models/llm",),
        "llm",
    ),
    Stage(
        "export_preferences",
        _preferences,
        ("llm",),
        ("interactions", "tokens", "models/llm"),
        ("preferences",),
        "preferences",
    ),
    Stage(
        "train_diffusion",
        _diffusion,
        _of_denoiser,
        ("interactions", "models/llm", "preferences"),
        ("models/diffusion",),
        "diffusion",
    ),
    Stage(
        "build_index",
        _index,
        ("retrieval",),
        ("interactions", "graph", "embeddings", "embeddings_at_test", "models/llm", "preferences"),
        ("index",),
    ),
    Stage(
        "calibrate_ranking",
        _ranking,
        ("diffusion", "retrieval", "evaluation"),
        ("interactions", "models/llm", "preferences", "models/diffusion", "index"),
        ("ranking",),
        revision=2,
    ),
    Stage(
        "evaluate",
        _evaluate,
        ("diffusion", "retrieval", "evaluation"),
        ("interactions", "embeddings_at_test", "models/llm", "preferences", "models/diffusion", "index", "ranking"),
        ("metrics",),
        revision=1,
    ),
)


def _baseline(name: str) -> Stage:
    """What trains a baseline, as a stage of its own."""
    sections: tuple[str, ...] = (f"baselines.{name}", "evaluation.mask_seen")
    inputs: tuple[str, ...] = ("interactions",)
    if name in DISCRETE:  # layers, history and precision are the LLM's
        inputs, sections = (*inputs, f"codes/{name}"), (*sections, *OF_LLM)
    if name in VARIANTS:
        inputs, sections = ("interactions", "embeddings"), (*OF_LLM, "evaluation.mask_seen")
    return Stage(f"train_{name}", partial(_trained, name=name), sections, inputs, (f"baselines/{name}",), name)


def _codes(run: Run, config: RunConfig, config_hash: str, name: str) -> None:
    from ctd_scale.baselines.discrete import assign_codes

    assign_codes(name, run, config, config_hash)


# TIGER's are of what the LLM says of a title, before it is trained; the others are of the log and the seed alone.
OF_CODES = {"tiger": ("llm.backbone", "llm.num_hidden_layers")}
CODES = tuple(
    Stage(
        f"assign_codes_{name}",
        partial(_codes, name=name),
        OF_CODES.get(name, ()),
        ("interactions",),
        (f"codes/{name}",),
    )
    for name in DISCRETE
)
BASELINES = tuple(_baseline(name) for name in (*TRAINED, *VARIANTS))
ALL_STAGES = (*STAGES, *CODES, *BASELINES)


def stage_named(name: str) -> Stage:
    """The stage of that name; what it trains is name enough. Raises ConfigError naming all of them."""
    known = {stage.name: stage for stage in ALL_STAGES}
    for given in (name, f"train_{name}"):
        if given in known:
            return known[given]
    raise ConfigError(f"no stage {name!r}; stages: {', '.join(known)}")


def sections_of(stage: Stage, config: RunConfig) -> Sections:
    """What of the config shapes what the stage makes."""
    return stage.sections if isinstance(stage.sections, tuple) else stage.sections(config)


def stage_hash(stage: Stage, run: Run, config: RunConfig) -> str:
    """What the stage's artifacts depend on: its sections of the config and the content of its inputs.

    Raises ArtifactError where an input is not published, ConfigError where a backbone is not there.
    """
    digests: Mapping[str, str] = {}
    if stage.name == "prepare_interactions":
        from ctd_scale.interactions.sources import input_digests

        digests = input_digests(config.interactions)
    else:
        digests = {name: run.fetch(name, verify=False).digest for name in stage.inputs}
    name = f"{stage.name}, revision {stage.revision}" if stage.revision else stage.name
    sections = sections_of(stage, config)
    digests = {**digests, **backbone_digests(sections, config)}
    payload = json.dumps([name, section_hash(config, sections), digests], sort_keys=True)
    return hashlib.sha256(payload.encode()).hexdigest()


def backbone_digests(sections: Collection[str], config: RunConfig) -> dict[str, str]:
    """By its name in the config the content of the backbone, where one of the sections names it and it is a folder:
    other files may lie there by now. What comes out of the wheel stays."""
    folder = given_folder(config.llm) if {"llm", "llm.backbone"} & set(sections) else None
    return {} if folder is None else {"llm.backbone": folder_digest(folder)}


def is_current(stage: Stage, run: Run, key: str) -> bool:
    """Whether everything that the stage makes is published, by this version, made from this key, and undamaged."""
    for name in stage.outputs:
        try:
            manifest = run.manifest(name)
            if manifest is None or manifest["config_hash"] != key:
                return False
            run.fetch(name)
        except ArtifactError as error:
            console.print(f"  {error}", style="yellow", highlight=False)
            return False
    return True


def run_stage(stage: Stage, run: Run, config: RunConfig) -> bool:
    """Make what the stage makes, unless it is current. Returns whether it ran. Raises ArtifactError where another
    process makes something of this run."""
    with run.alone():
        key = stage_hash(stage, run, config)
        if is_current(stage, run, key):
            console.print(f"[green]✓[/] {stage.name} [dim]unchanged[/]")
            return False
        console.print(f"[bold]▶ {stage.name}[/]")
        started = time.perf_counter()
        stage.make(replace(run, settings=section_values(config, sections_of(stage, config))), config, key)
        if stage.checkpoints:
            discard(run.checkpoints, stage.checkpoints)
        discard_staged(run.root / ".staging", stage.checkpoints, stage.outputs)
    console.print(f"[green]✓[/] {stage.name} [dim]{time.perf_counter() - started:.1f} s[/]", highlight=False)
    return True


def run_by_itself(stage: Stage, run: Run, config: RunConfig) -> None:
    """One stage. Where it was made, the config of the run takes over what shapes it: all else in there is what the
    other stages were made with, or how the run is served.

    Raises ConfigError before anything is made where the two do not agree.
    """
    with run.alone():
        written = run.exists("run.toml")
        now = _taken_over(stage, run, config) if written else config
        if run_stage(stage, run, config) or not written:
            run.write_config(now)


def _taken_over(stage: Stage, run: Run, config: RunConfig) -> RunConfig:
    """The config of the run with what shapes the stage as another one has it."""
    values, given = (each.model_dump(mode="json") for each in (run.read_config(), config))
    for section in sections_of(stage, config):
        *parents, last = section.split(".")
        reduce(getitem, parents, values)[last] = reduce(getitem, parents, given)[last]
    return validate_config(values, source=f"{run.url}/run.toml with what now shapes {stage.name}")


def run_with_inputs(stages: Iterable[Stage], run: Run, config: RunConfig) -> None:
    """These stages, each after every stage that makes what it reads, none twice. Where nothing was to be made, the
    config of the run stays what it was."""
    done: set[str] = set()
    made = not run.exists("run.toml")

    def make(stage: Stage) -> None:
        nonlocal made
        for maker in ALL_STAGES:
            if set(maker.outputs) & set(stage.inputs) and maker.name not in done:
                make(maker)
        made = run_stage(stage, run, config) or made
        done.add(stage.name)

    with run.alone():
        for stage in stages:
            make(stage)
        if made:
            run.write_config(config)


def run_pipeline(run: Run, config: RunConfig) -> None:
    """All stages, in order. A log that cannot be used leaves the config of the run as it was."""
    first, *others = STAGES
    with run.alone():
        run_stage(first, run, config)
        run.write_config(config)
        for stage in others:
            run_stage(stage, run, config)
