"""Full-catalogue ranking of the withheld items, for the chain, its parts and the simplest rivals, in one table."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy import ndarray
from rich.table import Table

from ctd_scale.artifacts import Artifact, Run, write_text
from ctd_scale.baselines.lightgcn import lightgcn_scores
from ctd_scale.baselines.popularity import popularity_scores
from ctd_scale.batches import (
    SPLITS,
    InteractionLog,
    NodeArrays,
    Preferences,
    Ranking,
    Split,
    load_rankings,
)
from ctd_scale.calibrate import scored_pools
from ctd_scale.config import RunConfig
from ctd_scale.metrics import ranks_in_lists, summarise, target_ranks, top_k
from ctd_scale.recommender import load_density, load_retrieve
from ctd_scale.training import console

INPUTS = ("interactions", "embeddings", "models/llm", "preferences", "models/diffusion", "index", "ranking")
METRICS = ("hr@10", "ndcg@10", "hr@20", "ndcg@20", "mrr", "coverage@10")

Report = dict[str, Any]


def evaluate(run: Run, config: RunConfig, config_hash: str) -> None:
    """Everything published -> metrics/evaluation.json (and evaluation_unmasked.json where asked for)."""
    artifacts = {name: run.fetch(name) for name in INPUTS}
    for artifact in artifacts.values():
        run.require_made_from(artifact, *(other for other in artifacts.values() if other is not artifact))
    masks = {"evaluation.json": config.evaluation.mask_seen}
    if config.evaluation.report_unmasked:
        masks["evaluation_unmasked.json"] = False
    inputs = {artifact.name: artifact.digest for artifact in artifacts.values()}
    with run.publish("metrics", config_hash=config_hash, inputs=inputs) as folder:
        for file, mask_seen in masks.items():
            write_text(folder / file, json.dumps(make_report(artifacts, config, mask_seen), indent=2) + "\n")


def read_reports(run: Run) -> list[Report]:
    """The published tables."""
    folder = run.fetch("metrics").path
    return [json.loads(file.read_text()) for file in sorted(folder.glob("evaluation*.json"))]


def make_report(artifacts: Mapping[str, Artifact], config: RunConfig, mask_seen: bool) -> Report:
    """Rank every validation and test target among all items, with every model."""
    log = InteractionLog.load(artifacts["interactions"].path)
    embeddings = NodeArrays.load(artifacts["embeddings"].path)
    rankings = load_rankings(artifacts["ranking"].path)
    rows: list[dict[str, Any]] = []
    for split in SPLITS:
        scorers = {
            "popularity": lambda users: popularity_scores(log, users),
            "lightgcn": lambda users: lightgcn_scores(embeddings, users),
        }
        for name, scorer in scorers.items():
            rows.append({"model": name, "split": split, **_rank_scores(log, scorer, split, config, mask_seen)})
        preferences = Preferences.load(artifacts["preferences"].path, split)
        for name, row in _rank_chain(artifacts, log, preferences, split, rankings, config, mask_seen).items():
            rows.append({"model": name, "split": split, **row})
    protocol = {
        "dataset": artifacts["interactions"].manifest["facts"].get("dataset", config.interactions.dataset),
        "split": "leave-one-out by order; full catalogue ranking; weights from validation",
        "users": len(log.split_users()),
        "items": log.num_items,
        "mask_seen": mask_seen,
        "seed": config.seed,
    }
    return {"protocol": protocol, "rows": rows, "ranking": {name: vars(r) for name, r in rankings.items()}}


def _rank_scores(
    log: InteractionLog, scorer: Callable[[ndarray], ndarray], split: Split, config: RunConfig, mask_seen: bool
) -> dict[str, float]:
    started, users = time.perf_counter(), log.split_users()
    ranks, top = [], []
    for start in range(0, len(users), config.evaluation.chunk_users):
        chunk = users[start : start + config.evaluation.chunk_users]
        scores = scorer(chunk).astype(np.float32)
        if mask_seen:
            for row, user in enumerate(chunk):
                scores[row, log.history(int(user), split)] = -np.inf
        ranks.append(target_ranks(scores, log.targets(chunk, split)))
        top.append(top_k(scores, 10)[0])
    summary = summarise(np.concatenate(ranks), np.concatenate(top), log.num_items)
    return {**summary, "seconds": round(time.perf_counter() - started, 3)}


def _rank_chain(
    artifacts: Mapping[str, Artifact],
    log: InteractionLog,
    preferences: Preferences,
    split: Split,
    rankings: dict[str, Ranking],
    config: RunConfig,
    mask_seen: bool,
) -> dict[str, dict[str, float]]:
    """All rankings of the chain over common pools, and the paper's single generated vector."""
    density, retrieve = load_density(dict(artifacts), config), load_retrieve(dict(artifacts), config)
    spoken = any(preferences.texts)
    names = ["single_draw", *(name for name in rankings if name != "full_text" or spoken)]
    ranks: dict[str, list[ndarray]] = {name: [] for name in names}
    top: dict[str, list[ndarray]] = {name: [] for name in names}
    seconds = dict.fromkeys(names, 0.0)
    started = time.perf_counter()
    pools = scored_pools(
        log,
        preferences,
        split,
        density,
        retrieve,
        mask_seen=mask_seen,
        chunk=config.evaluation.chunk_users,
    )
    for each in pools:
        shared = time.perf_counter() - started
        for name in names:
            began = time.perf_counter()
            if name == "single_draw":
                nothing: list[ndarray] = [np.zeros(0, np.int32)] * len(each.users)
                ids, _ = retrieve.retriever.search(each.draws[:, 0], nothing, each.pool.excluded, log.num_items)
            else:
                ids, _ = retrieve.rank(each.pool, each.errors, rankings[name], log.num_items)
            ranks[name].append(ranks_in_lists(ids, each.targets))
            top[name].append(ids[:, :10])
            seconds[name] += shared + time.perf_counter() - began
        started = time.perf_counter()
    return {
        name: {
            **summarise(np.concatenate(ranks[name]), _ten(top[name]), log.num_items),
            "seconds": round(seconds[name], 3),
        }
        for name in names
    }


def _ten(parts: list[ndarray]) -> ndarray:
    ids = np.concatenate(parts)
    return np.pad(ids, ((0, 0), (0, 10 - ids.shape[1])), constant_values=-1).astype(np.int32)


def print_report(report: Report) -> None:
    """The table with its protocol."""
    protocol = report["protocol"]
    seen = "masked" if protocol["mask_seen"] else "kept"
    title = (
        f"{protocol['dataset']}: {protocol['users']:,} users, {protocol['items']:,} items, leave-one-out, "
        f"full ranking, seen items {seen}, seed {protocol['seed']}"
    )
    for split in SPLITS:
        console.print(f"{title}, [bold]{split}[/]", highlight=False, soft_wrap=True)
        table = Table()
        table.add_column("model")
        for name in (*METRICS, "seconds"):
            table.add_column(name, justify="right")
        for row in report["rows"]:
            if row["split"] == split:
                values = (f"{row[name]:.4f}" for name in METRICS)
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
            f"| {row['model']} | " + " | ".join(f"{row[name]:.4f}" for name in METRICS) + " |"
            for row in report["rows"]
            if row["split"] == "test"
        ]
        lines.append("")
    write_text(path, "\n".join(lines))
