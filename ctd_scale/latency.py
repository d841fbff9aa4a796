"""`ctd bench latency`: what fewer denoiser calls and candidates cost in NDCG and save in time, and what to serve with.

Every row is the chain behind the preference, one request at a time on one thread, as the endpoint runs it when nobody
else asks. Its time is of the machine that measured it.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float32, Int32
from numpy import ndarray
from rich.table import Table

from ctd_scale.artifacts import Artifact, ArtifactError, Run, write_text
from ctd_scale.batches import InteractionLog, Preferences, Ranking
from ctd_scale.config import RunConfig, section_hash
from ctd_scale.environment import machine, versions
from ctd_scale.live import Live
from ctd_scale.recommender import RankStep, excluded_items, load_rank, require_measured_as_made
from ctd_scale.retrieval.effort import has_effort
from ctd_scale.terminal import console

LATENCY, ROWS = "latency", "latency.json"
INPUTS = ("interactions", "models/llm", "preferences", "models/diffusion", "index", "ranking")
SECTIONS = ("diffusion", "retrieval", "evaluation.mask_seen")
# Of the run's own settings; of the effort that the engine's calibration chose.
SCALES, EFFORTS = (1.0, 0.5, 0.25), (1.0, 0.5, 2.0)
K, WARM_UP = 10, 3


@dataclass(frozen=True)
class Settings:
    """What decides the time behind the preference. `effort` multiplies how much of itself an index searches."""

    num_draws: int
    sampling_steps: int
    error_candidates: int
    error_evaluations: int
    effort: float = 1.0

    def applied(self, config: RunConfig) -> RunConfig:
        """The config with these in the place of its own (all but `effort`)."""
        chosen = {name: value for name, value in asdict(self).items() if name != "effort"}
        return config.model_copy(update={"diffusion": config.diffusion.model_copy(update=chosen)})


@dataclass(frozen=True)
class Row:
    """Milliseconds of one request behind the preference, and NDCG@10 on validation."""

    settings: Settings
    p50_ms: float
    p99_ms: float
    ndcg: float

    def values(self) -> dict[str, float]:
        """Everything, by name."""
        return {**asdict(self.settings), "p50_ms": self.p50_ms, "p99_ms": self.p99_ms, "ndcg@10": self.ndcg}


@dataclass(frozen=True)
class Asked:
    """Validation users: their preferences, histories, what may not come back, and what they chose next."""

    preferences: Float32[ndarray, "users cond_dim"]
    histories: list[Int32[ndarray, "_"]]
    excluded: list[Int32[ndarray, "_"]]
    targets: list[int]


def measure_latency(run: Run, config: RunConfig, users: int) -> list[Row]:
    """interactions, preferences, models, index, ranking -> latency (a table of settings).

    Raises ArtifactError: an input is missing, or made from another version of another or with other settings.
    """
    require_measured_as_made(run, config)
    artifacts = {name: run.fetch(name) for name in INPUTS}
    for artifact in artifacts.values():
        run.require_made_from(artifact, *(other for other in artifacts.values() if other is not artifact))
    own = load_rank(artifacts, config, split="validation")
    asked = _asked(artifacts, config, users)
    engines = own.retrieve.retriever.dense, own.retrieve.graph.retriever.dense
    rows = []
    with _one_thread():
        for settings in grid(config, own.ranking, tunable=any(map(has_effort, engines))):
            tried = load_rank(artifacts, settings.applied(config), effort=settings.effort, split="validation")
            rows.append(Row(settings, *measured(tried, asked)))
    inputs = {artifact.name: artifact.digest for artifact in artifacts.values()}
    facts = {"users": len(asked.targets), "machine": machine(), "versions": versions()}
    config_hash = section_hash(config, SECTIONS)
    with run.publish(LATENCY, config_hash=config_hash, inputs=inputs, facts=facts) as folder:
        write_text(folder / ROWS, json.dumps([row.values() for row in rows], indent=1) + "\n")
    return rows


def grid(config: RunConfig, ranking: Ranking, *, tunable: bool) -> list[Settings]:
    """The run's own settings first, then with halves and quarters of the draws and of the error's work, and, where the
    index is `tunable`, with less and more effort. What the ranking does not weigh stays as it is: it takes no time."""
    own, drawn = config.diffusion, ranking.generates
    pooled = drawn or ranking.reads_histories
    found = []
    for effort, draws, errors in product(EFFORTS if tunable else EFFORTS[:1], SCALES, SCALES):
        found.append(
            Settings(
                num_draws=_scaled(own.num_draws, draws if drawn else 1),
                sampling_steps=_scaled(own.sampling_steps, draws if drawn and own.sampler != "distilled" else 1),
                error_candidates=_scaled(own.error_candidates, errors if pooled else 1, least=K),
                error_evaluations=_scaled(own.error_evaluations, errors if ranking.error else 1),
                effort=effort,
            )
        )
    return list(dict.fromkeys(found))


def measured(rank: RankStep, asked: Asked) -> tuple[float, float, float]:
    """p50 and p99 in milliseconds, and the mean NDCG@10, over one request of each user."""
    times, gains = [], []
    for place in [*range(min(WARM_UP, len(asked.targets))), *range(len(asked.targets))]:
        rows = slice(place, place + 1)
        started = time.perf_counter()
        (answer,) = rank(asked.preferences[rows], asked.histories[rows], [""], asked.excluded[rows], K)
        times.append(1e3 * (time.perf_counter() - started))
        found = np.flatnonzero(np.array(answer.items) == asked.targets[place])
        gains.append(1 / np.log2(found[0] + 2) if len(found) else 0.0)
    count = len(asked.targets)
    p50, p99 = np.percentile(times[-count:], [50, 99])
    return round(float(p50), 3), round(float(p99), 3), round(float(np.mean(gains[-count:])), 6)


def choose(rows: Sequence[Row], target_p99_ms: float) -> Row:
    """The row of the best NDCG@10 among those within the budget, of equals the fastest.

    Raises ValueError, naming the fastest, where none is.
    """
    within = [row for row in rows if row.p99_ms <= target_p99_ms]
    if not within:
        fastest = min(rows, key=lambda row: row.p99_ms)
        raise ValueError(
            f"serving.target_p99_ms={target_p99_ms:g}: nothing measured is that fast; the fastest has p99 "
            f"{fastest.p99_ms:g} ms, NDCG@10 {fastest.ndcg:g} ({described(fastest.settings)}); allow more, or 0 for no "
            "target"
        )
    return max(within, key=lambda row: (row.ndcg, -row.p99_ms))


def chosen_row(run: Run, config: RunConfig, artifacts: Mapping[str, Artifact]) -> Row | None:
    """What `serving.target_p99_ms` chooses from the run's table; None without a target.

    Raises ArtifactError: no table, or one of other artifacts or settings; ValueError as `choose` does.
    """
    if not config.serving.target_p99_ms:
        return None
    table = run.fetch(LATENCY)
    run.require_made_from(table, *artifacts.values())
    if table.manifest["config_hash"] != section_hash(config, SECTIONS):
        raise ArtifactError(
            f"{run.url}/{LATENCY} was measured with other settings in {', '.join(SECTIONS[:-1])} or {SECTIONS[-1]}; "
            "run `ctd bench latency` with the same --set"
        )
    return choose(read_rows(table.path), config.serving.target_p99_ms)


def load_tuned(
    artifacts: Mapping[str, Artifact], config: RunConfig, settings: Settings | None, live: Live | None = None
) -> RankStep:
    """What is behind the preference, with these settings in the place of the run's own."""
    if settings is None:
        return load_rank(artifacts, config, live)
    return load_rank(artifacts, settings.applied(config), live, settings.effort)


