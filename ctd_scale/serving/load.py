"""`ctd bench serve`: how many requests the endpoint answers in how much time, while more and more ask at once.

First a closed loop: each of n clients sends its next request when it has the answer to the last one. Then an open one
at half of the best rate: requests come at random times, whether or not earlier ones are answered, and each is timed
from when it should have been sent. The clients run on the same cores as the server, so the figures are those of both
together.
"""

from __future__ import annotations

import asyncio
import gc
import itertools
import json
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
from ctd_scale.terminal import console

TIMEOUT_S = 120.0
WATCH_S = 1.0
SETTLE_S, CALM_POLLS = 180.0, 5
SWAP_AFTER = 0.2  # of a level's time: before it, the former run answers


@dataclass(frozen=True)
class Level:
    """What was answered while `clients` asked at once (0: at random times), and another run took over where it was a
    `swap`; milliseconds as the clients saw them."""

    clients: int
    requests: int
    per_second: float
    p50_ms: float
    p95_ms: float
    p99_ms: float
    mean_ms: float
    statuses: dict[str, int]
    versions: dict[str, int]
    replicas: dict[str, int] = field(default_factory=dict)
    swap: bool = False


@dataclass(frozen=True)
class Load:
    """The levels of a ramp, the open loop at half of the best of them, then those in which another run took over; the
    replicas over time; and the same chain called in one process, one request at a time: behind the preference, and all
    of it."""

    levels: list[Level]
    timeline: list[dict[str, float]]
    behind_preference_ms: float
    whole_chain_ms: float


def measure_load(
    run: Run,
    config: RunConfig,
    clients: Sequence[int],
    seconds: float,
    users: int,
    k: int,
    explain: bool,
    swap_to: Run | None = None,
    rest_s: float = 0.0,
) -> Load:
    """Serve a run, ask for every user once, ramp up, ask at half of the best rate once no replica is on its way, then
    by the most clients while `swap_to` takes the run's place, and at that rate while the run takes it back; watch the
    replicas for `rest_s` seconds of silence. The server is stopped afterwards.

    With more time than users their preferences are known, and the LLM rests: what is measured is the way behind it.
    `serving.cached_preferences = 0` lets the LLM read every history.
    """
    from ctd_scale.serving.app import serve_run, shut_down, swap

    recommender = Recommender(run)
    known = [int(user) for user in np.flatnonzero(np.diff(recommender.log.offsets))[:users]]
    behind, whole = in_process(recommender, known, k)
    bodies = [{"user_id": recommender.log.user_ids[user], "k": k, "explain": explain} for user in known]
    del recommender
    gc.collect()
    gc.freeze()  # a pause of the clients is none of the server's
    url = serve_run(lambda: (run, config), host="127.0.0.1", port=0, blocking=False)
    try:
        asyncio.run(ask_each(url, bodies))
        levels, timeline = asyncio.run(ramp(url, bodies, clients, seconds, running_replicas))
        settle(resting)
        rate = max(level.per_second for level in levels) / 2
        levels.append(asyncio.run(paced(url, bodies, rate, seconds)))
        if swap_to is not None:
            with ThreadPoolExecutor(1) as thread:
                swapped = thread.submit(_after, seconds * SWAP_AFTER, swap, swap_to, swap_to.read_config())
                more, further = asyncio.run(ramp(url, bodies, clients[-1:], seconds, running_replicas, swapped.done))
                swapped.result()
                settle(resting)
                back = thread.submit(_after, seconds * SWAP_AFTER, swap, run, config)
                more.append(asyncio.run(paced(url, bodies, rate, seconds, back.done)))
                back.result()
            levels += [replace(level, swap=True) for level in more]
            timeline += _later(timeline, further)
        if rest_s:
            timeline += _later(timeline, asyncio.run(_watched(rest_s, running_replicas)))
    finally:
        shut_down()
    return Load(levels, timeline, 1e3 * behind, 1e3 * whole)


def in_process(recommender: Recommender, users: Sequence[int], k: int) -> tuple[float, float]:
    """Seconds per request of the chain behind the preference, and of all of it, one request at a time."""
    behind, whole = [], []
    for user in users:
        history = recommender.log.full_history(user)
        started = time.perf_counter()
        preference = recommender.preference([history])
        read = time.perf_counter()
        recommender.rank(preference, [history], [""], [np.unique(history)], k)
        ended = time.perf_counter()
        behind.append(ended - read)
        whole.append(ended - started)
    return float(np.median(behind)), float(np.median(whole))


def settle(resting: Callable[[], bool]) -> None:
    """Wait until the replicas that the load before has called for are up, and those that it no longer needs are gone:
    loading one takes the cores from whoever answers."""
    deadline = time.monotonic() + SETTLE_S
    calm = 0
    while calm < CALM_POLLS and time.monotonic() < deadline:
        calm = calm + 1 if resting() else 0
        time.sleep(WATCH_S)


async def ask_each(url: str, bodies: Sequence[dict[str, Any]]) -> None:
    """Every body once, so that preferences are known. Raises aiohttp.ClientResponseError where one is refused."""
    async with _client(url) as client:
        for body in bodies:
            async with client.post("/v1/recommend", json=body) as response:
                response.raise_for_status()


