"""Who chose what in training, as a sparse matrix."""

from __future__ import annotations

import numpy as np
from scipy.sparse import csr_matrix

from ctd_scale.batches import InteractionLog


def interaction_matrix(log: InteractionLog) -> csr_matrix:
    """[users, items] float32: 1 where the user chose the item, however often."""
    users, items = log.train_edges()
    chosen = csr_matrix((np.ones(len(users), np.float32), (users, items)), shape=(log.num_users, log.num_items))
    chosen.data[:] = 1.0
    return chosen
