"""Write and read the `index` artifact: vectors.npy (unit length), text/, and scann/ for large catalogues."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32
from numpy import ndarray

from ctd_scale.batches import Catalogue
from ctd_scale.config import RetrievalConfig
from ctd_scale.retrieval.dense import MIN_SCANN_ITEMS, DenseIndex, ExactIndex, ScannIndex, unit_vectors
from ctd_scale.retrieval.hybrid import HybridRetriever
from ctd_scale.retrieval.text import TextIndex


def build_index(
    vectors: Float32[ndarray, "items cond_dim"],
    catalogue: Catalogue,
    config: RetrievalConfig,
    folder: Path,
    seed: int,
    queries: Float32[ndarray, "queries cond_dim"] | None = None,
) -> dict[str, Any]:
    """Build the index of a catalogue into `folder`; ScaNN is calibrated on `queries` where they are given.

    Returns the facts of its manifest: engine, recall (recall@10, 1.0 for exact search), items, dim, seconds.
    Raises ValueError: another number of vectors than of items, or an item whose vector has no direction.
    """
    if len(vectors) != len(catalogue):
        raise ValueError(
            f"item vectors have {len(vectors)} rows but the catalogue has {len(catalogue)} items; rerun train_llm"
        )
    start = time.perf_counter()
    folder.mkdir(parents=True, exist_ok=True)
    vectors = unit_vectors(vectors)
    np.save(folder / "vectors.npy", vectors)
    TextIndex.build(catalogue).save(folder / "text")
    engine, recall = "exact", 1.0
    if len(vectors) > max(config.exact_limit, MIN_SCANN_ITEMS):
        index = ScannIndex.build(vectors, config.target_recall, seed, queries)
        index.save(folder / "scann")
        engine, recall = "scann", index.recall
    return {
        "engine": engine,
        "recall": recall,
        "items": len(vectors),
        "dim": vectors.shape[1],
        "seconds": round(time.perf_counter() - start, 3),
    }


def load_index(folder: Path, catalogue_size: int, pi: float) -> HybridRetriever:
    """The retriever over what `build_index` wrote; vectors and postings are memory-mapped.

    Raises ValueError: the index has another number of items than the catalogue.
    """
    vectors = np.load(folder / "vectors.npy", mmap_mode="r")
    if len(vectors) != catalogue_size:
        raise ValueError(f"{folder} has {len(vectors)} items but the catalogue has {catalogue_size}; rerun build_index")
    scann = folder / "scann"
    dense: DenseIndex = ScannIndex.load(scann) if scann.is_dir() else ExactIndex(vectors)
    return HybridRetriever(vectors, dense, TextIndex.load(folder / "text"), pi)
