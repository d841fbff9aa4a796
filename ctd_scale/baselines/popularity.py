"""Popularity: every user gets the items with the most training interactions."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float32
from numpy import ndarray

from ctd_scale.batches import InteractionLog


def popularity_scores(log: InteractionLog, users: ndarray) -> Float32[ndarray, "batch items"]:
    """Training interactions per item, the same row for every user."""
    _, items = log.train_edges()
    counts = np.bincount(items, minlength=log.num_items).astype(np.float32)
    return np.tile(counts, (len(users), 1))
