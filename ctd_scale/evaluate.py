"""Full-catalogue ranking of the withheld items, for the chain, its parts and the simplest rivals, in one table."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32, Float64, Int32, Int64
from numpy import ndarray
from rich.table import Table

from ctd_scale import training
from ctd_scale.artifacts import Artifact, Run, write_text
from ctd_scale.baselines.scorers import SCORERS
from ctd_scale.batches import SPLITS, InteractionLog, Preferences, Ranking, Split, load_rankings
from ctd_scale.calibrate import ScoredPool, as_served, scored_pools
from ctd_scale.candidates import RetrieveStep
from ctd_scale.config import RunConfig
from ctd_scale.metrics import ranks_in_lists
from ctd_scale.ranking import TOP, Ranks, beyond_accuracy, counted_ranks, padded, rank_targets, save_ranks
from ctd_scale.recommender import load_density, load_retrieve
from ctd_scale.retrieval.dense import unit_vectors
from ctd_scale.terminal import console

INPUTS = ("interactions", "embeddings_at_test", "models/llm", "preferences", "models/diffusion", "index", "ranking")
METRICS = ("hr@10", "ndcg@10", "hr@20", "ndcg@20", "mrr", "coverage@10", "diversity@10", "popularity@10", "rare_hr@10")

SERVED = ("full", "full_text")
SHOWN = METRICS[:6]  # what fits on a line of a terminal; the file has all of it
SPLITTING = {False: "leave-one-out by order", True: "global time"}

Report = dict[str, Any]


def evaluate(run: Run, config: RunConfig, config_hash: str) -> None:
    """Everything published -> metrics/evaluation.json with the rank of every user's item beside it (and both again as
    evaluation_unmasked, where asked for)."""
    artifacts = {name: run.fetch(name) for name in INPUTS}
    for artifact in artifacts.values():
        run.require_made_from(artifact, *(other for other in artifacts.values() if other is not artifact))
    masks = {"evaluation": config.evaluation.mask_seen}
    if config.evaluation.report_unmasked:
        masks["evaluation_unmasked"] = False
    inputs = {artifact.name: artifact.digest for artifact in artifacts.values()}
    log = InteractionLog.load(artifacts["interactions"].path)
    with run.publish("metrics", config_hash=config_hash, inputs=inputs) as folder:
        for name, mask_seen in masks.items():
            ranked = {split: rank_all(run, artifacts, config, split, mask_seen) for split in SPLITS}
            report = make_report(artifacts, config, mask_seen, ranked)
            write_text(folder / f"{name}.json", json.dumps(report, indent=2) + "\n")
            for split, models in ranked.items():
                ranks = {model: each.ranks for model, each in models.items()}
                save_ranks(log.split_users(split), ranks, folder / f"{name}-{split}.parquet")


def read_reports(run: Run) -> list[Report]:
    """The published tables."""
    folder = run.fetch("metrics").path
    return [json.loads(file.read_text()) for file in sorted(folder.glob("evaluation*.json"))]


def make_report(
    artifacts: Mapping[str, Artifact],
    config: RunConfig,
    mask_seen: bool,
    ranked: Mapping[Split, Mapping[str, Ranks]],
) -> Report:
    """The table with its protocol and the weights that were chosen."""
    log = InteractionLog.load(artifacts["interactions"].path)
    rows = [
        {"model": model, "split": split, **ranks.summary(log.num_items), **beyond_accuracy(log, split, ranks)}
        for split, models in ranked.items()
        for model, ranks in models.items()
    ]
    protocol = protocol_of(artifacts["interactions"], config, mask_seen)
    rankings = load_rankings(artifacts["ranking"].path)
    return {"protocol": protocol, "rows": rows, "ranking": {name: vars(r) for name, r in rankings.items()}}


def protocol_of(interactions: Artifact, config: RunConfig, mask_seen: bool) -> dict[str, Any]:
    """How the figures were made."""
    log = InteractionLog.load(interactions.path)
    known = "" if config.evaluation.know_validation else ", only training known"
    return {
        "dataset": interactions.manifest["facts"].get("dataset", config.interactions.dataset),
        "split": f"{SPLITTING[log.cuts is not None]}{known}; full catalogue ranking; weights from validation",
        "users": len(log.split_users()),
        "items": log.num_items,
        "mask_seen": mask_seen,
        "seed": config.seed,
    }


def rank_all(
    run: Run, artifacts: Mapping[str, Artifact], config: RunConfig, split: Split, mask_seen: bool
) -> dict[str, Ranks]:
    """Rank every target of the split among all items, with every model of the run."""
    ranked = {name: rank_baseline(name, run, config, split, mask_seen) for name in ("popularity", "lightgcn")}
    return {**ranked, **_rank_chain(artifacts, config, split, mask_seen, run.root / "logs" / "evaluate")}


def rank_baseline(name: str, run: Run, config: RunConfig, split: Split, mask_seen: bool) -> Ranks:
    """The same for one baseline that the run has."""
    log = InteractionLog.load(run.fetch("interactions").path)
    scorer = SCORERS[name](run, config, known_by(split, config))
    return rank_targets(log, scorer, split, mask_seen=mask_seen, chunk_users=config.evaluation.chunk_users)


def known_by(split: Split, config: RunConfig) -> Split:
    """The split as of which the graph and what is counted are asked for this one's targets."""
    return split if config.evaluation.know_validation else "validation"


