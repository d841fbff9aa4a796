"""What the deployments have in common: a thread to compute on, and versions that are loaded beside each other, before
they are asked for.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextvars
import uuid
from collections import OrderedDict, deque
from collections.abc import Awaitable, Callable, Hashable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Generic, TypeVar

import torch
from ray.serve.exceptions import BackPressureError
from ray.serve.handle import DeploymentHandle, DeploymentResponse

from ctd_scale.config_serving import ServingConfig
from ctd_scale.serving.api import UNAVAILABLE
from ctd_scale.serving.release import Source, serving_log

# What is served, and what was before: a request that began with the latter ends with it.
KEPT_VERSIONS = 2
# How soon an endpoint learns of another version, and what it asks about them.
FOLLOW_S, PREPARE_S = 0.25, 1.0
# What passes: nobody is there to answer just now, or all are busy.
TRANSIENT = (BackPressureError, asyncio.TimeoutError, concurrent.futures.TimeoutError, *UNAVAILABLE)

Version = TypeVar("Version", bound=Hashable)
Loaded = TypeVar("Loaded")
Asked = TypeVar("Asked")
Answer = TypeVar("Answer")


class Step:
    """Computes on one thread of its own: calls take turns on the cores, and the event loop stays free to gather
    the next batch."""

    def __init__(self, threads: int) -> None:
        torch.set_num_threads(threads)
        self._thread = ThreadPoolExecutor(max_workers=1)

    async def _compute(self, function: Callable[..., Any], *arguments: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._thread, function, *arguments)


class PreparedStep(Step):
    """A step that others ask about versions. Every replica loads what is to be served next as soon as the coordinator
    says so, and says when it has it: were it loaded when somebody asks for it, everybody would wait for that."""

    async def _keep_prepared(self, coordinator: DeploymentHandle, load: Callable[[Source], Awaitable[object]]) -> None:
        """Load what is served now, and from then on what is next."""
        self._coordinator = coordinator
        source: Source = await coordinator.current.remote(None)
        await load(source)
        self._prepared_for = source.number
        self._following = asyncio.create_task(self._follow(load))

    async def _follow(self, load: Callable[[Source], Awaitable[object]]) -> None:
        me, preparing = uuid.uuid4().hex, None
        while True:
            await asyncio.sleep(PREPARE_S)
            try:
                source = await self._coordinator.next_after.remote(me, self._prepared_for)
            except TRANSIENT:
                continue
            except Exception:  # whatever it is, this goes on
                serving_log.exception("the coordinator cannot be asked what is next")
                continue
            if source is not None and (preparing is None or preparing.done()):
                preparing = asyncio.create_task(self._prepare(source, load))

    async def _prepare(self, source: Source, load: Callable[[Source], Awaitable[object]]) -> None:
        """Load it; what cannot be loaded is given up, and whoever asks for it is told why."""
        try:
            await load(source)
        except TRANSIENT:
            return  # it is tried again
        except Exception:
            serving_log.warning("version %s cannot be loaded here", source.version, exc_info=True)
        self._prepared_for = source.number


class Versions(Generic[Version, Loaded]):
    """What `load` gives for a version, loaded beside what is there, which is given meanwhile; of those that are kept,
    the one that was not asked for the longest goes first, before another is loaded: there is room for no more."""

    def __init__(self, load: Callable[[Version], Awaitable[Loaded]]) -> None:
        self._load, self._loading = load, asyncio.Lock()
        self._kept: OrderedDict[Version, Loaded] = OrderedDict()

    async def of(self, version: Version) -> Loaded:
        if version not in self._kept:
            async with self._loading:
                if version not in self._kept:
                    while len(self._kept) >= KEPT_VERSIONS:
                        self._kept.popitem(last=False)
                    self._kept[version] = await self._load(version)
        self._kept.move_to_end(version)
        return self._kept[version]


class Batches(Generic[Asked, Answer]):
    """What comes while `compute` is at work is what it computes next, `most` at a time; where nothing is, it waits
    `wait_s` for more. Serve's own batches are made up as requests come, each of one, and then wait for their turn.

    Whoever has given up by then is left out; where `compute` fails, all that it was given fail.
    """

    def __init__(self, compute: Callable[[list[Asked]], Awaitable[list[Answer]]], most: int, wait_s: float) -> None:
        self._compute, self._most, self._wait_s = compute, most, wait_s
        self._waiting: deque[tuple[Asked, asyncio.Future[Answer]]] = deque()
        self._working: asyncio.Task[None] | None = None

    async def __call__(self, asked: Asked) -> Answer:
        answer: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        self._waiting.append((asked, answer))
        if self._working is None or self._working.done():
            # Not in the context of the first request, with which Serve gives up whatever is asked in it.
            self._working = contextvars.Context().run(asyncio.create_task, self._work())
        return await answer

    async def _work(self) -> None:
        if self._wait_s:
            await asyncio.sleep(self._wait_s)
        while self._waiting:
            batch = [self._waiting.popleft() for _ in range(min(self._most, len(self._waiting)))]
            batch = [(asked, answer) for asked, answer in batch if not answer.done()]
            if not batch:
                continue
            try:
                found = await self._compute([asked for asked, _ in batch])
            except Exception as error:
                for _, answer in batch:
                    if not answer.done():
                        answer.set_exception(error)
            else:
                for (_, answer), each in zip(batch, found, strict=True):
                    if not answer.done():
                        answer.set_result(each)


async def result_of(response: DeploymentResponse) -> Any:
    """Await a step; where the request is given up, so is the step (Serve alone would let it run on)."""
    try:
        return await response
    except asyncio.CancelledError:
        response.cancel()
        raise


def batched(config: ServingConfig, compute: Callable[[list[Asked]], Awaitable[list[Answer]]]) -> Batches[Asked, Answer]:
    """What comes together is computed together, as `[serving]` says."""
    return Batches(compute, config.max_batch_size, config.batch_wait_ms / 1000)
