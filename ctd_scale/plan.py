"""What every stage will need on this machine, before anything runs: short calibrations, then arithmetic.

Times are of this machine's CPU; a stage with `use_gpu` is faster. Only the graph stage is calibrated with its workers.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from pathlib import Path

import numpy as np
from rich.table import Table

from ctd_scale.artifacts import Run
from ctd_scale.batches import InteractionLog
from ctd_scale.calibrate import number_of_parts
from ctd_scale.config import RunConfig, section_values
from ctd_scale.diffusion.plan import plan_diffusion, seconds_per_user
from ctd_scale.estimates import Estimate, seconds_per_byte_written, seconds_per_call
from ctd_scale.graph.plan import plan_graph
from ctd_scale.interactions.plan import plan_interactions
from ctd_scale.interactions.sketch import sketch_log
from ctd_scale.interactions.sources import input_digests
from ctd_scale.llm.backbone import backbone_folder, hidden_size
from ctd_scale.llm.plan import plan_history, plan_llm
from ctd_scale.ranking import BLOCK_SCORES
from ctd_scale.retrieval.plan import plan_index, seconds_to_count
from ctd_scale.terminal import console
from ctd_scale.tokenizer.plan import plan_tokenizer

# Models that an evaluation ranks with, all over the whole catalogue.
RANKINGS = 14
# What is held of a block of scores while it is ranked: it, the same masked, and the same partly sorted.
COPIES = 3
# Where the candidates of a user come from, each time `error_candidates`: preference, draws, graph and neighbours.
SOURCES = 4


def plan_run(run: Run, config: RunConfig, stages: str = "all") -> list[Estimate]:
    """One estimate a stage, in order; `stages` = "graph" calibrates that one alone."""
    started = time.perf_counter()
    if _has_log(run, config):
        log = InteractionLog.load(run.fetch("interactions", verify=False).path)
        reading = 0.0
    else:
        log = sketch_log(config.interactions)
        reading = time.perf_counter() - started
    console.print(
        f"{log.num_users:,} users, {log.num_items:,} items, {len(log.items):,} interactions; calibrating",
        highlight=False,
    )
    graph = plan_graph(log, config, run)
    if stages == "graph":
        return [graph]
    with tempfile.TemporaryDirectory(prefix="plan-", dir=run.root.parent) as folder:
        write = seconds_per_byte_written(Path(folder))
    backbone = backbone_folder(config.llm)
    llm, preferences = plan_llm(log, config, backbone)
    nodes, dim = log.num_users + log.num_items, config.llm.preference_dim
    prefixes = float(np.maximum(log.train_lengths() - 1, 0).sum())
    if config.llm.max_windows:
        limit = config.llm.max_windows * config.llm.max_history
        prefixes = float(np.clip(log.train_lengths() - 1, 0, limit).sum())
    return [
        *([plan_interactions(log, config.interactions, reading)] if reading else []),
        graph,
        plan_tokenizer(nodes, config.graph.embed_dim, hidden_size(backbone), config.tokenizer, write),
        *([plan_history(log, config)] if config.history.num_blocks else []),
        llm,
        preferences,
        plan_diffusion(prefixes, log.num_items, dim, config.diffusion),
        plan_index(log, dim, config.graph.embed_dim, config.retrieval, config.seed),
        *_plan_ranking(log, config, dim),
    ]


def _has_log(run: Run, config: RunConfig) -> bool:
    """Whether the run has the log that is asked about. What no stage has made says nothing of where it is from."""
    manifest = run.manifest("interactions")
    if manifest is None:
        return False
    made = manifest.get("settings") or {}
    return not made or (
        made == section_values(config, ["interactions"]) and manifest["inputs"] == input_digests(config.interactions)
    )


def _plan_ranking(log: InteractionLog, config: RunConfig, dim: int) -> list[Estimate]:
    """calibrate_ranking and evaluate: draws and errors of each user, and every item scored for every ranking."""
    users = len(log.split_users())
    chunk = max(1, min(users, config.evaluation.chunk_users))
    items = min(log.num_items, 100_000)
    queries, vectors = (np.random.default_rng(0).standard_normal((rows, dim), np.float32) for rows in (chunk, items))

    def score() -> None:
        np.argsort(-(queries @ vectors.T), axis=1)

    scoring = seconds_per_call(score, at_most=2) / chunk * log.num_items / items
    density = seconds_per_user(dim, config.diffusion, config.seed)
    calibrated = min(users, config.evaluation.calibration_users)
    counting = number_of_parts(log, calibrated, config) * seconds_to_count(log, config.retrieval.neighbors, config.seed)
    # Of each user draws and candidates, which calibration keeps until the weights are fitted.
    held = 4.0 * dim * (config.diffusion.num_draws + SOURCES * config.diffusion.error_candidates)
    scores = 4.0 * COPIES * min(chunk * log.num_items, BLOCK_SCORES)
    said = f"{1000 * density:.1f} ms a user for the denoiser, {1000 * scoring:.1f} ms to rank the catalogue once"
    return [
        Estimate("calibrate_ranking", calibrated * (density + 2 * scoring) + counting, calibrated * held, 0.0, said),
        Estimate("evaluate", 2 * users * (density + RANKINGS * scoring), chunk * held + scores, 0.0, said),
    ]


def print_plan(run: Run, estimates: list[Estimate]) -> None:
    """The table, and what will not fit."""
    table = Table()
    for name, justify in (("stage", "left"), ("time", "right"), ("memory", "right"), ("disk", "right"), ("", "left")):
        table.add_column(name, justify=justify)  # type: ignore[arg-type]
    for each in estimates:
        table.add_row(each.stage, _time(each.seconds), _size(each.memory), _size(each.disk), each.reason)
    seconds, disk = sum(each.seconds for each in estimates), sum(each.disk for each in estimates)
    most = max(each.memory for each in estimates)
    table.add_row("together", _time(seconds), _size(most), _size(disk), "memory: the most of any stage")
    console.print(table)
    free = shutil.disk_usage(run.root.parent).free
    if disk > free:
        console.print(f"needs {_size(disk)} of disk but {run.root.parent} has {_size(free)} left", style="red")
    memory = float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    for each in estimates:
        if each.memory > memory:
            console.print(f"{each.stage} needs {_size(each.memory)}, the machine has {_size(memory)}", style="red")


def _time(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _size(count: float) -> str:
    return f"{count / 1e6:,.0f} MB" if count < 1e9 else f"{count / 1e9:,.1f} GB"
