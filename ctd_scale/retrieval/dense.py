"""Nearest neighbours by cosine: exact for catalogues that fit, ScaNN above.

Both answer the same question and are interchangeable. Stored vectors are unit length, so that the dot product
is the cosine; queries are normalised on the way in.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float32, Float64, Int, Int32
from numpy import ndarray

from ctd_scale.metrics import top_k

# Items and numbers of one block of scores: 64 MiB of float32, however large batch and catalogue are.
CHUNK_ITEMS = 65_536
BLOCK_SCORES = 1 << 24
# ScaNN's codebooks have 16 centres; with fewer items there is nothing to train.
MIN_SCANN_ITEMS = 16
CALIBRATION_QUERIES = 256
# A list of ten, and what the pool of candidates asks for: one does not follow from the other.
CALIBRATION_KS = (10, 100)


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
        _require_dim(queries, self.vectors.shape[1])
        return exact_search(self.vectors, unit_vectors(queries, "query"), k, chunk_items=self.chunk_items)


def exact_search(
    vectors: Float32[ndarray, "items cond_dim"],
    queries: Float32[ndarray, "batch cond_dim"],
    k: int,
    *,
    among: Int[ndarray, "some"] | None = None,
    chunk_items: int = CHUNK_ITEMS,
) -> tuple[Int32[ndarray, "batch k"], Float32[ndarray, "batch k"]]:
    """The exact k nearest of unit vectors, of all or `among` some (ascending ids); padded with -1 and -inf."""
    ids = np.full((len(queries), k), -1, dtype=np.int32)
    cosines = np.full((len(queries), k), -np.inf, dtype=np.float32)
    count = len(vectors) if among is None else len(among)
    width = min(k, count)
    for rows in _chunks(len(queries), max(1, BLOCK_SCORES // chunk_items)):
        best = np.empty((len(queries[rows]), 0), dtype=np.int32)
        scores = np.empty((len(queries[rows]), 0), dtype=np.float32)
        for items in _chunks(count, chunk_items):
            block = queries[rows] @ (vectors[items] if among is None else vectors[among[items]]).T
            places, found = top_k(block, min(width, block.shape[1]))
            # What is kept comes first, so that position order is index order among equal cosines.
            best = np.concatenate([best, places + np.int32(items.start)], axis=1)
            scores = np.concatenate([scores, found], axis=1)
            places, scores = top_k(scores, min(width, best.shape[1]))
            best = np.take_along_axis(best, places, axis=1)
        ids[rows, :width] = best if among is None else among[best]
        cosines[rows, :width] = scores
    return ids, cosines


@dataclass(frozen=True)
class ScannSettings:
    """What a calibration chose, and the recalls that it measured."""

    items: int
    dim: int
    leaves: int
    leaves_to_search: int
    reorder: int
    recall: float = 0.0
    recall_at_100: float = 0.0


class ScannIndex:
    """ScaNN: a tree of about sqrt(items) leaves, anisotropic hashing, exact reordering of the best.

    ScaNN's training cannot be repeated bit for bit. Hence every build measures its own recall, and it is the
    saved index, not the recipe, that answers alike everywhere.
    """

    def __init__(self, searcher: Any, settings: ScannSettings) -> None:
        self._searcher = searcher
        self.settings = settings

    @property
    def recall(self) -> float:
        """recall@10 against exact search on the calibration queries."""
        return self.settings.recall

    @classmethod
    def build(
        cls,
        vectors: Float32[ndarray, "items cond_dim"],
        target_recall: float,
        seed: int = 0,
        queries: Float32[ndarray, "queries cond_dim"] | None = None,
        leaves: int = 0,
    ) -> ScannIndex:
        """Train the index, then double the effort of a search until recall@10 and @100 reach `target_recall`.
        `leaves`: of its tree, 0 = sqrt(items).

        They are measured on at most 256 of `queries`, drawn with `seed`. Without queries they are items
        turned by some 40 degrees in a random direction: an item itself is too easy, its own neighbour.
        Raises ValueError: fewer than 16 items, or vectors without a direction. RuntimeError: no ScaNN here.
        """
        if len(vectors) < MIN_SCANN_ITEMS:
            raise ValueError(f"ScaNN needs at least {MIN_SCANN_ITEMS} items, got {len(vectors)}; use ExactIndex")
        vectors = unit_vectors(vectors)
        items, dim = vectors.shape
        leaves = leaves or round(math.sqrt(items))
        searcher = (
            _scann()
            .builder(vectors, CALIBRATION_KS[0], "dot_product")
            .tree(num_leaves=leaves, num_leaves_to_search=leaves, min_partition_size=1)
            .score_ah(min(2, dim), anisotropic_quantization_threshold=0.2)
            .reorder(CALIBRATION_KS[0])
            .build()
        )
        sample = _calibration_queries(vectors, queries, np.random.default_rng(seed))
        settings = ScannSettings(items, dim, leaves, leaves_to_search=leaves, reorder=items)
        return cls(searcher, _calibrate(searcher, settings, ExactIndex(vectors), sample, target_recall))

    def search(
        self, queries: Float32[ndarray, "batch cond_dim"], k: int
    ) -> tuple[Int32[ndarray, "batch k"], Float32[ndarray, "batch k"]]:
        """The k nearest as far as the index finds them; with k >= items, all of them.

        Uses one thread. Raises ValueError: a query without a direction or of another dimension.
        """
        _require_dim(queries, self.settings.dim)
        return _search(self._searcher, self.settings, unit_vectors(queries, "query"), k)

    def save(self, folder: Path) -> None:
        """Write the index; the folder may be moved."""
        folder.mkdir(parents=True, exist_ok=True)
        self._searcher.serialize(str(folder), relative_path=True)
        (folder / "settings.json").write_text(json.dumps(asdict(self.settings), indent=2) + "\n")

    @classmethod
    def load(cls, folder: Path) -> ScannIndex:
        """Read what `save` wrote. Raises ValueError where it cannot be that; RuntimeError: no ScaNN here."""
        if (folder / "scann_docids.pkl").exists():
            raise ValueError(f"{folder} holds scann_docids.pkl, which ScaNN would unpickle and `save` never writes")
        if not (folder / "settings.json").is_file():
            raise ValueError(f"{folder} is no ScaNN index: settings.json is missing; rerun build_index")
        settings = ScannSettings(**json.loads((folder / "settings.json").read_text()))
        return cls(_scann().load_searcher(str(folder), assets_backcompat_shim=False), settings)


def _search(
    searcher: Any, settings: ScannSettings, queries: Float32[ndarray, "batch cond_dim"], k: int
) -> tuple[Int32[ndarray, "batch k"], Float32[ndarray, "batch k"]]:
    ids = np.full((len(queries), k), -1, dtype=np.int32)
    cosines = np.full((len(queries), k), -np.inf, dtype=np.float32)
    width = min(k, settings.items)
    if not ids.size:  # ScaNN refuses an empty batch
        return ids, cosines
    # The settings are for ten neighbours. More of them need that many more candidates, but since neighbours
    # lie together not that many more leaves. The exponent is empirical; calibration holds it to recall@100.
    times = max(1.0, k / CALIBRATION_KS[0])
    found, dots = searcher.search_batched(
        queries,
        final_num_neighbors=width,
        pre_reorder_num_neighbors=min(settings.items, max(width, math.ceil(settings.reorder * times))),
        leaves_to_search=(
            settings.leaves
            if width == settings.items
            else min(settings.leaves, math.ceil(settings.leaves_to_search * times**0.75))
        ),
    )
    real = ~np.isnan(dots)  # where the leaves held fewer items, ScaNN pads with id 0 and NaN
    ids[:, :width] = np.where(real, found.astype(np.int32), -1)
    cosines[:, :width] = np.where(real, dots, -np.inf)
    return ids, cosines


def _calibrate(
    searcher: Any,
    settings: ScannSettings,
    exact: ExactIndex,
    queries: Float32[ndarray, "queries cond_dim"],
    target: float,
) -> ScannSettings:
    """Half of the loss that `target` allows may go to the hashing, the rest to the leaves left out."""
    ks = [min(k, settings.items) for k in CALIBRATION_KS]
    # A neighbour counts by its cosine, not by its id: among equal items it does not matter which comes back.
    _, cosines = exact.search(queries, max(ks))
    needed = [cosines[:, k - 1 : k] - 1e-6 for k in ks]

    def measured(leaves: int, reorder: int) -> ScannSettings:
        trial = replace(settings, leaves_to_search=leaves, reorder=reorder)
        at_10, at_100 = (
            float((_search(searcher, trial, queries, k)[1] >= enough).mean())
            for k, enough in zip(ks, needed, strict=True)
        )
        return replace(trial, recall=at_10, recall_at_100=at_100)

    def worst(trial: ScannSettings) -> float:
        return min(trial.recall, trial.recall_at_100)

    reorder = min(2 * ks[0], settings.items)
    while reorder < settings.items and worst(measured(settings.leaves, reorder)) < (1 + target) / 2:
        reorder = min(2 * reorder, settings.items)
    leaves = 1
    while worst(trial := measured(leaves, reorder)) < target and leaves < settings.leaves:
        leaves = min(2 * leaves, settings.leaves)
    return trial


def _calibration_queries(
    vectors: Float32[ndarray, "items cond_dim"],
    queries: Float32[ndarray, "queries cond_dim"] | None,
    rng: np.random.Generator,
) -> Float32[ndarray, "sample cond_dim"]:
    source = vectors if queries is None else queries
    rows = rng.choice(len(source), size=min(CALIBRATION_QUERIES, len(source)), replace=False)
    sample = source[np.sort(rows)]
    if queries is None:
        noise = rng.standard_normal(sample.shape)
        # Shorter than the item, so that the sum never vanishes.
        noise *= 0.9 / np.linalg.norm(noise, axis=1, keepdims=True)
        sample = (sample + noise).astype(np.float32)
    return unit_vectors(sample, "calibration query")


def _scann() -> Any:
    try:
        from scann.scann_ops.py import scann_ops_pybind
    except ImportError as error:
        raise RuntimeError(
            f"ScaNN cannot be imported ({error}); it has wheels for x86-64 Linux only. Here, raise "
            "retrieval.exact_limit above the number of items, rerun build_index and search exactly"
        ) from error
    return scann_ops_pybind


def _require_dim(queries: Float32[ndarray, "batch cond_dim"], dim: int) -> None:
    if queries.shape[1] != dim:
        raise ValueError(f"queries have {queries.shape[1]} dimensions, the index has {dim}; rerun build_index")


def _chunks(length: int, size: int = CHUNK_ITEMS) -> Iterator[slice]:
    return (slice(start, min(start + size, length)) for start in range(0, length, size))
