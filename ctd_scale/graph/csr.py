"""The user-item graph, memory-mapped from disk: who hears from whom, and which pairs are positive."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Int32, Int64, Integer
from numpy import ndarray

SIZES = "sizes.json"
ARRAYS = ("degrees", "offsets", "neighbors", "positive_offsets", "positives", "times", "positive_times")
OPTIONAL = ("times", "positive_times")
NO_TIMES: Int64[ndarray, "0"] = np.empty(0, np.int64)


@dataclass(frozen=True)
class BipartiteGraph:
    """Nodes are users first, then items. Repeated interactions are one edge, as old as the first of them.

    Node v hears from `neighbors[offsets[v]:offsets[v + 1]]`, sorted by (time, id), or by id where there are no times.
    A row is as long as the node's degree unless it was cut at the hub cap. The positive items of user u are
    `positives[positive_offsets[u]:positive_offsets[u + 1]]`, sorted by id and never cut.
    """

    num_users: int
    num_items: int
    degrees: Int32[ndarray, "nodes"]
    offsets: Int64[ndarray, "rows"]
    neighbors: Int32[ndarray, "messages"]
    positive_offsets: Int64[ndarray, "user_rows"]
    positives: Int32[ndarray, "edges"]
    # Microseconds since 1970, or of length 0 where the graph keeps no times.
    times: Int64[ndarray, "timed_messages"] = field(default_factory=lambda: NO_TIMES)
    positive_times: Int64[ndarray, "timed_edges"] = field(default_factory=lambda: NO_TIMES)

    @classmethod
    def from_edges(
        cls,
        users: Integer[ndarray, "interactions"],
        items: Integer[ndarray, "interactions"],
        num_users: int,
        num_items: int,
        times: Int64[ndarray, "interactions"] = NO_TIMES,
    ) -> BipartiteGraph:
        """Build at once, in memory, from (user_index, item_index[, time]); `build_graph` is for all that is larger."""
        keys = users.astype(np.int64) * num_items + items
        order = np.lexsort((times, keys) if len(times) else (keys,))
        keys, earliest = np.unique(keys[order], return_index=True)
        times = times[order[earliest]] if len(times) else NO_TIMES
        by_user, by_item = keys // num_items, keys % num_items + num_users
        sources, targets = np.concatenate([by_user, by_item]), np.concatenate([by_item, by_user])
        both = np.concatenate([times, times])
        order = np.lexsort((targets, both, sources) if len(times) else (targets, sources))
        degrees = np.bincount(sources, minlength=num_users + num_items)
        offsets = np.concatenate([[0], np.cumsum(degrees)])
        return cls(
            num_users,
            num_items,
            degrees.astype(np.int32),
            offsets,
            targets[order].astype(np.int32),
            offsets[: num_users + 1],
            by_item.astype(np.int32),
            both[order] if len(times) else NO_TIMES,
            times,
        )

    @property
    def num_nodes(self) -> int:
        return self.num_users + self.num_items

    @property
    def num_edges(self) -> int:
        """Distinct (user, item) pairs."""
        return len(self.positives)

    @property
    def timed(self) -> bool:
        return len(self.positive_times) > 0

    def edge(self, index: Int64[ndarray, "batch"]) -> tuple[Int64[ndarray, "batch"], Int64[ndarray, "batch"]]:
        """(user node, item node) of the given edges, numbered by user, then item."""
        users = np.searchsorted(self.positive_offsets, index, side="right") - 1
        return users.astype(np.int64), self.positives[index].astype(np.int64)

    def has_edge(self, users: Int64[ndarray, "batch"], items: Int64[ndarray, "batch"]) -> Bool[ndarray, "batch"]:
        """Whether each (user node, item node) pair interacted in training: bisection in the users' sorted rows."""
        low, end = self.positive_offsets[users], self.positive_offsets[users + 1]
        high = end.copy()
        last = len(self.positives) - 1
        for _ in range(int((high - low).max(initial=0)).bit_length()):
            middle = (low + high) // 2
            below = (low < high) & (self.positives[np.minimum(middle, last)] < items)
            low, high = np.where(below, middle + 1, low), np.where(below, high, middle)
        return np.asarray((low < end) & (self.positives[np.minimum(low, last)] == items))

    def save(self, folder: Path) -> None:
        for name in ARRAYS:
            if name not in OPTIONAL or len(getattr(self, name)):
                np.save(folder / f"{name}.npy", getattr(self, name))
        save_sizes(folder, self.num_users, self.num_items)

    @classmethod
    def load(cls, folder: Path) -> BipartiteGraph:
        sizes = json.loads((folder / SIZES).read_text())
        # Plain views of the maps: compiled code knows no subclass.
        arrays = {
            name: np.asarray(np.load(folder / f"{name}.npy", mmap_mode="r"))
            for name in ARRAYS
            if name not in OPTIONAL or (folder / f"{name}.npy").exists()
        }
        return cls(sizes["users"], sizes["items"], **arrays)


def save_sizes(folder: Path, num_users: int, num_items: int) -> None:
    (folder / SIZES).write_text(json.dumps({"users": num_users, "items": num_items}))
