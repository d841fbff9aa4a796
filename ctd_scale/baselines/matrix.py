"""Who chose what, as a sparse matrix."""

from __future__ import annotations

import numpy as np
from scipy.sparse import csr_matrix

from ctd_scale.batches import InteractionLog, Split


def interaction_matrix(log: InteractionLog, split: Split = "validation") -> csr_matrix:
    """[users, items] float32: 1 where the user chose the item, however often, as far as is known when the split is
    asked for; by default in training."""
    users, items = log.known_edges(split)
    chosen = csr_matrix((np.ones(len(users), np.float32), (users, items)), shape=(log.num_users, log.num_items))
    chosen.data[:] = 1.0
    return chosen
