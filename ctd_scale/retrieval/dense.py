"""Nearest neighbours by cosine: what every engine answers, and the exact one.

Engines are interchangeable. Stored vectors are unit length, so that the dot product is the cosine; queries are
normalised on the way in.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float32, Float64, Int, Int32
from numpy import ndarray

from ctd_scale.metrics import top_k
from ctd_scale.retrieval.grown import GrownVectors

# Items and numbers of one block of scores: 64 MiB of float32, however large batch and catalogue are.
CHUNK_ITEMS = 65_536
BLOCK_SCORES = 1 << 24
# Items that are sorted first, in numbers of k: what is not above the worst of the k found there needs no sorting.
FIRST_ITEMS, FIRST_PER_K = 4096, 8


@runtime_checkable
class DenseIndex(Protocol):
    """What the hybrid retriever asks of a dense engine."""

    def search(
        self, queries: Float32[ndarray, "batch cond_dim"], k: int
    ) -> tuple[Int32[ndarray, "batch k"], Float32[ndarray, "batch k"]]:
        """The k nearest items and their cosines, descending; id -1 and score -inf where fewer were found."""
        ...


def unit_vectors(vectors: Float32[ndarray, "rows cond_dim"], name: str = "item") -> Float32[ndarray, "rows cond_dim"]:
    """The rows scaled to unit length; the array itself where they have it already.

    Raises ValueError, naming the row: a zero vector, which has no direction, or one with NaN or infinity.
    """
    norms: Float64[ndarray, "rows"] = np.empty(len(vectors))
    for rows in _chunks(len(vectors)):
        # In float64 the norm of finite float32 numbers neither overflows nor vanishes.
        norms[rows] = np.linalg.norm(vectors[rows].astype(np.float64), axis=1)
    bad = np.flatnonzero(~np.isfinite(norms) | (norms == 0))
    if bad.size:
        problem = "is a zero vector" if norms[bad[0]] == 0 else "holds NaN or infinity"
        raise ValueError(
            f"the vector of {name} {bad[0]} {problem} ({bad.size} such in all); a cosine needs a direction"
        )
    if np.allclose(norms, 1.0, rtol=0.0, atol=1e-6):
        return vectors
    unit = np.empty(vectors.shape, dtype=np.float32)
    for rows in _chunks(len(vectors)):
        unit[rows] = vectors[rows] / norms[rows, None]
    return unit


class ExactIndex:
    """Every item is scored; memory is bounded by blocks of queries and items."""

    def __init__(self, vectors: Float32[ndarray, "items cond_dim"], chunk_items: int = CHUNK_ITEMS) -> None:
        """Raises ValueError as `unit_vectors` does."""
        self.vectors = unit_vectors(vectors)
        self.chunk_items = chunk_items

    def search(
        self, queries: Float32[ndarray, "batch cond_dim"], k: int
    ) -> tuple[Int32[ndarray, "batch k"], Float32[ndarray, "batch k"]]:
        """The exact k nearest; equal cosines in index order.

        Raises ValueError: a query without a direction or of another dimension.
        """
        require_dim(queries, self.vectors.shape[1])
        return exact_search(self.vectors, unit_vectors(queries, "query"), k, chunk_items=self.chunk_items)


def exact_search(
    vectors: Float32[ndarray, "items cond_dim"] | GrownVectors,
    queries: Float32[ndarray, "batch cond_dim"],
    k: int,
    *,
    among: Int[ndarray, "some"] | None = None,
    chunk_items: int = CHUNK_ITEMS,
) -> tuple[Int32[ndarray, "batch k"], Float32[ndarray, "batch k"]]:
    """The exact k nearest of unit vectors, of all or `among` some (ascending ids); padded with -1 and -inf.

    Once k are found, only the scores above the worst of them are looked at, which soon are few.
    """
    ids = np.full((len(queries), k), -1, dtype=np.int32)
    cosines = np.full((len(queries), k), -np.inf, dtype=np.float32)
    count = len(vectors) if among is None else len(among)
    width = min(k, count)
    if width == 0:
        return ids, cosines
    for rows in _chunks(len(queries), max(1, BLOCK_SCORES // chunk_items)):
        best = np.empty((len(queries[rows]), 0), dtype=np.int32)
        scores = np.empty((len(queries[rows]), 0), dtype=np.float32)
        for items in _first_and_chunks(count, min(max(FIRST_ITEMS, FIRST_PER_K * k), chunk_items), chunk_items):
            block = queries[rows] @ (vectors[items] if among is None else vectors[among[items]]).T
            if best.shape[1] < width:
                places, found = top_k(block, min(width, block.shape[1]))
            else:
                places, found = _above(block, scores[:, -1])
            # What is kept comes first, so that position order is index order among equal cosines.
            best = np.concatenate([best, places + np.int32(items.start)], axis=1)
            scores = np.concatenate([scores, found], axis=1)
            places, scores = top_k(scores, min(width, best.shape[1]))
            best = np.take_along_axis(best, places, axis=1)
        ids[rows, :width] = best if among is None else among[best]
        cosines[rows, :width] = scores
    return ids, cosines


def _above(
    block: Float32[ndarray, "batch items"], edges: Float32[ndarray, "batch"]
) -> tuple[Int32[ndarray, "batch most"], Float32[ndarray, "batch most"]]:
    """Of each row what is above its edge, in index order; padded with score -inf."""
    flat = np.flatnonzero(block > edges[:, None])
    rows, columns = np.divmod(flat, block.shape[1])
    counts = np.bincount(rows, minlength=len(block))
    filled = np.arange(counts.max(initial=0)) < counts[:, None]
    places, scores = np.zeros(filled.shape, dtype=np.int32), np.full(filled.shape, -np.inf, dtype=np.float32)
    places[filled], scores[filled] = columns, block.ravel()[flat]
    return places, scores


def require_dim(queries: Float32[ndarray, "batch cond_dim"], dim: int) -> None:
    if queries.shape[1] != dim:
        raise ValueError(f"queries have {queries.shape[1]} dimensions, the index has {dim}; rerun build_index")


def _first_and_chunks(length: int, first: int, size: int) -> Iterator[slice]:
    yield slice(0, min(first, length))
    yield from (slice(start, min(start + size, length)) for start in range(first, length, size))


def _chunks(length: int, size: int = CHUNK_ITEMS) -> Iterator[slice]:
    return (slice(start, min(start + size, length)) for start in range(0, length, size))
