"""`ctd bench serve`: how many requests the endpoint answers in how much time, while more and more ask at once.

A closed loop: each of n clients sends its next request when it has the answer to the last one. The clients run on the
same cores as the server, so the figures are those of both together.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
from rich.table import Table

from ctd_scale.artifacts import Run
from ctd_scale.config import RunConfig
from ctd_scale.environment import machine, versions
from ctd_scale.recommender import Recommender
from ctd_scale.training import console

WATCH_S = 1.0


@dataclass(frozen=True)
class Level:
    """What was answered while `clients` asked at once; milliseconds as the clients saw them."""

    clients: int
    requests: int
    per_second: float
    p50_ms: float
    p95_ms: float
    p99_ms: float
    statuses: dict[str, int]
    versions: dict[str, int]
    replicas: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Load:
    """The levels of a ramp, the replicas over time, and the same chain called in one process."""

    levels: list[Level]
    timeline: list[dict[str, float]]
    in_process_per_second: float
    in_process_ms: float


def measure_load(
    run: Run,
    config: RunConfig,
    clients: Sequence[int],
    seconds: float,
    users: int,
    k: int,
    explain: bool,
    swap_to: Run | None = None,
) -> Load:
    """Serve a run, ask for every user once, then ramp up, at last while `swap_to` takes the run's place; the server is
    stopped afterwards.

    With more time than users their preferences are known, and the LLM rests: what is measured is the way behind it.
    """
    from ctd_scale.serving.app import serve_run, stop_serving, swap

    recommender = Recommender(run)
    known = [int(user) for user in np.flatnonzero(np.diff(recommender.log.offsets))[:users]]
    seconds_in_process = in_process(recommender, known, k)
    bodies = [{"user_id": recommender.log.user_ids[user], "k": k, "explain": explain} for user in known]
    url = serve_run(lambda: (run, config), host="127.0.0.1", port=0, blocking=False)
    try:
        levels, timeline = asyncio.run(ramp(url, bodies, clients, seconds, running_replicas))
        if swap_to is not None:
            with ThreadPoolExecutor(1) as thread:
                swapped = thread.submit(swap, swap_to, swap_to.read_config(), url)
                more, _ = asyncio.run(ramp(url, bodies, clients[-1:], seconds, running_replicas, swapped.done))
                swapped.result()
            levels += more
    finally:
        stop_serving()
    return Load(levels, timeline, 1 / seconds_in_process, 1e3 * seconds_in_process)


def in_process(recommender: Recommender, users: Sequence[int], k: int) -> float:
    """Seconds per request of the chain behind the preference, one request at a time."""
    histories = [recommender.log.full_history(user) for user in users]
    preferences = recommender.preference(histories)
    times = []
    for history, preference in zip(histories, preferences, strict=True):
        started = time.perf_counter()
        recommender.rank(preference[None], [history], [""], [np.unique(history)], k)
        times.append(time.perf_counter() - started)
    return float(np.median(times))


async def ramp(
    url: str,
    bodies: Sequence[dict[str, Any]],
    clients: Sequence[int],
    seconds: float,
    replicas: Callable[[], dict[str, int]],
    may_end: Callable[[], bool] = lambda: True,
) -> tuple[list[Level], list[dict[str, float]]]:
    """Each number of clients for so many seconds, and until `may_end`, after every body was sent once; `replicas` says
    how many there are of each deployment."""
    import httpx

    limits = httpx.Limits(max_connections=max(clients), max_keepalive_connections=max(clients))
    timeline: list[dict[str, float]] = []
    async with httpx.AsyncClient(base_url=url, timeout=120, limits=limits) as client:
        for body in bodies:
            (await client.post("/v1/recommend", json=body)).raise_for_status()
        watching = asyncio.create_task(_watch(timeline, replicas))
        levels = []
        for count in clients:
            level = await _level(client, itertools.cycle(bodies), count, seconds, may_end)
            level = replace(level, replicas=await asyncio.to_thread(replicas))
            levels.append(level)
            console.print(
                f"  {count} clients: {level.per_second:.1f} requests/s, p50 {level.p50_ms:.1f} ms, "
                f"p99 {level.p99_ms:.1f} ms, {level.statuses}",
                highlight=False,
            )
        watching.cancel()
    return levels, timeline


async def _level(
    client: Any, bodies: Iterator[dict[str, Any]], clients: int, seconds: float, may_end: Callable[[], bool]
) -> Level:
    times: list[float] = []
    statuses: Counter[str] = Counter()
    versions: Counter[str] = Counter()
    started = time.perf_counter()

    async def one() -> None:
        while time.perf_counter() - started < seconds or not may_end():
            sent = time.perf_counter()
            response = await client.post("/v1/recommend", json=next(bodies))
            times.append(1e3 * (time.perf_counter() - sent))
            statuses[str(response.status_code)] += 1
            if response.status_code == 200:
                versions[response.json()["version"]] += 1

    await asyncio.gather(*(one() for _ in range(clients)))
    elapsed = time.perf_counter() - started
    p50, p95, p99 = (float(value) for value in np.percentile(times, [50, 95, 99]))
    return Level(clients, len(times), len(times) / elapsed, p50, p95, p99, dict(statuses), dict(versions))


async def _watch(timeline: list[dict[str, float]], replicas: Callable[[], dict[str, int]]) -> None:
    """Replicas of every step, once a second."""
    started = time.perf_counter()
    while True:
        now = await asyncio.to_thread(replicas)
        timeline.append({"second": round(time.perf_counter() - started, 1), **now})
        await asyncio.sleep(WATCH_S)


def running_replicas() -> dict[str, int]:
    """Replicas that answer, by deployment."""
    from ray import serve

    from ctd_scale.serving.app import APPLICATION

    deployments = serve.status().applications[APPLICATION].deployments
    return {name: int(each.replica_states.get("RUNNING", 0)) for name, each in deployments.items()}


def show_load(load: Load) -> None:
    """The levels as a table."""
    table = Table()
    for head in ("clients", "requests/s", "p50 ms", "p95 ms", "p99 ms", "answers", "replicas"):
        table.add_column(head, justify="right")
    for level in load.levels:
        times = [f"{value:.1f}" for value in (level.per_second, level.p50_ms, level.p95_ms, level.p99_ms)]
        answers = ", ".join(f"{count} x {status}" for status, count in level.statuses.items())
        replicas = " ".join(f"{name}:{count}" for name, count in level.replicas.items())
        table.add_row(str(level.clients), *times, answers, replicas)
    console.print(table)
    console.print(
        f"in one process, behind the preference: {load.in_process_per_second:.1f} requests/s, "
        f"{load.in_process_ms:.1f} ms each",
        highlight=False,
    )


def as_json(load: Load, command: str) -> dict[str, Any]:
    """Everything measured, and where."""
    return {**asdict(load), "machine": machine(), "versions": versions(), "command": command}
