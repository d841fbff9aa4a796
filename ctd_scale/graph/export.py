"""Exact layer-wise propagation over the whole graph: what is published is never a sampled estimate."""

from __future__ import annotations

import warnings

import numpy as np
import torch
from jaxtyping import Float32
from numpy import ndarray

from ctd_scale.batches import NodeArrays
from ctd_scale.graph.csr import BipartiteGraph


def propagate(
    graph: BipartiteGraph, layer0: Float32[ndarray, "nodes embed_dim"], num_layers: int, chunk: int
) -> Float32[ndarray, "nodes embed_dim"]:
    """Mean of layers 0 to num_layers, computed for `chunk` nodes at a time.

    Memory: three [nodes, embed_dim] arrays and the edges of one chunk.
    """
    inverse_root = 1.0 / np.sqrt(np.maximum(graph.degrees, 1)).astype(np.float32)
    layer, total = torch.from_numpy(layer0), torch.from_numpy(layer0.copy())
    for _ in range(num_layers):
        following = torch.empty_like(layer)
        for start in range(0, graph.num_nodes, chunk):
            stop = min(start + chunk, graph.num_nodes)
            offsets = np.asarray(graph.offsets[start : stop + 1])
            columns = graph.neighbors[offsets[0] : offsets[-1]].astype(np.int64)
            rows = np.repeat(np.arange(start, stop), np.diff(offsets))
            with warnings.catch_warnings():  # torch calls CSR beta, once per process
                warnings.filterwarnings("ignore", "Sparse", UserWarning)
                adjacency = torch.sparse_csr_tensor(
                    torch.from_numpy(offsets - offsets[0]),
                    torch.from_numpy(columns),
                    torch.from_numpy(inverse_root[rows] * inverse_root[columns]),
                    size=(stop - start, graph.num_nodes),
                )
            following[start:stop] = adjacency @ layer
        layer = following
        total += layer
    return np.asarray((total / (num_layers + 1)).numpy())


def split_nodes(graph: BipartiteGraph, embeddings: Float32[ndarray, "nodes embed_dim"]) -> NodeArrays:
    """Users and items apart."""
    return NodeArrays(embeddings[: graph.num_users], embeddings[graph.num_users :])
