"""The loops over single edges, compiled by Numba; they hold no lock, so a thread samples while another trains.

Randomness is a hash (SplitMix64), not a stream: what is drawn for a node depends on the key, the hop, the node and its
time, and on nothing else that is in the batch. Untyped here because Numba derives the types; callers check shapes.
"""

from __future__ import annotations

import numba
import numpy as np

from ctd_scale.graph.prefetch import AHEAD, prefetch_row

EMPTY = -1
GOLDEN = np.uint64(0x9E3779B97F4A7C15)
MIX_1, MIX_2 = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
SHIFT_1, SHIFT_2, SHIFT_3, HALF = np.uint64(30), np.uint64(27), np.uint64(31), np.uint64(32)

# Numpy's rules for division: Python's check for zero would keep loops from being vectorised.
compiled = numba.njit(nogil=True, cache=True, error_model="numpy")


@compiled
def mix(value):  # type: ignore[no-untyped-def]
    value = (value ^ (value >> SHIFT_1)) * MIX_1
    value = (value ^ (value >> SHIFT_2)) * MIX_2
    return value ^ (value >> SHIFT_3)


@compiled
def earlier(times, start, stop, bound):  # type: ignore[no-untyped-def]
    """How many of the sorted `times[start:stop]` are below `bound`."""
    low, high = start, stop
    while low < high:
        middle = (low + high) // 2
        if times[middle] < bound:
            low = middle + 1
        else:
            high = middle
    return low - start


@compiled
def row_lengths(nodes, groups, offsets, times, bounds):  # type: ignore[no-untyped-def]
    """How many neighbours each node may hear from: all of them, or those before the bound of its group."""
    lengths = np.empty(len(nodes), np.int32)
    for place in range(len(nodes)):
        start, stop = offsets[nodes[place]], offsets[nodes[place] + 1]
        lengths[place] = stop - start
        if len(times):
            lengths[place] = earlier(times, start, stop, bounds[groups[place]])
    return lengths


@compiled
def draw_neighbors(nodes, groups, lengths, offsets, neighbors, bounds, fanout, replace, key):  # type: ignore[no-untyped-def]
    """Neighbour ids, and where those of each node start (the last start is their number).

    Rows up to `fanout` are taken whole. Of longer ones `fanout` are drawn, distinct (Floyd's algorithm) or not.
    """
    starts = np.zeros(len(nodes) + 1, np.int32)
    for place in range(len(nodes)):
        starts[place + 1] = starts[place] + min(lengths[place], fanout)
    picks = np.empty(starts[-1], np.int64)
    for place in range(len(nodes)):
        message, length, start = starts[place], lengths[place], offsets[nodes[place]]
        if length <= fanout:
            for slot in range(length):
                picks[message + slot] = start + slot
        else:
            state = mix(key ^ (np.uint64(nodes[place]) * GOLDEN))
            if len(bounds):
                state = mix(state ^ np.uint64(bounds[groups[place]]))
            for slot in range(fanout):
                state += GOLDEN
                last = length - 1 if replace else length - fanout + slot
                # The high half times the size, shifted down: uniform up to one part in 2^32 / size.
                drawn = start + np.int64(((mix(state) >> HALF) * np.uint64(last + 1)) >> HALF)
                if not replace:
                    for earlier_pick in range(message, message + slot):
                        if picks[earlier_pick] == drawn:
                            drawn = start + last
                            break
                picks[message + slot] = drawn
    # In a loop of its own, so that the processor waits for many neighbours at a time.
    ids = np.empty(len(picks), np.int32)
    for message in range(len(picks)):
        ids[message] = neighbors[picks[message]]
    return ids, starts


@compiled
def find(keys, key):  # type: ignore[no-untyped-def]
    """The slot of a key, or the empty one where it belongs."""
    mask = np.uint64(len(keys) - 1)
    slot = (np.uint64(key) * GOLDEN >> HALF) & mask
    while keys[slot] != key and keys[slot] != EMPTY:
        slot = (slot + np.uint64(1)) & mask
    return slot


