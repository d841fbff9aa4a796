"""`ctd bench quality`: any models on any ready-made sets, over seeds, in one table under one protocol.

Each (set, seed) is a run of its own, `{storage}/{set}-{seed}`, whose stages are resumed and skipped like those of any
run. A baseline's ranks are an artifact of that run, `ranks/NAME`; the chain's are those that `evaluate` publishes.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar, cast

import numpy as np
from jaxtyping import Float64
from numpy import ndarray

from ctd_scale.artifacts import Artifact, Run, write_text
from ctd_scale.baselines.discrete import DiscreteLM, id_facts
from ctd_scale.baselines.names import DISCRETE, TRAINED, VARIANTS
from ctd_scale.baselines.scorers import SCORERS, trained_artifact
from ctd_scale.baselines.train import load_model
from ctd_scale.batches import SPLITS, InteractionLog, Split
from ctd_scale.config import ConfigError, RunConfig, load_config
from ctd_scale.ensemble import load_ensemble
from ctd_scale.evaluate import METRICS, protocol_of, rank_baseline
from ctd_scale.pipeline import STAGES, Stage, run_pipeline, run_with_inputs
from ctd_scale.ranking import beyond_accuracy, load_ranks, ndcg_gains, rank_targets, save_ranks
from ctd_scale.terminal import console

# Of the chain; the last only where texts are generated.
SPOKEN = "full_text"
CHAIN = (
    *("single_draw", "draws", "error", "graph", "neighbors", "preference"),
    *("fused_graph", "fused_draws", "fused_error", "fused_both", "fused_all", "full", SPOKEN),
)
# The preferences of two seeds, averaged: what is gained by a second model that is no denoiser.
PREFERENCE, PAIR = "preference", "two_preferences"
RESAMPLES = 2000
ID_USERS = 500  # whose histories tell how many beams are items without the trie
# What trains before a preference is read.
PREFERENCE_STAGES = ("embeddings", "models/tokenizer", "models/history", "models/llm")
RANKS, ROWS = "ranks-{split}.parquet", "rows.json"
METRIC = "ndcg@10"

T = TypeVar("T")


@dataclass(frozen=True)
class Measured:
    """One model on one set with one seed, on one split: metrics, cost, and each user's NDCG@10."""

    model: str
    split: Split
    seed: int
    metrics: dict[str, float | None]
    training_seconds: float | None
    peak_memory_mb: float | None
    ids: dict[str, float] | None
    gains: Float64[ndarray, "users"]


@dataclass(frozen=True)
class Row:
    """A model on a set: mean and spread over the seeds, and how far it is from the reference, over the same users."""

    dataset: str
    splitting: str
    mask_seen: bool
    users: int
    items: int
    model: str
    split: Split
    seeds: list[int]
    mean: dict[str, float | None]
    spread: dict[str, float | None]
    training_seconds: float | None
    peak_memory_mb: float | None
    ids: dict[str, float] | None
    reference: str
    difference: float
    interval: tuple[float, float]


def compare(
    dataset: str, models: Sequence[str], seeds: Sequence[int], storage: str, overrides: Sequence[str], reference: str
) -> list[Row]:
    """Train and rank what is missing, then the rows of one set. `reference` "" is the best on validation.

    Raises ConfigError as `require_comparable`.
    """
    _require_models(models, seeds, reference)
    configs = configs_for(dataset, models, seeds, overrides)
    measured: list[Measured] = []
    protocol: dict[str, Any] = {}
    runs: list[tuple[Run, RunConfig]] = []
    for seed, config in zip(seeds, configs, strict=True):
        run = Run(storage, f"{Path(dataset).stem}-{seed}")
        console.print(f"{dataset}, seed {seed}: [bold]{run.url}[/]", highlight=False)
        measured += measure(run, config, models)
        protocol = protocol_under(dataset, run, config)
        runs.append((run, config))
    if PAIR in models:
        for (run, config), (other, _) in pairs_of(runs):
            measured += measure_preferences(PAIR, (run, other), config)
    if not reference:
        scores = {name: _mean(measured, name, "validation") for name in models}
        reference = max(models, key=lambda name: scores[name])
    return [row_of(measured, protocol, name, split, reference) for split in SPLITS for name in models]


