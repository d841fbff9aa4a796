"""LightGCN alone: the graph stage's embeddings, ranked by inner product."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float32
from numpy import ndarray

from ctd_scale.batches import NodeArrays


def lightgcn_scores(embeddings: NodeArrays, users: ndarray) -> Float32[ndarray, "batch items"]:
    """`e_u . e_i` for all items."""
    return np.asarray(np.asarray(embeddings.users)[users] @ np.asarray(embeddings.items).T)
