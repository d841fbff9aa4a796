"""What the graph says of a history: LightGCN's inner products, searched as cosines.

LightGCN gives a user `u = sum_i e_i / sqrt(d_u d_i)` over the items i that it chose, and scores item j by `u . e_j`.
The same rule reads any history, of a user who is in the graph or not. An inner product favours long vectors, which a
cosine does not; with one more dimension they are the same (Bachrach et al., 2014), and what searches by cosine will do.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float32, Int32, Integer
from numpy import ndarray

from ctd_scale.retrieval.hybrid import HybridRetriever
from ctd_scale.retrieval.neighbors import ItemNeighbors


@dataclass(frozen=True)
class CollaborativeRetriever:
    """`sources` are `e_i / sqrt(d_i)`; `retriever` searches the lifted embeddings [items, embed_dim + 1]; `neighbors`,
    where they were counted, are what is chosen next to each item."""

    sources: Float32[ndarray, "items embed_dim"]
    retriever: HybridRetriever
    neighbors: ItemNeighbors | None = None

    def queries(self, histories: Sequence[Int32[ndarray, "_"]]) -> Float32[ndarray, "batch lifted"]:
        """Each history as a unit vector of the lifted space; repeats count once, as in the graph."""
        return read_histories(self.sources, histories)


def graph_sources(
    embeddings: Float32[ndarray, "items embed_dim"], degrees: Integer[ndarray, "items"]
) -> Float32[ndarray, "items embed_dim"]:
    """What an item adds to a history: `e_i / sqrt(d_i)`, where nobody chose it `e_i`."""
    scale = np.sqrt(np.maximum(degrees, 1), dtype=np.float32)[:, None]
    return np.asarray(embeddings / scale, np.float32)


def lift(embeddings: Float32[ndarray, "items embed_dim"]) -> Float32[ndarray, "items lifted"]:
    """Unit vectors whose cosine with `[u, 0]` is `u . e / (|u| M)`, M the largest length of an embedding."""
    lengths = np.linalg.norm(embeddings.astype(np.float64), axis=1)
    longest = lengths.max(initial=0.0)
    if not np.isfinite(longest) or longest == 0:
        raise ValueError("the collaborative embeddings of the items are all zero, or hold NaN; rerun train_graph")
    rest = np.sqrt(np.maximum(1 - (lengths / longest) ** 2, 0))
    return np.concatenate([embeddings / longest, rest[:, None]], axis=1).astype(np.float32)


def read_histories(
    sources: Float32[ndarray, "items embed_dim"], histories: Sequence[Int32[ndarray, "_"]]
) -> Float32[ndarray, "batch lifted"]:
    """`[u / |u|, 0]` with `u` the sum of the sources of a history's distinct items. Where they cancel out, or there are
    none, the graph says nothing: all items are then ranked from the least usual on."""
    queries = np.zeros((len(histories), sources.shape[1] + 1), np.float32)
    for query, history in zip(queries, histories, strict=True):
        query[:-1] = sources[np.unique(history)].sum(axis=0)
        length = np.linalg.norm(query)
        if length > 0:
            query /= length
        else:
            query[-1] = 1.0
    return queries