def require_comparable(
    datasets: Sequence[str], models: Sequence[str], seeds: Sequence[int], overrides: Sequence[str], reference: str
) -> None:
    """Refuse, before anything is trained, what one table cannot hold.

    Raises ConfigError: no model, an unknown one, one that needs two seeds where there is one, a reference that is not
    among the models, a config that cannot be used, or two of one set whose rows would take each other's place.
    """
    _require_models(models, seeds, reference)
    given: dict[str, str] = {}
    for dataset in datasets:
        config = configs_for(dataset, models, seeds, overrides)[0]
        about = config.interactions.model_dump(mode="json", exclude={"data_dir"})
        own = Path(dataset).stem if config.interactions.dataset == "files" else ""
        protocol = [own, about, config.evaluation.mask_seen, config.evaluation.know_validation]
        key = json.dumps(protocol)
        if key in given:
            raise ConfigError(
                f"--data {given[key]} and --data {dataset} are one set under one protocol, so the rows of one would "
                "take the place of the other's; give each a command with an --out of its own"
            )
        given[key] = dataset


def configs_for(dataset: str, models: Sequence[str], seeds: Sequence[int], overrides: Sequence[str]) -> list[RunConfig]:
    """The config with each seed. Raises ConfigError: it cannot be used, or not for these models."""
    configs = [load_config(dataset, [*overrides, f"seed={seed}"]) for seed in seeds]
    if SPOKEN in models and not configs[0].llm.generate_texts:
        raise ConfigError(f"{dataset}: {SPOKEN} needs llm.generate_texts=true, got false; leave out one of them")
    return configs


def _require_models(models: Sequence[str], seeds: Sequence[int], reference: str) -> None:
    known = (*SCORERS, *CHAIN, PAIR)
    if not models:
        raise ConfigError(f"--models is empty; models: {', '.join(known)}")
    unknown = [name for name in (*models, *filter(None, [reference])) if name not in known]
    if unknown:
        raise ConfigError(f"no model {unknown[0]!r}; models: {', '.join(known)}")
    if PAIR in models and len(seeds) < 2:
        raise ConfigError(f"{PAIR} averages two seeds; give --seeds 2 or more")
    if reference and reference not in models:
        raise ConfigError(f"the reference {reference!r} is not among the models {', '.join(models)}")


def pairs_of(runs: Sequence[T]) -> list[tuple[T, T]]:
    """Each with the next one, the last with the first: as many pairs as there are runs. Of two there is but one."""
    pairs = list(zip(runs, [*runs[1:], *runs[:1]], strict=True))
    return pairs[:1] if len(runs) == 2 else pairs


def protocol_under(dataset: str, run: Run, config: RunConfig) -> dict[str, Any]:
    """How the figures of a run are made; an own log goes by the name of its config, since all of them are `files`."""
    protocol = protocol_of(run.fetch("interactions"), config, config.evaluation.mask_seen)
    own = config.interactions.dataset == "files"
    return {**protocol, "dataset": Path(dataset).stem if own else protocol["dataset"]}


def measure(run: Run, config: RunConfig, models: Sequence[str]) -> list[Measured]:
    """Everything about the models of one run; what it lacks is made."""
    chain = [name for name in models if name in CHAIN]
    found: list[Measured] = []
    if set(chain) - {PREFERENCE}:
        run_pipeline(run, config)
        found += _measured(run, config, "metrics", chain)
    elif chain or PAIR in models:  # needs neither the denoiser nor an index
        run_with_inputs([stage for stage in STAGES if "preferences" in stage.outputs], run, config)
        found += measure_preferences(PREFERENCE, (run,), config) if chain else []
    baselines = [name for name in models if name in SCORERS]
    run_with_inputs(map(rank_stage, baselines), run, config)
    for name in baselines:
        found += _measured(run, config, f"ranks/{name}", [name])
    return found


