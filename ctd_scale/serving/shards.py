"""Large indexes in deployments of their own, which all replicas of the endpoint ask: each of these is then small, and
shards may lie on machines of their own."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from jaxtyping import Float32
from numpy import ndarray
from ray.serve.handle import DeploymentHandle

from ctd_scale.live import load_shards_of
from ctd_scale.retrieval.effort import with_effort
from ctd_scale.retrieval.remote import Ask, Part
from ctd_scale.retrieval.segments import Found
from ctd_scale.retrieval.tree_index import TreeIndex
from ctd_scale.serving.release import AskOf, Index, Source
from ctd_scale.serving.step import PreparedStep, Versions, result_of

Loaded = dict[tuple[Part, int], TreeIndex]


class Shard(PreparedStep):
    """Every `of`-th shard of the indexes that it is asked about, from `number` on."""

    async def __init__(  # type: ignore[misc]
        self, coordinator: DeploymentHandle, number: int, of: int
    ) -> None:
        super().__init__(threads=1)
        self._number, self._of = number, of
        self._indexes: Versions[Index, Loaded] = Versions(self._load)
        await self._keep_prepared(coordinator, self._load_for)

    async def _load_for(self, source: Source) -> None:
        await self.load(source.index)

    async def load(self, index: Index) -> None:
        """Have its shards of this index."""
        await self._indexes.of(index)

    async def search(
        self, index: Index, part: Part, shard: int, queries: Float32[ndarray, "batch dim"], k: int, effort: float
    ) -> Found:
        """What one shard finds."""
        searched = with_effort((await self._indexes.of(index))[part, shard], effort)
        found: Found = await self._compute(searched.search, queries, k)
        return found

    async def _load(self, index: Index) -> Loaded:
        searched, built, _ = index
        source: Source = await self._coordinator.source.remote(searched)
        loaded = await asyncio.to_thread(self._read, source, built)
        gc.freeze()
        return loaded

    def _read(self, source: Source, built: int) -> Loaded:
        own = source.artifacts(("index",))["index"]
        return load_shards_of(source.run, own, built, self._number, self._of)


@dataclass(frozen=True)
class Shards:
    """The deployments, as a replica of the endpoint asks them: in its event loop, from the thread that computes.

    Without any, a replica searches by itself. A run of more shards than deployments has several of them in each.
    """

    deployments: Sequence[DeploymentHandle]
    loop: asyncio.AbstractEventLoop
    timeout_s: float

    async def load(self, index: Index) -> None:
        """Return when every deployment has its shards of this index."""
        await asyncio.gather(*(result_of(each.load.remote(index)) for each in self.deployments))

    @property
    def ask_of(self) -> AskOf | None:
        """How an index is searched; None where there is nobody to ask."""
        return self._ask_of if self.deployments else None

    def _ask_of(self, index: Index, part: Part) -> Ask:
        return partial(self._ask, index, part)

    def _ask(
        self, index: Index, part: Part, shards: int, queries: Float32[ndarray, "batch dim"], k: int, effort: float
    ) -> Sequence[Found]:
        async def ask() -> Sequence[Found]:
            every = (
                result_of(self._of(shard).search.remote(index, part, shard, queries, k, effort))
                for shard in range(shards)
            )
            return await asyncio.wait_for(asyncio.gather(*every), self.timeout_s)

        return asyncio.run_coroutine_threadsafe(ask(), self.loop).result()

    def _of(self, shard: int) -> DeploymentHandle:
        return self.deployments[shard % len(self.deployments)]
