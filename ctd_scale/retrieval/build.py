"""Write and read the `index` artifact.

`vectors.npy` (unit length) and `text/`; `cold/`, which places items by their words; `graph/` with `sources.npy`, the
lifted `vectors.npy`, `neighbor_*.npy` (what is chosen next to each item) and, where some items have no interaction,
`connected.npy`: those that have, all as the graph is known when `validation/` is asked for and when `test/` is, which
is served; and beside all vectors `scann/` or `faiss/` for large catalogues (with several shards `scann/0`, `scann/1`,
...).
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float32, Int32, Integer
from numpy import ndarray

from ctd_scale.batches import Catalogue, Split
from ctd_scale.config import RetrievalConfig
from ctd_scale.retrieval.cold import TextProjection, fit_projection
from ctd_scale.retrieval.collaborative import CollaborativeRetriever, graph_sources, lift, read_histories
from ctd_scale.retrieval.dense import DenseIndex, ExactIndex, unit_vectors
from ctd_scale.retrieval.faiss_index import FaissIndex
from ctd_scale.retrieval.hybrid import HybridRetriever
from ctd_scale.retrieval.neighbors import ItemNeighbors
from ctd_scale.retrieval.remote import Ask, Part, RemoteIndex
from ctd_scale.retrieval.scann_index import ScannIndex
from ctd_scale.retrieval.segments import PartialIndex
from ctd_scale.retrieval.text import TextIndex
from ctd_scale.retrieval.tree_index import (
    MIN_TREE_ITEMS,
    TreeIndex,
    load_shards,
    save_shards,
    shard_folders,
    united,
)

VECTORS, SOURCES, TRAINED, CONNECTED = "vectors.npy", "sources.npy", "trained.npy", "connected.npy"
TEXT, GRAPH, COLD = "text", "graph", "cold"
# By folder; the first that can be imported is taken. Neither is, until it builds or loads.
ENGINES: dict[str, type[TreeIndex]] = {"scann": ScannIndex, "faiss": FaissIndex}


def build_index(
    vectors: Float32[ndarray, "items cond_dim"],
    catalogue: Catalogue,
    config: RetrievalConfig,
    folder: Path,
    seed: int,
    queries: Float32[ndarray, "queries cond_dim"] | None = None,
    degrees: Integer[ndarray, "items"] | None = None,
) -> dict[str, Any]:
    """Build the index of a catalogue into `folder`; an engine is calibrated on `queries` where they are given. An item
    of degree 0, which no training interaction has, is placed by its words: as trained it is only what nobody wants.

    Returns the facts of its manifest: engine, recall (recall@10, 1.0 for exact search), items, dim, seconds, cold_items
    and cold_cosine (of vectors by words and trained vectors).
    Raises ValueError: another number of vectors than of items, or an item whose vector has no direction. RuntimeError:
    the engine is not installed.
    """
    if len(vectors) != len(catalogue):
        raise ValueError(
            f"item vectors have {len(vectors)} rows but the catalogue has {len(catalogue)} items; rerun train_llm"
        )
    start = time.perf_counter()
    folder.mkdir(parents=True, exist_ok=True)
    text = TextIndex.build(catalogue)
    text.save(folder / TEXT)
    vectors = unit_vectors(np.asarray(vectors))
    trained = np.ones(len(vectors), bool) if degrees is None else np.asarray(degrees) > 0
    np.save(folder / TRAINED, trained)
    projection = fit_projection(text, vectors, trained, seed)
    projection.save(folder / COLD)
    if not trained.all():
        vectors = np.array(vectors)
        vectors[~trained] = projection(text.counts.tocsr()[~trained])
    engine, recall = _build_dense(vectors, config, folder, seed, queries)
    return {
        "engine": engine,
        "recall": recall,
        "items": len(vectors),
        "dim": vectors.shape[1],
        "cold_items": int((~trained).sum()),
        "cold_cosine": round(projection.cosine, 4),
        "seconds": round(time.perf_counter() - start, 3),
    }


def build_graph_index(
    embeddings: Float32[ndarray, "items embed_dim"],
    degrees: Integer[ndarray, "items"],
    config: RetrievalConfig,
    folder: Path,
    seed: int,
    histories: Sequence[Int32[ndarray, "_"]],
    split: Split = "test",
    neighbors: ItemNeighbors | None = None,
) -> dict[str, Any]:
    """Build what `load_graph_index` reads for the split into the same `folder`; an engine is calibrated on `histories`.

    Of an item of degree 0 the graph knows nothing: it adds nothing to a history, its score is 0, and it is not
    proposed. As trained, such items lie close together, and an engine opened many leaves for them.

    Returns facts of the manifest: graph_engine, graph_recall, graph_seconds.
    """
    start = time.perf_counter()
    target = folder / GRAPH / split
    target.mkdir(parents=True, exist_ok=True)
    connected = np.flatnonzero(degrees).astype(np.int32)
    embeddings = np.where(np.asarray(degrees)[:, None] > 0, embeddings, np.float32(0))
    sources = graph_sources(embeddings, degrees)
    np.save(target / SOURCES, sources)
    if neighbors is not None:
        neighbors.save(target)
    queries = read_histories(sources, histories) if len(histories) else None
    some = connected if len(connected) < len(embeddings) else None
    engine, recall = _build_dense(lift(embeddings), config, target, seed, queries, some)
    return {
        "graph_engine": engine,
        "graph_recall": recall,
        "graph_seconds": round(time.perf_counter() - start, 3),
    }


def load_index(folder: Path, catalogue_size: int, pi: float, ask: Ask | None = None) -> HybridRetriever:
    """The retriever over what `build_index` wrote; vectors and postings are memory-mapped. What is approximate is
    loaded, or, where there is somebody to `ask`, left to the shards that `load_part` loads.

    Raises ValueError: the index has another number of items than the catalogue.
    """
    vectors, dense = _load_dense(folder, ask)
    if len(vectors) != catalogue_size:
        raise ValueError(f"{folder} has {len(vectors)} items but the catalogue has {catalogue_size}; rerun build_index")
    return HybridRetriever(vectors, dense, TextIndex.load(folder / TEXT), pi)


def load_cold(folder: Path) -> tuple[TextProjection, Bool[ndarray, "items"]]:
    """What places an item by its words, and which items training has seen. Raises ValueError where neither is there."""
    if not (folder / TRAINED).is_file():
        raise ValueError(f"{folder} has no {TRAINED}: it was built by an older version; rerun build_index")
    return TextProjection.load(folder / COLD), np.load(folder / TRAINED)


def load_graph_index(folder: Path, split: Split = "test", ask: Ask | None = None) -> CollaborativeRetriever:
    """What `build_graph_index` wrote for this split, loaded as `load_index` does. Raises ValueError where it did
    not."""
    source = folder / GRAPH / split
    if not (source / SOURCES).is_file():
        raise ValueError(f"{folder} holds no {GRAPH}/{split}: it was built by an older version; rerun build_index")
    sources = np.load(source / SOURCES, mmap_mode="r")
    retriever = HybridRetriever(*_load_dense(source, ask), text=None, pi=0.0)
    return CollaborativeRetriever(sources, retriever, ItemNeighbors.load(source))


def _build_dense(
    vectors: Float32[ndarray, "items dim"],
    config: RetrievalConfig,
    folder: Path,
    seed: int,
    queries: Float32[ndarray, "queries dim"] | None,
    some: Int32[ndarray, "some"] | None = None,
) -> tuple[str, float]:
    """Unit vectors, and what searches them (or `some`) where there are many; the engine and its recall@10."""
    vectors = unit_vectors(vectors)
    np.save(folder / VECTORS, vectors)
    if some is not None:
        np.save(folder / CONNECTED, some)
        vectors = vectors[some]
    name = _engine(config, len(vectors))
    if name == "exact":
        return name, 1.0
    shards = ENGINES[name].build_shards(vectors, config.shards, config.target_recall, seed, queries)
    save_shards(shards, folder / name)
    return name, shards[0].recall


def _engine(config: RetrievalConfig, items: int) -> str:
    """What is asked for, or by default the best that there is for so many items. Raises RuntimeError: none."""
    if config.engine != "auto":
        return config.engine
    if items <= max(config.exact_limit, MIN_TREE_ITEMS):
        return "exact"
    for name, engine in ENGINES.items():
        if engine.importable():
            return name
    raise RuntimeError(
        f"neither ScaNN nor faiss can be imported, and {items} items are above retrieval.exact_limit="
        f"{config.exact_limit}; install faiss-cpu (scann has wheels for x86-64 Linux only), or set "
        "retrieval.engine='exact' and wait for a search of all items"
    )


def load_part(folder: Path, part: Part, number: int, of: int) -> dict[int, TreeIndex]:
    """Every `of`-th shard of what is served, from shard `number` on; none where it is searched exactly."""
    source = folder if part == "items" else folder / GRAPH / "test"
    found: dict[int, TreeIndex] = {}
    for name, engine in ENGINES.items():
        if not found and (source / name).is_dir():
            folders = shard_folders(source / name)
            found = {shard: engine.load(folders[shard]) for shard in range(number, len(folders), of)}
    return found


def _load_dense(folder: Path, ask: Ask | None) -> tuple[ndarray, DenseIndex]:
    """The vectors, and what searches them. Raises ValueError: a shard is missing."""
    vectors = np.load(folder / VECTORS, mmap_mode="r")
    if (folder / CONNECTED).is_file():
        some = np.load(folder / CONNECTED)
        return vectors, PartialIndex(_load_engine(folder, len(some), ask) or ExactIndex(vectors[some]), some)
    return vectors, _load_engine(folder, len(vectors), ask) or ExactIndex(vectors)


def _load_engine(folder: Path, items: int, ask: Ask | None) -> DenseIndex | None:
    """What was built for so many items; None: exact search."""
    for name, engine in ENGINES.items():
        if (folder / name).is_dir():
            sizes = [engine.read_settings(each).items for each in shard_folders(folder / name)]
            if (held := sum(sizes)) != items:
                raise ValueError(f"{folder / name} holds {held} of {items} items; rerun build_index")
            if ask is not None:
                return RemoteIndex(ask, list(accumulate(sizes, initial=0)))
            return united(load_shards(engine, folder / name))
    return None
