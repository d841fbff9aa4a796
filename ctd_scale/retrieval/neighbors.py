"""What is chosen next to the items of a history: counted from the log, not learned, so that it knows an interaction as
soon as the log has it.

In a user's sequence item j follows item i with weight `0.8^(d - 1)`, d <= 10 places later, and i stands for j half as
much. With A the sum of these weights over all users, `a_ij = A_ij / sqrt(A_i. A_.j)`; of each item the largest are
kept. A history says `s_j = sqrt(sum_k 0.7^k a_(i_k, j))` of item j, i_k its k-th latest item (k from 0).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numba
import numpy as np
from jaxtyping import Bool, Float32, Int32, Int64
from numpy import ndarray
from scipy.sparse import csr_matrix

from ctd_scale.batches import InteractionLog

WINDOW, FADING, BACKWARDS = 10, 0.8, 0.5
# How much less each earlier item of a history says, and how many of the latest are asked.
EARLIER, RECENT = 0.7, 32
# Items whose neighbours are counted at a time.
BLOCK = 1 << 16
OFFSETS, IDS, WEIGHTS = "neighbor_offsets.npy", "neighbor_ids.npy", "neighbor_weights.npy"

compiled = numba.njit(nogil=True, cache=True, error_model="numpy")


@dataclass(frozen=True)
class ItemNeighbors:
    """`weights` [items, items] float32, a few in each row, ids ascending."""

    weights: csr_matrix

    def after(self, histories: Sequence[Int32[ndarray, "_"]]) -> csr_matrix:
        """[batch, items]: what each history says of the items next to its own; a repeated item counts where it was
        chosen last."""
        recent = np.full((len(histories), RECENT), -1, np.int32)
        for row, history in zip(recent, histories, strict=True):
            latest = history[: -RECENT - 1 : -1]
            row[: len(latest)] = latest
        weights = self.weights
        found = _read(recent, EARLIER ** np.arange(RECENT), weights.indptr, weights.indices, weights.data)
        said = csr_matrix(found, shape=(len(histories), weights.shape[0]), copy=False)
        said.has_sorted_indices = True  # else it would look
        return said

    def save(self, folder: Path) -> None:
        np.save(folder / OFFSETS, self.weights.indptr.astype(np.int64))
        np.save(folder / IDS, self.weights.indices.astype(np.int32))
        np.save(folder / WEIGHTS, self.weights.data)

    @classmethod
    def load(cls, folder: Path) -> ItemNeighbors | None:
        """What `save` wrote, memory-mapped; None where nothing was."""
        if not (folder / OFFSETS).is_file():
            return None
        data, ids, offsets = (np.asarray(np.load(folder / name, mmap_mode="r")) for name in (WEIGHTS, IDS, OFFSETS))
        return cls(csr_matrix((data, ids, offsets), shape=(len(offsets) - 1, len(offsets) - 1), copy=False))


def nearest(
    said: csr_matrix,
    excluded: Sequence[Int32[ndarray, "_"]],
    deleted: Bool[ndarray, "items"] | None,
    size: int,
) -> Int32[ndarray, "batch size"]:
    """The `size` items of which each history says most, of equal ones the first, without what is excluded or deleted;
    ascending by id, padded with -1 where there are fewer."""
    found = np.full((len(excluded), size), -1, np.int32)
    for row, banned in enumerate(excluded):
        part = slice(said.indptr[row], said.indptr[row + 1])
        ids, scores = said.indices[part], said.data[part]
        allowed = ~np.isin(ids, banned)
        if deleted is not None:
            allowed &= ~deleted[ids]
        ids, scores = ids[allowed], scores[allowed]
        if len(ids) > size:
            least = np.partition(scores, -size)[-size]
            better, level = scores > least, np.flatnonzero(scores == least)
            better[level[: size - np.count_nonzero(better)]] = True
            ids = ids[better]
        found[row, : len(ids)] = ids
    return found


def scores_of(said: csr_matrix, ids: Int32[ndarray, "batch pool"]) -> Float32[ndarray, "batch pool"]:
    """What each history says of these items: 0 where nothing, -inf at padding (-1)."""
    scores = np.where(ids >= 0, np.float32(0), np.float32(-np.inf))
    for row, wanted in enumerate(ids):
        part = slice(said.indptr[row], said.indptr[row + 1])
        known, values = said.indices[part], said.data[part]
        if len(known):
            place = np.minimum(np.searchsorted(known, wanted), len(known) - 1)
            here = (known[place] == wanted) & (wanted >= 0)
            scores[row, here] = values[place[here]]
    return scores


def count_neighbors(log: InteractionLog, lengths: Int64[ndarray, "users"], count: int) -> ItemNeighbors:
    """The `count` nearest of each item by the first `lengths` interactions of each user.

    Memory: at most 32 bytes an interaction and 24 for each neighbour that is kept; time in proportion to the former.
    """
    starts = np.concatenate([[0], np.cumsum(lengths)])
    # The known sequences, end to end.
    items = np.asarray(log.items)[_places(log.offsets, lengths, starts)]
    owners = np.repeat(np.arange(len(lengths), dtype=np.int32), lengths)
    fading = FADING ** np.arange(WINDOW)
    given, received = _sums(items, owners, log.num_items, fading, BACKWARDS)
    order = np.argsort(items, kind="stable")
    first = np.concatenate([[0], np.cumsum(np.bincount(items, minlength=log.num_items))])
    blocks, totals = [], [np.zeros(1, np.int64)]
    for start in range(0, log.num_items, BLOCK):
        stop = min(start + BLOCK, log.num_items)
        ids, weights = _block(items, owners, order, first, start, stop, given, received, fading, BACKWARDS, count)
        kept = ids >= 0
        blocks.append((ids[kept], weights[kept]))
        totals.append(kept.sum(axis=1))
    ids, weights = (np.concatenate(parts) for parts in zip(*blocks, strict=True))
    matrix = csr_matrix((weights, ids, np.cumsum(np.concatenate(totals))), shape=(log.num_items, log.num_items))
    return ItemNeighbors(matrix)


def _places(
    offsets: Int64[ndarray, "users+1"], lengths: Int64[ndarray, "users"], starts: Int64[ndarray, "users+1"]
) -> Int64[ndarray, "known"]:
    """Where in the log the first `lengths` interactions of each user are."""
    return np.arange(starts[-1]) + np.repeat(np.asarray(offsets)[:-1] - starts[:-1], lengths)


@compiled
def _read(recent, shares, offsets, ids, weights):  # type: ignore[no-untyped-def]
    """What the items of each row say together, as a sparse matrix (values, ids ascending, where rows start). An item
    counts at its first place; -1 is none. Sums are kept in a hash table, twice as large as what a row can say of."""
    starts, most = np.zeros(len(recent) + 1, np.int64), 0
    for row in range(len(recent)):
        number = 0
        for item in recent[row]:
            if item >= 0:
                number += offsets[item + 1] - offsets[item]
        starts[row + 1] = starts[row] + number
        most = max(most, number)
    size = 4
    while size < 2 * most:
        size *= 2
    keys, sums = np.full(size, -1, np.int32), np.empty(size, np.float64)
    said, values = np.empty(starts[-1], np.int32), np.empty(starts[-1], np.float32)
    end = 0
    for row in range(len(recent)):
        begin = end
        for place in range(recent.shape[1]):
            item = recent[row, place]
            if item < 0 or np.any(recent[row, :place] == item):
                continue
            for near in range(offsets[item], offsets[item + 1]):
                slot = _slot(keys, ids[near])
                if keys[slot] < 0:
                    keys[slot], sums[slot] = ids[near], 0.0
                    said[end] = ids[near]
                    end += 1
                sums[slot] += shares[place] * weights[near]
        said[begin:end] = np.sort(said[begin:end])
        for place in range(begin, end):
            values[place] = np.sqrt(sums[_slot(keys, said[place])])
        keys[:] = -1
        starts[row] = begin
    starts[-1] = end
    return values[:end], said[:end], starts


@compiled
def _slot(keys, key):  # type: ignore[no-untyped-def]
    """Where the key is, or may be put."""
    slot = (np.int64(key) * 2654435761) & (len(keys) - 1)
    while keys[slot] != key and keys[slot] >= 0:
        slot = (slot + 1) & (len(keys) - 1)
    return slot


@compiled
def _sums(items, owners, num_items, fading, backwards):  # type: ignore[no-untyped-def]
    """A_i. and A_.j."""
    given, received = np.zeros(num_items, np.float64), np.zeros(num_items, np.float64)
    for place in range(len(items)):
        for step in range(len(fading)):
            later = place + 1 + step
            if later >= len(items) or owners[later] != owners[place]:
                break
            first, second, weight = items[place], items[later], fading[step]
            given[first] += weight
            received[second] += weight
            given[second] += backwards * weight
            received[first] += backwards * weight
    return given, received


@compiled
def _block(items, owners, order, first, start, stop, given, received, fading, backwards, count):  # type: ignore[no-untyped-def]
    """ids (ascending, -1 where there are fewer) and weights of the `count` nearest of the items start..stop, of equal
    ones the smaller id; `order[first[i] : first[i + 1]]` are the places of item i."""
    ids = np.full((stop - start, count), -1, np.int32)
    weights = np.zeros((stop - start, count), np.float32)
    sums, touched = np.zeros(len(given), np.float64), np.empty(len(given), np.int32)
    for item in range(start, stop):
        number = 0
        for place in order[first[item] : first[item + 1]]:
            for step in range(2 * len(fading)):
                ahead = step < len(fading)
                other = place + 1 + step if ahead else place - 1 - (step - len(fading))
                if other < 0 or other >= len(items) or owners[other] != owners[place]:
                    continue
                near = items[other]
                if sums[near] == 0:
                    touched[number] = near
                    number += 1
                sums[near] += fading[step] if ahead else backwards * fading[step - len(fading)]
        near_ones = np.sort(touched[:number])
        values = np.empty(number, np.float64)
        for place in range(number):
            near = near_ones[place]
            values[place] = sums[near] / np.sqrt(given[item] * received[near])
            sums[near] = 0
        least = 0.0
        if number > count:
            least = np.partition(values, number - count)[number - count]
        left = count - np.sum(values > least)  # of those that are equal to the least
        slot = 0
        for place in range(number):
            if values[place] > least or (values[place] == least and left > 0):
                left -= values[place] == least
                ids[item - start, slot], weights[item - start, slot] = near_ones[place], values[place]
                slot += 1
    return ids, weights
