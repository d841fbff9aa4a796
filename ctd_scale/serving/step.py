"""What the deployments have in common: a thread to compute on, and versions that are loaded when they are asked for."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Hashable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Generic, TypeVar

import torch
from ray.serve.handle import DeploymentResponse

# What is served, and what was before: a request that began with the latter ends with it.
KEPT_VERSIONS = 2

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


class Versions(Generic[Version, Loaded]):
    """What `load` gives for a version, loaded beside what is there; of those that are kept, the one that was not asked
    for the longest goes first."""

    def __init__(self, load: Callable[[Version], Awaitable[Loaded]]) -> None:
        self._load, self._loading = load, asyncio.Lock()
        self._kept: OrderedDict[Version, Loaded] = OrderedDict()

    async def of(self, version: Version) -> Loaded:
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
