"""faiss (Douze et al., 2024), the engine for large catalogues where ScaNN has no wheel."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from jaxtyping import Float32, Int32
from numpy import ndarray

from ctd_scale.retrieval.tree_index import Settings, TreeIndex

FILE = "index.faiss"


@dataclass(frozen=True)
class FaissIndex(TreeIndex):
    """faiss' IVF-Flat: the vectors as they are, in about sqrt(items) leaves.

    Every score is exact, so that nothing is reordered, and any dimension will do. Codes of 4 bits (IVF-PQ, refined)
    gave 38,000 queries/s at a recall of 0.90, and these 36,000 at 0.99 (200,000 clustered vectors of 64 dimensions).
    """

    name: ClassVar[str] = "faiss"
    package: ClassVar[str] = "faiss-cpu"
    growth: ClassVar[float] = 0.9

    @classmethod
    def _library(cls) -> Any:
        if platform.system() == "Darwin":
            # torch brings another copy of the OpenMP runtime, and the second to be loaded would end the process. faiss
            # keeps to one thread here, so that it starts none of its own.
            os.environ.setdefault("KMP_DUPLICATE_LIB_OK", "TRUE")
        import faiss

        return faiss

    @classmethod
    def _trained(cls, vectors: Float32[ndarray, "items cond_dim"], leaves: int) -> FaissIndex:
        faiss, (items, dim) = cls.library(), vectors.shape
        searcher = faiss.IndexIVFFlat(faiss.IndexFlatIP(dim), dim, leaves, faiss.METRIC_INNER_PRODUCT)
        searcher.cp.min_points_per_centroid = 1  # it would warn about small catalogues
        with _one_thread(faiss):
            searcher.train(vectors)
            searcher.add(vectors)
        return cls(searcher, Settings(items, dim, leaves, leaves_to_search=leaves, reorder=0))

    def _found(
        self, queries: Float32[ndarray, "batch cond_dim"], k: int, leaves: int, reorder: int
    ) -> tuple[Int32[ndarray, "batch k"], Float32[ndarray, "batch k"]]:
        faiss = self.library()
        with _one_thread(faiss):
            dots, found = self.searcher.search(queries, k, params=faiss.SearchParametersIVF(nprobe=leaves))
        # Where the leaves held fewer items, faiss pads with id -1 and the lowest float.
        return found.astype(np.int32), np.where(found >= 0, dots, np.float32(-np.inf))

    def _write(self, folder: Path) -> None:
        self.library().write_index(self.searcher, str(folder / FILE))

    @classmethod
    def _read(cls, folder: Path) -> Any:
        return cls.library().read_index(str(folder / FILE))


@contextmanager
def _one_thread(faiss: Any) -> Iterator[None]:
    """faiss would take every core: who serves has given them to others, and who builds wants the same index again."""
    threads = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)
    try:
        yield
    finally:
        faiss.omp_set_num_threads(threads)