@compiled
def relabel(nodes, groups, ids, starts, num_nodes, keys, places):  # type: ignore[no-untyped-def]
    """Append the neighbours that are new in their target's group; give each message the position of its source.

    `keys` and `places` are an open-addressing hash table of a power of two, more than twice as long as nodes and
    messages together; it comes empty and is left empty.
    """
    size = len(nodes)
    grown = np.empty(size + len(ids), np.int32)
    grown_groups = np.empty(size + len(ids), np.int32)
    slots = np.empty(size + len(ids), np.int64)
    sources = np.empty(len(ids), np.int32)
    for place in range(size):
        grown[place], grown_groups[place] = nodes[place], groups[place]
        key = np.int64(groups[place]) * num_nodes + nodes[place]
        slots[place] = find(keys, key)
        keys[slots[place]], places[slots[place]] = key, place
    for target in range(len(nodes)):
        group = groups[target]
        for message in range(starts[target], starts[target + 1]):
            key = np.int64(group) * num_nodes + ids[message]
            slot = find(keys, key)
            if keys[slot] == EMPTY:
                keys[slot], places[slot] = key, size
                grown[size], grown_groups[size], slots[size] = ids[message], group, slot
                size += 1
            sources[message] = places[slot]
    for place in range(size):
        keys[slots[place]] = EMPTY
    return grown[:size].copy(), grown_groups[:size].copy(), sources


@compiled
def add_scaled(row, values, weight):  # type: ignore[no-untyped-def]
    for axis in range(len(row)):
        row[axis] += weight * values[axis]


@compiled
def propagate_rows(start, stop, offsets, neighbors, roots, layer, out):  # type: ignore[no-untyped-def]
    """Nodes start..stop of one LightGCN layer: `out_v = sum_w layer_w root_v / (n_v root_w)`, n_v the length of v's
    row, root the square root of the degree; n_v is the degree unless the row was cut, so the factor estimates the sum
    over all neighbours."""
    for node in range(start, stop):
        first, last = offsets[node], offsets[node + 1]
        row = out[node - start]
        row[:] = 0
        for place in range(first, last):
            if place + AHEAD < len(neighbors):
                prefetch_row(layer, neighbors[place + AHEAD])
            neighbor = neighbors[place]
            add_scaled(row, layer[neighbor], roots[node] / (np.float32(last - first) * roots[neighbor]))


@compiled
def sum_sources(starts, sources, weights, values, out):  # type: ignore[no-untyped-def]
    """`out[t] = sum_e weights[e] values[sources[e]]` over the messages e of target t."""
    for target in range(len(out)):
        row = out[target]
        row[:] = 0
        for message in range(starts[target], starts[target + 1]):
            if message + AHEAD < len(sources):
                prefetch_row(values, sources[message + AHEAD])
            add_scaled(row, values[sources[message]], weights[message])


@compiled
def sum_targets(starts, sources, weights, gradients, out):  # type: ignore[no-untyped-def]
    """The transpose of `sum_sources`: adds `weights[e] gradients[t]` to `out[sources[e]]`."""
    for target in range(len(gradients)):
        row = gradients[target]
        for message in range(starts[target], starts[target + 1]):
            if message + AHEAD < len(sources):
                prefetch_row(out, sources[message + AHEAD])
            add_scaled(out[sources[message]], row, weights[message])


@compiled
def gather_rows(rows, table, out):  # type: ignore[no-untyped-def]
    """`out[place] = table[rows[place]]`"""
    for place in range(len(rows)):
        if place + AHEAD < len(rows):
            prefetch_row(table, rows[place + AHEAD])
        row, target = table[rows[place]], out[place]
        for axis in range(len(row)):  # a slice assignment would first look for overlaps
            target[axis] = row[axis]


@compiled
def adam_rows(rows, gradients, weight, first, second, keep_1, keep_2, take_1, take_2, size, spread, eps):  # type: ignore[no-untyped-def]
    """Adam's step on some rows in place: `weight -= size * first / (sqrt(second) * spread + eps)`."""
    for place in range(len(rows)):
        if place + AHEAD < len(rows):
            ahead = rows[place + AHEAD]
            prefetch_row(weight, ahead)
            prefetch_row(first, ahead)
            prefetch_row(second, ahead)
        gradient, w = gradients[place], weight[rows[place]]
        m, v = first[rows[place]], second[rows[place]]
        for axis in range(len(w)):
            m[axis] = keep_1 * m[axis] + take_1 * gradient[axis]
            v[axis] = keep_2 * v[axis] + take_2 * gradient[axis] * gradient[axis]
            w[axis] -= size * m[axis] / (np.sqrt(v[axis]) * spread + eps)