def read_rows(folder: Path) -> list[Row]:
    """The published table."""
    rows = []
    for values in json.loads((folder / ROWS).read_text()):
        times = values.pop("p50_ms"), values.pop("p99_ms"), values.pop("ndcg@10")
        rows.append(Row(Settings(**values), *times))
    return rows


def described(settings: Settings) -> str:
    """The settings on one line."""
    return ", ".join(f"{name}={value:g}" for name, value in asdict(settings).items())


def show_rows(rows: Sequence[Row]) -> None:
    """The table."""
    table = Table()
    for head in rows[0].values():
        table.add_column(head.replace("_", " "), justify="right")
    for row in rows:
        table.add_row(*(f"{value:g}" for value in row.values().values()))
    console.print(table)


def as_json(rows: Sequence[Row], users: int, command: str) -> dict[str, Any]:
    """Everything measured, and where."""
    shown = [row.values() for row in rows]
    return {"rows": shown, "users": users, "machine": machine(), "versions": versions(), "command": command}


def _asked(artifacts: Mapping[str, Artifact], config: RunConfig, users: int) -> Asked:
    log = InteractionLog.load(artifacts["interactions"].path)
    known = Preferences.load(artifacts["preferences"].path, "validation")
    random = np.random.default_rng((config.seed, 31))
    rows = np.sort(random.choice(len(known), min(users, len(known)), replace=False))
    histories = [np.array(log.history(user, "validation")) for user in known.users[rows].tolist()]
    excluded = excluded_items(histories, config.evaluation.mask_seen)
    return Asked(known.vectors[rows], histories, excluded, known.targets[rows].tolist())


def _scaled(own: int, scale: float, least: int = 1) -> int:
    return min(own, max(least, round(own * scale)))


@contextmanager
def _one_thread() -> Iterator[None]:
    """As a replica has it: Serve gives it OMP_NUM_THREADS=1, which numpy's BLAS reads, too."""
    from threadpoolctl import threadpool_limits  # the endpoint, which imports this file, does without it

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with threadpool_limits(1):
            yield
    finally:
        torch.set_num_threads(before)