def measure_preferences(name: str, runs: Sequence[Run], config: RunConfig) -> list[Measured]:
    """The preferences of these runs, averaged, as a model of the first one's seed; its cost is that of all."""
    log = InteractionLog.load(runs[0].fetch("interactions").path)
    costs = [_cost(run.fetch(name)) for run in runs for name in PREFERENCE_STAGES]
    known = [cost for cost in costs if cost]
    found = []
    for split in SPLITS:
        ranks = rank_targets(
            log,
            load_ensemble(runs, split),
            split,
            mask_seen=config.evaluation.mask_seen,
            chunk_users=config.evaluation.chunk_users,
        )
        metrics = {**ranks.summary(log.num_items), **beyond_accuracy(log, split, ranks)}
        found.append(
            Measured(
                name,
                split,
                config.seed,
                {**{key: metrics.get(key) for key in METRICS}, "seconds": None},  # the LLM has read all before
                round(sum(cost["training_seconds"] for cost in known), 1) if known else None,
                max(cost["peak_memory_mb"] for cost in known) if known else None,
                None,
                ranks.gains(),
            )
        )
    return found


def rank_stage(name: str) -> Stage:
    """Ranks of a baseline as a stage: skipped where nothing it depends on changed."""
    own = (f"baselines.{name}",) if name in (*TRAINED, "item_knn") else ()
    if name in (*VARIANTS, *DISCRETE):
        own = (*own, "llm")
    inputs = ("interactions", *([source] if (source := trained_artifact(name)) else []))
    # 1: what needs no training knows the validation interactions at test.
    revision = int(name in ("popularity", "item_knn"))
    make, outputs = partial(_rank, name), (f"ranks/{name}",)
    return Stage(f"rank_{name}", make, ("evaluation", *own), inputs, outputs, revision=revision)


def _rank(name: str, run: Run, config: RunConfig, config_hash: str) -> None:
    interactions = run.fetch("interactions")
    log, mask_seen = InteractionLog.load(interactions.path), config.evaluation.mask_seen
    rows: list[dict[str, Any]] = []
    inputs = {interactions.name: interactions.digest}
    facts: dict[str, Any] = {}
    if source := trained_artifact(name):
        artifact = run.fetch(source)
        run.require_made_from(artifact, interactions)
        inputs[artifact.name] = artifact.digest
        facts |= _cost(artifact)
    if name in DISCRETE:
        some = log.split_users("test")[:ID_USERS]
        histories = [np.asarray(log.history(int(user), "test")) for user in some]
        facts["ids"] = id_facts(cast(DiscreteLM, load_model(name, run, config)), histories)
    with run.publish(f"ranks/{name}", config_hash=config_hash, inputs=inputs, facts=facts) as folder:
        for split in SPLITS:
            ranks = rank_baseline(name, run, config, split, mask_seen)
            rows.append(
                {"model": name, "split": split, **ranks.summary(log.num_items), **beyond_accuracy(log, split, ranks)}
            )
            save_ranks(log.split_users(split), {name: ranks.ranks}, folder / RANKS.format(split=split))
        write_text(folder / ROWS, json.dumps({"rows": rows}, indent=2) + "\n")