def _rank_chain(
    artifacts: Mapping[str, Artifact], config: RunConfig, split: Split, mask_seen: bool, logs: Path
) -> dict[str, Ranks]:
    """All rankings of the chain over common pools, and the paper's single generated vector."""
    log = InteractionLog.load(artifacts["interactions"].path)
    preferences = Preferences.load(artifacts["preferences"].path, split)
    rankings = load_rankings(artifacts["ranking"].path)
    density = load_density(dict(artifacts), config)
    retrieve = load_retrieve(dict(artifacts), config, known_by(split, config))
    item_vectors = retrieve.retriever.vectors
    assert isinstance(item_vectors, ndarray), "the run's own index has not grown"
    spoken = any(preferences.texts)
    names = ["single_draw", *(name for name in rankings if name != "full_text" or spoken)]
    ranks: dict[str, list[ndarray]] = {name: [] for name in names}
    top: dict[str, list[ndarray]] = {name: [] for name in names}
    seconds = dict.fromkeys(names, 0.0)
    started = time.perf_counter()
    chunk = config.evaluation.chunk_users
    pools = scored_pools(log, preferences, split, density, retrieve, mask_seen=mask_seen, chunk=chunk)
    for each in training.shown_steps(pools, -(-len(preferences) // chunk), f"evaluate {split}", logs):
        tail = retrieve.tail(each.pool, TOP)
        behind = _behind(each, item_vectors)
        shared = time.perf_counter() - started
        for name in names:
            began = time.perf_counter()
            if name == "single_draw":
                vectors, nothing = unit_vectors(each.draws[:, 0], "draw"), [np.zeros(0, np.int32)] * len(each.users)
                ids, _ = retrieve.retriever.search(vectors, nothing, each.pool.excluded, TOP)
                place = counted_ranks(item_vectors, vectors, each.targets, each.pool.excluded)
            elif name in SERVED and not (rankings[name].weighs_all and (name == "full_text" or not spoken)):
                histories = [log.history(int(user), split) for user in each.users]
                asked = as_served(each, rankings[name], retrieve, histories, spoken=name == "full_text")
                ids, place = _places(asked, rankings[name], retrieve, _behind(asked, item_vectors))
            else:
                ids, place = _places(each, rankings[name], retrieve, behind, tail)
            ranks[name].append(place)
            top[name].append(padded(ids))
            seconds[name] += shared + time.perf_counter() - began
        started = time.perf_counter()
    return {name: Ranks(np.concatenate(ranks[name]), np.concatenate(top[name]), seconds[name]) for name in names}


def _behind(each: ScoredPool, item_vectors: Float32[ndarray, "items dim"]) -> Float64[ndarray, "batch"]:
    """The place of each target that is not in its pool: what follows the pool is ordered by the preference."""
    pool = each.pool
    known = [np.concatenate([out, row[row >= 0]]) for out, row in zip(pool.excluded, pool.ids, strict=True)]
    queries = unit_vectors(pool.preferences, "query")
    return (pool.ids >= 0).sum(axis=1) + counted_ranks(item_vectors, queries, each.targets, known)


def _places(
    each: ScoredPool,
    ranking: Ranking,
    retrieve: RetrieveStep,
    behind: ndarray,
    tail: tuple[ndarray, ndarray] | None = None,
) -> tuple[Int32[ndarray, "batch k"], Float64[ndarray, "batch"]]:
    """The list for each user, at least `TOP` long, and the place of its target in the whole catalogue."""
    pool, size = each.pool, (each.pool.ids >= 0).sum(axis=1)
    ids, _ = retrieve.rank(pool, each.errors, ranking, max(TOP, pool.ids.shape[1]), tail)
    return ids, np.minimum(_within(ids, size, each.targets), behind)


def _within(
    ids: Int32[ndarray, "batch k"], size: Int64[ndarray, "batch"], targets: Int32[ndarray, "batch"]
) -> Float64[ndarray, "batch"]:
    """Rank of each target among the first `size` of its list; inf where it is not among them."""
    ranks = ranks_in_lists(ids, targets)
    return np.where(ranks <= size, ranks, np.inf)


def printed(value: float | None) -> str:
    """A metric as it is printed; nothing where there is none."""
    return "" if value is None else f"{value:.4f}"


def print_report(report: Report) -> None:
    """The table with its protocol."""
    protocol = report["protocol"]
    seen = "masked" if protocol["mask_seen"] else "kept"
    title = (
        f"{protocol['dataset']}: {protocol['users']:,} test users, {protocol['items']:,} items, {protocol['split']}, "
        f"seen items {seen}, seed {protocol['seed']}"
    )
    for split in SPLITS:
        console.print(f"{title}, [bold]{split}[/]", highlight=False, soft_wrap=True)
        table = Table()
        table.add_column("model")
        for name in (*SHOWN, "seconds"):
            table.add_column(name, justify="right")
        for row in report["rows"]:
            if row["split"] == split:
                values = (printed(row[name]) for name in SHOWN)
                table.add_row(row["model"], *values, f"{row['seconds']:.1f}")
        console.print(table)


def write_report_markdown(reports: list[Report], path: Path) -> None:
    """Test rows as Markdown."""
    lines = []
    for report in reports:
        protocol = report["protocol"]
        lines += [f"Protocol: {json.dumps(protocol)}", "", "| model | " + " | ".join(METRICS) + " |"]
        lines.append("|---" * (len(METRICS) + 1) + "|")
        lines += [
            f"| {row['model']} | " + " | ".join(printed(row[name]) for name in METRICS) + " |"
            for row in report["rows"]
            if row["split"] == "test"
        ]
        lines.append("")
    write_text(path, "\n".join(lines))
