"""Exact layer-wise propagation over the whole graph: what is published is never a sampled estimate."""

from __future__ import annotations

import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from jaxtyping import Float32
from numpy import ndarray
from numpy.lib.format import open_memmap

from ctd_scale import environment
from ctd_scale.batches import NodeArrays
from ctd_scale.graph import kernels
from ctd_scale.graph.csr import BipartiteGraph


def propagate(
    graph: BipartiteGraph, layer0: Float32[ndarray, "nodes embed_dim"], num_layers: int, chunk: int, scratch: Path
) -> Float32[ndarray, "nodes embed_dim"]:
    """Mean of layers 0 to num_layers, computed for `chunk` nodes at a time and thread, one thread per core.

    Memory: 4 bytes per node and `chunk` rows per thread; layers are files in `scratch`, gone when nobody reads them.
    """
    roots = np.sqrt(np.maximum(graph.degrees, 1), dtype=np.float32)
    starts = range(0, graph.num_nodes, chunk)
    with tempfile.TemporaryDirectory(dir=scratch) as folder:

        def file(name: str) -> ndarray:
            return np.asarray(open_memmap(Path(folder) / name, mode="w+", dtype=np.float32, shape=layer0.shape))

        total, layers = file("total.npy"), [file("odd.npy"), file("even.npy")]
        for start in starts:
            total[start : start + chunk] = layer0[start : start + chunk]

        def rows(start: int, layer: ndarray, following: ndarray, last: bool) -> None:
            stop = min(start + chunk, graph.num_nodes)
            kernels.propagate_rows(start, stop, graph.offsets, graph.neighbors, roots, layer, following[start:stop])
            total[start:stop] += following[start:stop]
            if last:
                total[start:stop] /= np.float32(num_layers + 1)

        layer = np.asarray(layer0)
        with ThreadPoolExecutor(environment.cores()) as pool:
            for number in range(1, num_layers + 1):
                following = layers[number % 2]
                for done in [pool.submit(rows, start, layer, following, number == num_layers) for start in starts]:
                    done.result()
                layer = following
    return total


def split_nodes(graph: BipartiteGraph, embeddings: Float32[ndarray, "nodes embed_dim"]) -> NodeArrays:
    """Users and items apart."""
    return NodeArrays(embeddings[: graph.num_users], embeddings[graph.num_users :])