def _measured(run: Run, config: RunConfig, name: str, models: Iterable[str]) -> list[Measured]:
    artifact = run.fetch(name)
    chain = name == "metrics"
    rows = json.loads((artifact.path / ("evaluation.json" if chain else ROWS)).read_text())["rows"]
    by_model = {(row["model"], row["split"]): row for row in rows}
    cost = _chain_cost(run) if chain else _cost(artifact)
    found = []
    for split in SPLITS:
        ranks = load_ranks(artifact.path / (f"evaluation-{split}.parquet" if chain else RANKS.format(split=split)))
        for model in models:
            if (model, split) not in by_model:
                raise ConfigError(f"{run.url} has no {model!r}; it needs llm.generate_texts=true")
            row = by_model[model, split]
            metrics = {key: row.get(key) for key in (*METRICS, "seconds")}
            gains = ndcg_gains(ranks[model].astype(np.float64))
            found.append(
                Measured(
                    model,
                    split,
                    config.seed,
                    metrics,
                    cost.get("training_seconds"),
                    cost.get("peak_memory_mb"),
                    artifact.manifest["facts"].get("ids"),
                    gains,
                )
            )
    return found


def _cost(artifact: Artifact) -> dict[str, float]:
    facts = artifact.manifest["facts"]
    return {key: facts[key] for key in ("training_seconds", "peak_memory_mb") if key in facts}


def _chain_cost(run: Run) -> dict[str, float]:
    """All stages of the chain that train: their seconds together, the largest memory of one."""
    costs = [_cost(run.fetch(name)) for name in (*PREFERENCE_STAGES, "models/diffusion")]
    known = [cost for cost in costs if cost]
    if not known:
        return {}
    return {
        "training_seconds": round(sum(cost["training_seconds"] for cost in known), 1),
        "peak_memory_mb": max(cost["peak_memory_mb"] for cost in known),
    }


def _mean(measured: Iterable[Measured], model: str, split: Split) -> float:
    return float(np.mean([each.metrics[METRIC] for each in measured if (each.model, each.split) == (model, split)]))


def row_of(measured: Sequence[Measured], protocol: Mapping[str, Any], model: str, split: Split, against: str) -> Row:
    """A pair goes by the seed of its first."""
    own = [each for each in measured if (each.model, each.split) == (model, split)]
    others = [each for each in measured if (each.model, each.split) == (against, split)]
    table = {key: [each.metrics[key] for each in own] for key in (*METRICS, "seconds")}
    differences = np.mean([each.gains for each in own], axis=0) - np.mean([each.gains for each in others], axis=0)

    def mean_of(values: list[float | None]) -> float | None:
        known = [value for value in values if value is not None]
        return round(float(np.mean(known)), 1) if known else None

    return Row(
        dataset=str(protocol["dataset"]),
        splitting=str(protocol["split"]).partition(";")[0],
        mask_seen=bool(protocol["mask_seen"]),
        users=int(protocol["users"]),
        items=int(protocol["items"]),
        model=model,
        split=split,
        seeds=[each.seed for each in own],
        mean={key: _known(np.mean, values) for key, values in table.items()},
        spread={key: _known(_deviation, values) for key, values in table.items()},
        training_seconds=mean_of([each.training_seconds for each in own]),
        peak_memory_mb=mean_of([each.peak_memory_mb for each in own]),
        ids=own[0].ids,
        reference=against,
        difference=float(differences.mean()),
        interval=bootstrap_interval(differences),
    )


def _deviation(values: Sequence[float]) -> float:
    """That of what the seeds are a sample of; 0 where there is but one."""
    return float(np.std(values, ddof=1)) if len(values) > 1 else 0.0


def _known(statistic: Callable[..., Any], values: Sequence[float | None]) -> float | None:
    """Over the seeds that have a value; None where none has."""
    known = [value for value in values if value is not None]
    return float(statistic(known)) if known else None


def bootstrap_interval(differences: Float64[ndarray, "users"], seed: int = 0) -> tuple[float, float]:
    """95 % interval of the mean by resampling users: paired, because each difference is between two models on the
    same user (Efron, 1979; percentiles of the resampled means)."""
    random = np.random.default_rng((seed, 50))
    users = len(differences)
    means = [float(differences[random.integers(0, users, users)].mean()) for _ in range(RESAMPLES)]
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


def as_json(rows: Iterable[Row]) -> list[dict[str, Any]]:
    """Rows as plain values."""
    return [asdict(row) for row in rows]
