"""Item-kNN (Sarwar et al., 2001): items that the users of the history's items also chose."""

from __future__ import annotations

import numpy as np
from numpy import ndarray
from scipy.sparse import csr_matrix, vstack

from ctd_scale.baselines.matrix import interaction_matrix
from ctd_scale.batches import InteractionLog, Split
from ctd_scale.config_baselines import ItemKNNConfig
from ctd_scale.ranking import Scorer

# Rows of similarities that exist at a time.
CHUNK = 2048


def item_similarities(log: InteractionLog, config: ItemKNNConfig, split: Split) -> csr_matrix:
    """[items, items]: cosine between the items' columns of the known interactions, each row cut to its nearest.

    `sim_ij = |U_i ∩ U_j| / (sqrt(|U_i| |U_j|) + shrinkage)`: shrinkage takes from pairs that few users share.
    """
    matrix = interaction_matrix(log, split)
    columns = matrix.T.tocsr()
    counts = np.asarray(columns.sum(axis=1)).ravel()
    parts = []
    for start in range(0, log.num_items, CHUNK):
        rows = (columns[start : start + CHUNK] @ matrix).tocoo()
        row, column = rows.row + start, rows.col
        shared = rows.data / (np.sqrt(counts[row] * counts[column]) + config.shrinkage)
        shared[row == column] = 0.0
        parts.append(_nearest(csr_matrix((shared, (rows.row, column)), shape=rows.shape), config.neighbors))
    return vstack(parts).tocsr()


def item_knn_scorer(similarities: csr_matrix) -> Scorer:
    """The sum of the similarities to the items of the history."""

    def scores(users: ndarray, histories: list[ndarray]) -> ndarray:
        lengths = [len(history) for history in histories]
        rows, columns = np.repeat(np.arange(len(histories)), lengths), np.concatenate(histories)
        chosen = csr_matrix((np.ones(len(rows), np.float32), (rows, columns)), (len(histories), similarities.shape[0]))
        chosen.data[:] = 1.0
        return np.asarray((chosen @ similarities).toarray(), np.float32)

    return scores


def _nearest(matrix: csr_matrix, count: int) -> csr_matrix:
    """Each row with its `count` largest values; of equal ones the first."""
    row = np.repeat(np.arange(matrix.shape[0]), np.diff(matrix.indptr))
    order = np.lexsort((matrix.indices, -matrix.data, row))
    place = np.arange(len(row)) - np.repeat(matrix.indptr[:-1], np.diff(matrix.indptr))
    kept = order[place < count]
    return csr_matrix((matrix.data[kept], (row[kept], matrix.indices[kept])), shape=matrix.shape)