def _client(url: str) -> Any:
    """Asks over as many connections as are wanted at once. Of the clients for asyncio the one that takes the least of
    the cores: 0.15 ms a request, where httpx takes 1.6."""
    import aiohttp

    return aiohttp.ClientSession(
        url, timeout=aiohttp.ClientTimeout(total=TIMEOUT_S), connector=aiohttp.TCPConnector(limit=0)
    )


def _after(seconds: float, function: Callable[..., Any], *arguments: Any) -> Any:
    time.sleep(seconds)
    return function(*arguments)


async def paced(
    url: str,
    bodies: Sequence[dict[str, Any]],
    rate: float,
    seconds: float,
    may_end: Callable[[], bool] = lambda: True,
) -> Level:
    """Requests at random times, `rate` a second (a Poisson process, always the same one), for so many seconds, and
    until `may_end`."""
    random, seen, at = np.random.default_rng(0), _Seen(), 0.0
    asked: list[asyncio.Task[None]] = []
    async with _client(url) as client:
        started = time.perf_counter()
        for body in itertools.cycle(bodies):
            at += float(random.exponential(1 / rate))
            if at > seconds and asked and may_end():
                break
            await asyncio.sleep(max(0.0, started + at - time.perf_counter()))
            asked.append(asyncio.create_task(seen.ask(client, body, started + at)))
        await asyncio.gather(*asked)
        level = seen.level(0, time.perf_counter() - started)
    console.print(
        f"  {rate:.1f} requests/s at random times: p50 {level.p50_ms:.1f} ms, p99 {level.p99_ms:.1f} ms, "
        f"{level.statuses}",
        highlight=False,
    )
    return level


async def ramp(
    url: str,
    bodies: Sequence[dict[str, Any]],
    clients: Sequence[int],
    seconds: float,
    replicas: Callable[[], dict[str, int]],
    may_end: Callable[[], bool] = lambda: True,
) -> tuple[list[Level], list[dict[str, float]]]:
    """Each number of clients for so many seconds, and until `may_end`; `replicas` says how many there are of each
    deployment."""
    timeline: list[dict[str, float]] = []
    async with _client(url) as client:
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
    seen = _Seen()
    started = time.perf_counter()

    async def one() -> None:
        while time.perf_counter() - started < seconds or not may_end():
            await seen.ask(client, next(bodies), time.perf_counter())

    await asyncio.gather(*(one() for _ in range(clients)))
    return seen.level(clients, time.perf_counter() - started)


@dataclass(frozen=True)
class _Seen:
    """What clients have seen so far."""

    times: list[float] = field(default_factory=list)
    statuses: Counter[str] = field(default_factory=Counter)
    versions: Counter[str] = field(default_factory=Counter)

    async def ask(self, client: Any, body: dict[str, Any], since: float) -> None:
        async with client.post("/v1/recommend", json=body) as response:
            answer = await response.read()
        self.times.append(1e3 * (time.perf_counter() - since))
        self.statuses[str(response.status)] += 1
        if response.status == 200:
            self.versions[json.loads(answer)["version"]] += 1

    def level(self, clients: int, elapsed: float) -> Level:
        p50, p95, p99 = (float(value) for value in np.percentile(self.times, [50, 95, 99]))
        count, mean = len(self.times), float(np.mean(self.times))
        return Level(clients, count, count / elapsed, p50, p95, p99, mean, dict(self.statuses), dict(self.versions))


async def _watch(timeline: list[dict[str, float]], replicas: Callable[[], dict[str, int]]) -> None:
    """Replicas of every step, once a second."""
    started = time.perf_counter()
    while True:
        now = await asyncio.to_thread(replicas)
        timeline.append({"second": round(time.perf_counter() - started, 1), **now})
        await asyncio.sleep(WATCH_S)


async def _watched(seconds: float, replicas: Callable[[], dict[str, int]]) -> list[dict[str, float]]:
    """The replicas during so many seconds."""
    timeline: list[dict[str, float]] = []
    watching = asyncio.create_task(_watch(timeline, replicas))
    await asyncio.sleep(seconds)
    watching.cancel()
    return timeline


def _later(timeline: list[dict[str, float]], further: list[dict[str, float]]) -> list[dict[str, float]]:
    """What was seen afterwards, on the clock of the first."""
    begun = timeline[-1]["second"] if timeline else 0.0
    return [{**each, "second": round(begun + each["second"], 1)} for each in further]


def resting() -> bool:
    """Whether no replica of any deployment is starting or stopping."""
    from ray import serve

    from ctd_scale.serving.app import APPLICATION

    deployments = serve.status().applications[APPLICATION].deployments
    return all(each.status == "HEALTHY" and set(each.replica_states) <= {"RUNNING"} for each in deployments.values())


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
        table.add_row(f"{level.clients or 'paced'}{', swap' if level.swap else ''}", *times, answers, replicas)
    console.print(table)
    console.print(
        f"in one process: {load.behind_preference_ms:.1f} ms behind the preference, "
        f"{load.whole_chain_ms:.1f} ms in all",
        highlight=False,
    )


def as_json(load: Load, command: str) -> dict[str, Any]:
    """Everything measured, and where."""
    return {**asdict(load), "machine": machine(), "versions": versions(), "command": command}
