"""From good rows to one time-ordered sequence per user: duplicates, k-core, dense indices."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Bool, Int64
from numpy import ndarray

from ctd_scale.batches import Catalogue, InteractionLog


@dataclass(frozen=True)
class Sequences:
    """The log, which of the given rows were dropped as duplicates, and what the k-core took away."""

    log: InteractionLog
    duplicates: Bool[ndarray, "rows"]
    core_interactions: int
    core_users: int
    core_items: int


def build_sequences(
    rows: pa.Table,
    items: pa.Table,
    *,
    duplicates: Literal["keep", "first", "last"] = "keep",
    min_user_interactions: int = 1,
    min_item_interactions: int = 1,
    timed: bool = False,
) -> Sequences:
    """Sort good rows (user_id, item_id, order; in file order) by user and time, and index users and items.

    Users keep the order in which they are first seen, items that of `items` (item_id, title, category). Rows
    of the same time keep their order in the files. With `min_item_interactions` above 1 an item that falls
    short leaves the catalogue too. The log keeps the times if the orders are such (`timed`); it may be empty.
    """
    encoded = pc.dictionary_encode(rows["user_id"].combine_chunks() if len(rows) else pa.array([], pa.string()))
    users = encoded.indices.to_numpy().astype(np.int64)
    indices = pc.index_in(rows["item_id"], value_set=items["item_id"].combine_chunks())
    item_index = indices.to_numpy().astype(np.int64)
    times = rows["order"].to_numpy()
    by_time = np.lexsort((times, users))  # stable: equal times stay in file order
    users, item_index, times = users[by_time], item_index[by_time], times[by_time]

    dropped = np.zeros(len(rows), dtype=bool)
    if duplicates != "keep":
        dropped[by_time] = repeated_pairs(users, item_index, duplicates)
        kept = ~dropped[by_time]
        users, item_index, times = users[kept], item_index[kept], times[kept]
    core = k_core(users, item_index, min_user_interactions, min_item_interactions)
    num_users = len(np.unique(users))
    kept_items = np.arange(len(items))
    if min_item_interactions > 1:
        kept_items = np.unique(item_index[core])
    kept_users, user_index = np.unique(users[core], return_inverse=True)

    catalogue = items.take(pa.array(kept_items))
    log = InteractionLog(
        offsets=np.concatenate([[0], np.cumsum(np.bincount(user_index, minlength=len(kept_users)))]).astype(np.int64),
        items=np.searchsorted(kept_items, item_index[core]).astype(np.int32),
        user_ids=encoded.dictionary.take(pa.array(kept_users)).to_pylist(),
        catalogue=Catalogue(*(catalogue[name].to_pylist() for name in ("item_id", "title", "category"))),
        times=times[core].astype(np.int64) if timed else None,
    )
    return Sequences(
        log,
        dropped,
        core_interactions=int((~core).sum()),
        core_users=num_users - len(kept_users),
        core_items=len(items) - len(kept_items),
    )


def repeated_pairs(
    users: Int64[ndarray, "rows"], items: Int64[ndarray, "rows"], keep: Literal["first", "last"]
) -> Bool[ndarray, "rows"]:
    """True for every row whose (user, item) pair is kept in another row; rows are in time order."""
    # A stable sort by pair keeps the time order inside each run of equal pairs.
    order = np.lexsort((items, users))
    same = (np.diff(users[order]) == 0) & (np.diff(items[order]) == 0)
    repeated = np.zeros(len(users), dtype=bool)
    repeated[order[1:] if keep == "first" else order[:-1]] = same
    return repeated


def k_core(
    users: Int64[ndarray, "rows"], items: Int64[ndarray, "rows"], min_user: int, min_item: int
) -> Bool[ndarray, "rows"]:
    """The largest set of rows in which every user has `min_user` rows and every item `min_item`."""
    alive = np.ones(len(users), dtype=bool)
    while True:
        user_counts = np.bincount(users[alive], minlength=1)
        item_counts = np.bincount(items[alive], minlength=1)
        keep = np.zeros_like(alive)
        keep[alive] = (user_counts[users[alive]] >= min_user) & (item_counts[items[alive]] >= min_item)
        if keep.sum() == alive.sum():
            return alive
        alive = keep
