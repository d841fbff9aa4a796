"""ScaNN (Guo et al., 2020), the engine for large catalogues on x86-64 Linux."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from jaxtyping import Float32, Int32
from numpy import ndarray

from ctd_scale.retrieval.tree_index import CALIBRATION_KS, Settings, TreeIndex


@dataclass(frozen=True)
class ScannIndex(TreeIndex):
    """ScaNN: a tree of about sqrt(items) leaves, anisotropic hashing, exact reordering of the best.

    ScaNN's training cannot be repeated bit for bit. Hence every build measures its own recall, and it is the
    saved index, not the recipe, that answers alike everywhere.
    """

    name: ClassVar[str] = "ScaNN"
    package: ClassVar[str] = "scann"
    growth: ClassVar[float] = 0.75

    @classmethod
    def _library(cls) -> Any:
        from scann.scann_ops.py import scann_ops_pybind

        return scann_ops_pybind

    @classmethod
    def _trained(cls, vectors: Float32[ndarray, "items cond_dim"], leaves: int) -> ScannIndex:
        items, dim = vectors.shape
        searcher = (
            cls.library()
            .builder(vectors, CALIBRATION_KS[0], "dot_product")
            .tree(num_leaves=leaves, num_leaves_to_search=leaves, min_partition_size=1)
            .score_ah(min(2, dim), anisotropic_quantization_threshold=0.2)
            .reorder(CALIBRATION_KS[0])
            .build()
        )
        return cls(searcher, Settings(items, dim, leaves, leaves_to_search=leaves, reorder=items))

    def _found(
        self, queries: Float32[ndarray, "batch cond_dim"], k: int, leaves: int, reorder: int
    ) -> tuple[Int32[ndarray, "batch k"], Float32[ndarray, "batch k"]]:
        found, dots = self.searcher.search_batched(
            queries, final_num_neighbors=k, pre_reorder_num_neighbors=reorder, leaves_to_search=leaves
        )
        real = ~np.isnan(dots)  # where the leaves held fewer items, ScaNN pads with id 0 and NaN
        return np.where(real, found.astype(np.int32), np.int32(-1)), np.where(real, dots, np.float32(-np.inf))

    def _write(self, folder: Path) -> None:
        self.searcher.serialize(str(folder), relative_path=True)

    @classmethod
    def _read(cls, folder: Path) -> Any:
        if (folder / "scann_docids.pkl").exists():
            raise ValueError(f"{folder} holds scann_docids.pkl, which ScaNN would unpickle and `save` never writes")
        return cls.library().load_searcher(str(folder), assets_backcompat_shim=False)
