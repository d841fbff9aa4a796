"""The graph of what is known of a log, built out of core: counting sort, one chunk of interactions at a time.

Memory: 40 bytes per node and about 100 per interaction of a chunk, however long the log is; the rest is files.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import numpy as np
from jaxtyping import Int32, Int64
from numpy import ndarray
from numpy.lib.format import open_memmap

from ctd_scale.batches import InteractionLog, Split
from ctd_scale.graph.csr import BipartiteGraph, save_sizes

CHUNK = 2_000_000
# Longer than any row: nothing is cut.
NO_CAP = np.iinfo(np.int32).max


def build_graph(
    log: InteractionLog,
    folder: Path,
    *,
    split: Split = "validation",
    timed: bool = False,
    hub_cap: int = NO_CAP,
    chunk: int = CHUNK,
) -> BipartiteGraph:
    """Write the graph of what is known when `split` is asked for, by default of the training split, into `folder` and
    load it from there, memory-mapped.

    `timed` keeps the edges' times and sorts neighbours by them. A node with more than `hub_cap` neighbours hears from
    that many, evenly spaced over all. `chunk` is the number of interactions that are sorted at a time; the history of
    one user, or one row where rows are sorted by time, is never divided. Raises ValueError where there is nothing to
    train on, or where times are missing.
    """
    if timed and log.times is None:
        raise ValueError(
            "graph.time_respecting needs to know when each interaction was, and this log knows only the order within "
            "each user; name a column of timestamps (interactions.order_column) or set graph.time_respecting=false"
        )
    num_users, num_items = log.num_users, log.num_items
    degrees = np.zeros(num_users + num_items, np.int64)
    with tempfile.TemporaryFile(dir=folder) as positives_file, tempfile.TemporaryFile(dir=folder) as times_file:
        for users, items, times in distinct_edges(log, split, chunk):
            np.add.at(degrees, users, 1)
            degrees[num_users:] += np.bincount(items, minlength=num_items)
            (items + np.int32(num_users)).tofile(positives_file)
            if timed:
                times.tofile(times_file)
        num_edges = int(degrees[:num_users].sum())
        if num_edges == 0:
            raise ValueError("the training split has no interactions; a user needs three to have a training item")
        for name, file, dtype in (("positives", positives_file, np.int32), ("positive_times", times_file, np.int64)):
            if file.tell():
                _copy(file, _column(folder, name, dtype, num_edges), chunk)
    _save_starts(folder, "positive_offsets", degrees[:num_users])
    _save_starts(folder, "offsets", np.minimum(degrees, hub_cap))
    np.save(folder / "degrees.npy", degrees.astype(np.int32))
    save_sizes(folder, num_users, num_items)
    _fill_rows(folder, degrees, hub_cap, chunk)
    if timed:
        _sort_rows_by_time(folder, chunk)
    return BipartiteGraph.load(folder)


def distinct_edges(
    log: InteractionLog, split: Split, chunk: int
) -> Iterator[tuple[Int64[ndarray, "edges"], Int32[ndarray, "edges"], Int64[ndarray, "times"]]]:
    """(user_index, item_index, time) of what is known by then, each pair once and as early as it was, by user and then
    item. Times are empty where the log has none."""
    lengths = log.known_lengths(split)
    first = 0
    while first < log.num_users:
        last = max(first + 1, int(np.searchsorted(log.offsets, log.offsets[first] + chunk, side="right")) - 1)
        start, stop = int(log.offsets[first]), int(log.offsets[last])
        items = np.asarray(log.items[start:stop])
        sizes = np.diff(log.offsets[first : last + 1])
        place = np.arange(len(items)) - np.repeat(log.offsets[first:last] - start, sizes)
        kept = np.flatnonzero(place < np.repeat(lengths[first:last], sizes))
        users = np.repeat(np.arange(first, last, dtype=np.int64), sizes)[kept]
        keys, earliest = np.unique(users * log.num_items + items[kept], return_index=True)
        times = np.empty(0, np.int64) if log.times is None else np.asarray(log.times[start:stop])[kept[earliest]]
        yield keys // log.num_items, (keys % log.num_items).astype(np.int32), times
        first = last


def _fill_rows(folder: Path, degrees: Int64[ndarray, "nodes"], hub_cap: int, chunk: int) -> None:
    """Neighbours of both sides, from positives. Edges come by user, so rows end sorted by id."""
    offsets = np.load(folder / "offsets.npy")
    positive_offsets = np.load(folder / "positive_offsets.npy")
    positives = np.load(folder / "positives.npy", mmap_mode="r")
    timed = (folder / "positive_times.npy").exists()
    neighbors = _column(folder, "neighbors", np.int32, int(offsets[-1]))
    if timed:
        positive_times = np.load(folder / "positive_times.npy", mmap_mode="r")
        row_times = _column(folder, "times", np.int64, int(offsets[-1]))
    arrived = np.zeros(len(degrees), np.int64)
    for start in range(0, len(positives), chunk):
        index = np.arange(start, min(start + chunk, len(positives)))
        users, items = np.searchsorted(positive_offsets, index, side="right") - 1, positives[index].astype(np.int64)
        for nodes, others in ((users, items), (items, users)):
            order = np.argsort(nodes, kind="stable")
            nodes, others = nodes[order], others[order]
            begins = np.flatnonzero(np.diff(nodes, prepend=-1))
            counts = np.diff(begins, append=len(nodes))
            arrival = arrived[nodes] + np.arange(len(nodes)) - np.repeat(begins, counts)
            arrived[nodes[begins]] += counts
            # Of d neighbours, `length` are kept: those at which arrival * length / d reaches the next whole number.
            length = np.minimum(degrees[nodes], hub_cap)
            place = arrival * length // degrees[nodes]
            kept = (arrival + 1) * length // degrees[nodes] > place
            target = offsets[nodes[kept]] + place[kept]
            neighbors[target] = others[kept]
            if timed:
                row_times[target] = positive_times[index[order[kept]]]


def _sort_rows_by_time(folder: Path, chunk: int) -> None:
    offsets = np.load(folder / "offsets.npy")
    neighbors = np.load(folder / "neighbors.npy", mmap_mode="r+")
    times = np.load(folder / "times.npy", mmap_mode="r+")
    first = 0
    while first < len(offsets) - 1:
        last = max(first + 1, int(np.searchsorted(offsets, offsets[first] + chunk, side="right")) - 1)
        part = slice(int(offsets[first]), int(offsets[last]))
        rows = np.repeat(np.arange(first, last), np.diff(offsets[first : last + 1]))
        order = np.lexsort((times[part], rows))  # stable: equal times stay sorted by id
        neighbors[part], times[part] = neighbors[part][order], times[part][order]
        first = last


def _column(folder: Path, name: str, dtype: type, length: int) -> ndarray:
    return open_memmap(folder / f"{name}.npy", mode="w+", dtype=dtype, shape=(length,))


def _copy(file: IO[bytes], column: ndarray, chunk: int) -> None:
    file.seek(0)
    for start in range(0, len(column), chunk):
        stop = min(start + chunk, len(column))
        column[start:stop] = np.fromfile(file, column.dtype, stop - start)


def _save_starts(folder: Path, name: str, lengths: Int64[ndarray, "rows"]) -> None:
    np.save(folder / f"{name}.npy", np.concatenate([[0], np.cumsum(lengths)]))
