"""An index that lies in other processes, a shard in each: all are asked at once, and what they find is merged here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from jaxtyping import Float32, Int32
from numpy import ndarray

from ctd_scale.retrieval.dense import unit_vectors
from ctd_scale.retrieval.segments import Found, merged

# Of what a version of a run searches: the vectors of its items, and what its graph says of them.
Part = Literal["items", "graph"]


class Ask(Protocol):
    """What each of the first `shards` shards finds, in their order; it waits for all of them."""

    def __call__(
        self, shards: int, queries: Float32[ndarray, "batch cond_dim"], k: int, effort: float
    ) -> Sequence[Found]: ...


@dataclass(frozen=True)
class RemoteIndex:
    """Shard s holds the items `offsets[s]` to `offsets[s + 1] - 1` and numbers them from 0; each searches `effort`
    times as much of itself as it was calibrated to."""

    ask: Ask
    offsets: Sequence[int]
    effort: float = 1.0

    def search(
        self, queries: Float32[ndarray, "batch cond_dim"], k: int
    ) -> tuple[Int32[ndarray, "batch k"], Float32[ndarray, "batch k"]]:
        """What one index of the same shards in this process finds. Raises ValueError as it does, and what `ask` raises
        where a shard does not answer."""
        found = self.ask(len(self.offsets) - 1, unit_vectors(queries, "query"), k, self.effort)
        return merged(found, self.offsets, k)
