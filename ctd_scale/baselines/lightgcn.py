"""LightGCN alone (He et al., 2020): the graph stage's embeddings, ranked by inner product."""

from __future__ import annotations

import numpy as np

from ctd_scale.batches import NodeArrays
from ctd_scale.ranking import Scorer


def lightgcn_scorer(embeddings: NodeArrays) -> Scorer:
    """`e_u . e_i` for all items."""
    users, items = np.asarray(embeddings.users), np.asarray(embeddings.items)
    return lambda chunk, histories: users[chunk] @ items.T
