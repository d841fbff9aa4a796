"""The user-item graph as one symmetric CSR over nodes (users first, then items), memory-mapped from disk."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Int32, Int64, Integer
from numpy import ndarray

OFFSETS, NEIGHBORS, SIZES = "offsets.npy", "neighbors.npy", "sizes.json"


@dataclass(frozen=True)
class BipartiteGraph:
    """Neighbours of node v: `neighbors[offsets[v]:offsets[v + 1]]`, sorted. Repeated interactions are one edge."""

    num_users: int
    num_items: int
    offsets: Int64[ndarray, "offsets"]
    neighbors: Int32[ndarray, "neighbors"]

    @classmethod
    def from_edges(
        cls,
        users: Integer[ndarray, "interactions"],
        items: Integer[ndarray, "interactions"],
        num_users: int,
        num_items: int,
    ) -> BipartiteGraph:
        """Build from (user_index, item_index) pairs."""
        keys = np.unique(users.astype(np.int64) * num_items + items)
        by_user, by_item = keys // num_items, keys % num_items + num_users
        sources = np.concatenate([by_user, by_item])
        targets = np.concatenate([by_item, by_user])
        order = np.lexsort((targets, sources))
        offsets = np.zeros(num_users + num_items + 1, np.int64)
        np.cumsum(np.bincount(sources, minlength=num_users + num_items), out=offsets[1:])
        return cls(num_users, num_items, offsets, targets[order].astype(np.int32))

    @property
    def num_nodes(self) -> int:
        return self.num_users + self.num_items

    @property
    def num_edges(self) -> int:
        """Distinct (user, item) pairs."""
        return len(self.neighbors) // 2

    @cached_property
    def degrees(self) -> Int64[ndarray, "nodes"]:
        return np.diff(self.offsets)

    def edge(self, index: Int64[ndarray, "batch"]) -> tuple[Int64[ndarray, "batch"], Int64[ndarray, "batch"]]:
        """(user node, item node) of the given edges, numbered by user, then item."""
        users = np.searchsorted(self.offsets, index, side="right") - 1
        return users.astype(np.int64), self.neighbors[index].astype(np.int64)

    def has_edge(self, users: Int64[ndarray, "batch"], items: Int64[ndarray, "batch"]) -> Bool[ndarray, "batch"]:
        """Whether each (user node, item node) pair interacted in training: bisection in the users' sorted rows."""
        low, end = self.offsets[users], self.offsets[users + 1]
        high = end.copy()
        last = len(self.neighbors) - 1
        for _ in range(int((high - low).max(initial=0)).bit_length()):
            middle = (low + high) // 2
            below = (low < high) & (self.neighbors[np.minimum(middle, last)] < items)
            low, high = np.where(below, middle + 1, low), np.where(below, high, middle)
        return np.asarray((low < end) & (self.neighbors[np.minimum(low, last)] == items))

    def save(self, folder: Path) -> None:
        np.save(folder / NEIGHBORS, self.neighbors)
        save_frame(folder, self.offsets, self.num_users, self.num_items)

    @classmethod
    def load(cls, folder: Path) -> BipartiteGraph:
        sizes = json.loads((folder / SIZES).read_text())
        return cls(
            sizes["users"],
            sizes["items"],
            np.load(folder / OFFSETS, mmap_mode="r"),
            np.load(folder / NEIGHBORS, mmap_mode="r"),
        )


def save_frame(folder: Path, offsets: Int64[ndarray, "offsets"], num_users: int, num_items: int) -> None:
    """Everything of a graph but its neighbours."""
    np.save(folder / OFFSETS, offsets)
    (folder / SIZES).write_text(json.dumps({"users": num_users, "items": num_items}))
