"""Vectors as points that a person can look at."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float32, Float64
from numpy import ndarray


def flattened(vectors: Float32[ndarray, "rows cond_dim"]) -> Float64[ndarray, "rows 2"]:
    """The rows on their first two principal components, scaled into [-1, 1]. Signs are chosen so that the row that is
    farthest out on an axis lies on its positive side: the same vectors give the same picture everywhere."""
    centred = vectors.astype(np.float64) - vectors.mean(axis=0, dtype=np.float64)
    _, _, axes = np.linalg.svd(centred, full_matrices=False)
    points = np.zeros((len(vectors), 2))
    found = centred @ axes[:2].T
    points[:, : found.shape[1]] = found
    farthest = np.abs(points).argmax(axis=0)
    points *= np.where(points[farthest, [0, 1]] < 0, -1.0, 1.0)
    largest: Float64[ndarray, "rows 2"] = points / max(float(np.abs(points).max()), 1e-12)
    return largest
