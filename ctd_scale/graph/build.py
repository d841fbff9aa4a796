"""The CSR graph of a log's training split, built out of core: counting sort, one chunk of users at a time.

Memory: 24 bytes per node and about 80 per interaction of a chunk, however long the log is; the rest is files.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from jaxtyping import Int32, Int64
from numpy import ndarray
from numpy.lib.format import open_memmap

from ctd_scale.batches import InteractionLog
from ctd_scale.graph.csr import NEIGHBORS, BipartiteGraph, save_frame

CHUNK = 2_000_000


def build_graph(log: InteractionLog, folder: Path, chunk: int = CHUNK) -> BipartiteGraph:
    """Write the graph of the training split into `folder` and load it from there, memory-mapped.

    `chunk` is the number of interactions that are sorted at a time; one user's history is never cut.
    Raises ValueError where there is nothing to train on.
    """
    num_users, num_items = log.num_users, log.num_items
    degrees = np.zeros(num_users + num_items, np.int64)
    with tempfile.TemporaryFile(dir=folder) as file:
        for users, items in distinct_edges(log, chunk):
            np.add.at(degrees, users, 1)
            degrees[num_users:] += np.bincount(items, minlength=num_items)
            (items + np.int32(num_users)).tofile(file)
        offsets = np.zeros(len(degrees) + 1, np.int64)
        np.cumsum(degrees, out=offsets[1:])
        num_edges = int(offsets[num_users])
        if num_edges == 0:
            raise ValueError("the training split has no interactions; a user needs three to have a training item")
        neighbors = open_memmap(folder / NEIGHBORS, mode="w+", dtype=np.int32, shape=(2 * num_edges,))
        file.seek(0)
        cursor = offsets[num_users:-1].copy()
        for start in range(0, num_edges, chunk):
            stop = min(start + chunk, num_edges)
            by_user = np.fromfile(file, np.int32, stop - start)
            neighbors[start:stop] = by_user
            _scatter(neighbors, cursor, offsets, by_user.astype(np.int64) - num_users, start, num_users)
    neighbors.flush()
    save_frame(folder, offsets, num_users, num_items)
    return BipartiteGraph.load(folder)


def distinct_edges(
    log: InteractionLog, chunk: int
) -> Iterator[tuple[Int64[ndarray, "edges"], Int32[ndarray, "edges"]]]:
    """(user_index, item_index) of the training split, each pair once, by user and then item."""
    lengths = log.train_lengths()
    first = 0
    while first < log.num_users:
        last = max(first + 1, int(np.searchsorted(log.offsets, log.offsets[first] + chunk, side="right")) - 1)
        start = int(log.offsets[first])
        items = np.asarray(log.items[start : int(log.offsets[last])])
        sizes = np.diff(log.offsets[first : last + 1])
        place = np.arange(len(items)) - np.repeat(log.offsets[first:last] - start, sizes)
        kept = place < np.repeat(lengths[first:last], sizes)
        users = np.repeat(np.arange(first, last, dtype=np.int64), sizes)[kept]
        keys = np.unique(users * log.num_items + items[kept])
        yield keys // log.num_items, (keys % log.num_items).astype(np.int32)
        first = last


def _scatter(
    neighbors: ndarray,
    cursor: Int64[ndarray, "items"],
    offsets: Int64[ndarray, "offsets"],
    items: Int64[ndarray, "edges"],
    start: int,
    num_users: int,
) -> None:
    """Put the users of edges start, start + 1, ... into their items' rows, behind those that are there already.

    Chunks come in the order of users, so every row ends sorted.
    """
    users = np.searchsorted(offsets, np.arange(start, start + len(items)), side="right") - 1
    order = np.sort(items * num_users + users)
    items, users = order // num_users, order % num_users
    begins = np.flatnonzero(np.diff(items, prepend=-1))
    counts = np.diff(begins, append=len(items))
    rank = np.arange(len(items)) - np.repeat(begins, counts)
    neighbors[cursor[items] + rank] = users
    cursor[items[begins]] += counts
