"""What the deployments have in common: a thread to compute on, and versions that are loaded beside each other, before
they are asked for.
"""

from __future__ import annotations

import asyncio
import uuid
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Hashable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
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
TRANSIENT = (BackPressureError, asyncio.TimeoutError, *UNAVAILABLE)

Version = TypeVar("Version", bound=Hashable)
Loaded = TypeVar("Loaded")


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
            with suppress(*TRANSIENT):
                source = await self._coordinator.next_after.remote(me, self._prepared_for)
                if source is not None and (preparing is None or preparing.done()):
                    preparing = asyncio.create_task(self._prepare(source, load))

    async def _prepare(self, source: Source, load: Callable[[Source], Awaitable[object]]) -> None:
        """Load it; what cannot be loaded is given up, and whoever asks for it is told why."""
        try:
            await load(source)
        except TRANSIENT:
            return  # it is tried again
        except Exception:
            serving_log.debug("%s", source.version, exc_info=True)
        self._prepared_for = source.number


class Versions(Generic[Version, Loaded]):
    """What `load` gives for a version, loaded beside what is there, which is given meanwhile; of those that are kept,
    the one that was not asked for the longest goes first."""

    def __init__(self, load: Callable[[Version], Awaitable[Loaded]]) -> None:
        self._load, self._loading = load, asyncio.Lock()
        self._kept: OrderedDict[Version, Loaded] = OrderedDict()

    async def of(self, version: Version) -> Loaded:
        if version not in self._kept:
            async with self._loading:
                if version not in self._kept:
                    self._kept[version] = await self._load(version)
        self._kept.move_to_end(version)
        while len(self._kept) > KEPT_VERSIONS:
            self._kept.popitem(last=False)
        return self._kept[version]


async def result_of(response: DeploymentResponse) -> Any:
    """Await a step; where the request is given up, so is the step (Serve alone would let it run on)."""
    try:
        return await response
    except asyncio.CancelledError:
        response.cancel()
        raise


def configure_batches(config: ServingConfig, *methods: Any) -> None:
    """What comes together is computed together."""
    for method in methods:
        method.set_max_batch_size(config.max_batch_size)
        method.set_batch_wait_timeout_s(config.batch_wait_ms / 1000)
