"""Indexes that are not of one whole catalogue: several searched as one (the shards of a large one, or a few new items
behind many old ones), or one of some items alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import numpy as np
from jaxtyping import Float32, Int32
from numpy import ndarray

from ctd_scale.retrieval.dense import DenseIndex, ExactIndex, unit_vectors

# Ids, padded with -1, and cosines, with -inf.
Found = tuple[Int32[ndarray, "batch _"], Float32[ndarray, "batch _"]]


@dataclass(frozen=True)
class SegmentedIndex:
    """Segment s holds the items `offsets[s]` to `offsets[s + 1] - 1` and numbers them from 0. One without items is
    never asked.

    Segments are asked one after the other. ScaNN releases the GIL, but threads gain nothing where the other cores have
    work (a batch of 32 over four shards: 2.9 ms with one thread and with two), as they have when serving.

    Raises ValueError: offsets that do not begin with 0, decrease, or are not one more than the segments.
    """

    segments: Sequence[DenseIndex]
    offsets: Sequence[int]

    def __post_init__(self) -> None:
        falling = any(start > stop for start, stop in pairwise(self.offsets))
        if len(self.offsets) != len(self.segments) + 1 or self.offsets[0] != 0 or falling:
            raise ValueError(
                f"offsets={list(self.offsets)} for {len(self.segments)} segments, expected one more than these, from 0 "
                "on and never falling"
            )

    @classmethod
    def of(cls, segments: Sequence[DenseIndex], sizes: Sequence[int]) -> SegmentedIndex:
        """Segments of so many items each."""
        return cls(segments, list(accumulate(sizes, initial=0)))

    def search(
        self, queries: Float32[ndarray, "batch cond_dim"], k: int
    ) -> tuple[Int32[ndarray, "batch k"], Float32[ndarray, "batch k"]]:
        """The k best of what the segments find, equal cosines in index order; over exact segments, exactly the nearest.

        Raises ValueError as the segments do.
        """
        unit = unit_vectors(queries, "query")
        nothing = np.empty((len(queries), 0), dtype=np.int32), np.empty((len(queries), 0), dtype=np.float32)
        sizes = [stop - start for start, stop in pairwise(self.offsets)]
        found = [
            segment.search(unit, min(k, size)) if size else nothing
            for segment, size in zip(self.segments, sizes, strict=True)
        ]
        return merged([nothing, *found], [0, *self.offsets], k)


@dataclass(frozen=True)
class PartialIndex:
    """An index of the items `ids` alone, ascending; the others of the catalogue are never found."""

    index: DenseIndex
    ids: Int32[ndarray, "some"]

    def search(
        self, queries: Float32[ndarray, "batch cond_dim"], k: int
    ) -> tuple[Int32[ndarray, "batch k"], Float32[ndarray, "batch k"]]:
        """The k nearest of these items; -1 and -inf where there are fewer. Raises ValueError as the index does."""
        found, cosines = self.index.search(queries, k)
        return np.where(found >= 0, self.ids[found], np.int32(-1)), cosines


def is_exact(index: DenseIndex) -> bool:
    """Whether every item that can be found is scored."""
    if isinstance(index, PartialIndex):
        return is_exact(index.index)
    if isinstance(index, SegmentedIndex):
        return all(is_exact(segment) for segment in index.segments)
    return isinstance(index, ExactIndex)


def merged(
    found: Sequence[Found], offsets: Sequence[int], k: int
) -> tuple[Int32[ndarray, "batch k"], Float32[ndarray, "batch k"]]:
    """The first k by cosine, then by id, of what segments found, whose items begin at these offsets; what is -1 / -inf
    comes last, and fills up."""
    starts = zip(found, offsets[:-1], strict=True)
    ids = np.concatenate(
        [np.where(own >= 0, own + np.int32(start), np.int32(-1)) for (own, _), start in starts], axis=1
    )
    cosines = np.concatenate([scores for _, scores in found], axis=1)
    order = np.lexsort((ids, -cosines))[:, :k]
    missing = ((0, 0), (0, k - order.shape[1]))
    return (
        np.pad(np.take_along_axis(ids, order, axis=1), missing, constant_values=-1),
        np.pad(np.take_along_axis(cosines, order, axis=1), missing, constant_values=-np.inf),
    )
