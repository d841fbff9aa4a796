"""From good rows to one time-ordered sequence per user: duplicates, k-core, dense indices.

The second half of an external sort. Memory: the rows of one part, and about 50 bytes per user and 20 per item.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
from jaxtyping import Bool, Int32, Int64
from numpy import ndarray
from numpy.lib.format import open_memmap

from ctd_scale.batches import ITEM_COLUMNS, Catalogue, InteractionLog
from ctd_scale.interactions.schema import ATTRIBUTE, attributes_of

Pairs = Iterable[tuple[Int64[ndarray, "rows"], Int32[ndarray, "rows"]]]


@dataclass(frozen=True)
class Sequences:
    """The log, how many rows were dropped as duplicates, and what the k-core took away."""

    log: InteractionLog
    duplicates: int
    core_interactions: int
    core_users: int
    core_items: int


@dataclass(frozen=True)
class SortedPart:
    """One part by user and then time; its users are numbered from `first_user` on."""

    first_user: int
    lengths: Int64[ndarray, "users"]
    items: Int32[ndarray, "rows"]
    times: Int64[ndarray, "rows"]

    def users(self) -> Int64[ndarray, "rows"]:
        return np.repeat(np.arange(self.first_user, self.first_user + len(self.lengths)), self.lengths)


def build_sequences(
    parts: Iterable[pa.Table],
    items: pa.Table,
    folder: Path,
    *,
    duplicates: Literal["keep", "first", "last"] = "keep",
    min_user_interactions: int = 1,
    min_item_interactions: int = 1,
    timed: bool = False,
    refuse: Callable[[pa.Table], None] | None = None,
) -> Sequences:
    """Sort good rows (user_id, item, order, place) by user and time, and index users and items.

    All rows of a user are in one part. Users keep the order in which they are first seen (`place`), items that of
    `items` (item_id, title, category, attributes). Rows of the same time keep their order in the files. With
    `min_item_interactions` above 1 an item that falls short leaves the catalogue too. The log keeps the times if the
    orders are such (`timed`); it may be empty, and is backed by files in `folder`. `refuse` is given the duplicates.
    """
    ids: list[pa.Array] = [pa.array([], pa.string())]
    first_seen: list[ndarray] = [np.empty(0, np.int64)]
    made: list[SortedPart] = []
    num_users = dropped = 0
    for rows in parts:
        names, places, repeated, part = _sort_part(rows, num_users, duplicates)
        if refuse is not None and len(repeated):
            refuse(rows.take(pa.array(repeated)))
        made.append(_on_disk(part, folder, len(made), timed))
        ids.append(names)
        first_seen.append(places)
        num_users += len(names)
        dropped += len(repeated)

    def pairs() -> Pairs:
        return ((part.users(), part.items) for part in made)

    kept_users, kept_items = np.ones(num_users, bool), np.ones(len(items), bool)
    if min_user_interactions > 1 or min_item_interactions > 1:
        kept_users, in_core = k_core(pairs, num_users, len(items), min_user_interactions, min_item_interactions)
        kept_items = in_core if min_item_interactions > 1 else kept_items
    else:
        in_core = kept_items
    order = np.argsort(np.concatenate(first_seen))
    order = order[kept_users[order]]
    catalogue = items.filter(pa.array(kept_items))
    item_ids, titles, categories = (catalogue[name].to_pylist() for name in ITEM_COLUMNS)
    numbers = {name.removeprefix(ATTRIBUTE): catalogue[name].to_numpy() for name in attributes_of(catalogue)}
    offsets, log_items, times = _place(made, order, num_users, in_core, np.cumsum(kept_items) - 1, folder, timed)
    log = InteractionLog(
        offsets=offsets,
        items=log_items,
        user_ids=pa.concat_arrays(ids).take(pa.array(order)).to_pylist(),
        catalogue=Catalogue(item_ids, titles, categories, numbers),
        times=times,
    )
    return Sequences(
        log,
        dropped,
        core_interactions=sum(len(part.items) for part in made) - len(log_items),
        core_users=num_users - len(order),
        core_items=len(items) - len(catalogue),
    )


def _sort_part(
    rows: pa.Table, first_user: int, duplicates: Literal["keep", "first", "last"]
) -> tuple[pa.Array, Int64[ndarray, "users"], Int64[ndarray, "repeated"], SortedPart]:
    """User ids, the place where each is first seen, which rows are duplicates, and the other rows, sorted."""
    encoded = rows["user_id"].combine_chunks().dictionary_encode()
    users = encoded.indices.to_numpy().astype(np.int64)
    items, times, places = (rows[name].to_numpy() for name in ("item", "order", "place"))
    first_seen = np.full(len(encoded.dictionary), np.iinfo(np.int64).max)
    np.minimum.at(first_seen, users, places)
    order = np.lexsort((places, times, users))
    repeated = np.empty(0, np.int64)
    if duplicates != "keep":
        again = repeated_pairs(users[order], items[order].astype(np.int64), duplicates)
        repeated, order = order[again], order[~again]
        repeated = repeated[np.argsort(places[repeated])]
    lengths = np.bincount(users[order], minlength=len(first_seen))
    return encoded.dictionary, first_seen, repeated, SortedPart(first_user, lengths, items[order], times[order])


def _on_disk(part: SortedPart, folder: Path, number: int, timed: bool) -> SortedPart:
    np.save(folder / f"items-{number}.npy", part.items)
    times = folder / f"times-{number}.npy"
    if timed:
        np.save(times, part.times)
    return SortedPart(
        part.first_user,
        part.lengths,
        np.load(folder / f"items-{number}.npy", mmap_mode="r"),
        np.load(times, mmap_mode="r") if timed else np.empty(0, np.int64),
    )


def _place(
    parts: Iterable[SortedPart],
    order: Int64[ndarray, "users"],
    num_users: int,
    in_core: Bool[ndarray, "items"],
    item_index: Int64[ndarray, "items"],
    folder: Path,
    timed: bool,
) -> tuple[Int64[ndarray, "offsets"], Int32[ndarray, "interactions"], Int64[ndarray, "interactions"] | None]:
    """(offsets, items, times) of the log whose users are those of `order`."""
    user_index = np.full(num_users, -1)
    user_index[order] = np.arange(len(order))
    lengths = np.zeros(len(order), np.int64)
    for part in parts:
        lengths += np.bincount(_kept(part, user_index, in_core)[1], minlength=len(order))
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    size = (int(offsets[-1]),)
    if not size[0]:
        return offsets, np.empty(0, np.int32), np.empty(0, np.int64) if timed else None
    items = open_memmap(folder / "items.npy", mode="w+", dtype=np.int32, shape=size)
    times = open_memmap(folder / "times.npy", mode="w+", dtype=np.int64, shape=size) if timed else None
    for part in parts:
        kept, index = _kept(part, user_index, in_core)
        begins = np.flatnonzero(np.diff(index, prepend=-1))
        arrival = np.arange(len(index)) - np.repeat(begins, np.diff(begins, append=len(index)))
        target = offsets[index] + arrival
        items[target] = item_index[part.items[kept]]
        if times is not None:
            times[target] = part.times[kept]
    return offsets, items, times


def _kept(
    part: SortedPart, user_index: Int64[ndarray, "users"], in_core: Bool[ndarray, "items"]
) -> tuple[Int64[ndarray, "kept"], Int64[ndarray, "kept"]]:
    """Which rows of the part stay, and the index of their user."""
    index = user_index[part.users()]
    kept = np.flatnonzero((index >= 0) & in_core[part.items])
    return kept, index[kept]


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
    pairs: Callable[[], Pairs], num_users: int, num_items: int, min_user: int, min_item: int
) -> tuple[Bool[ndarray, "users"], Bool[ndarray, "items"]]:
    """Users and items of the largest set of rows in which every user has `min_user` rows and every item `min_item`.

    `pairs` gives all rows (user, item), in chunks, as often as it is called.
    """
    users, items = np.ones(num_users, bool), np.ones(num_items, bool)
    while True:
        user_counts, item_counts = np.zeros(num_users, np.int64), np.zeros(num_items, np.int64)
        for user, item in pairs():
            alive = users[user] & items[item]
            user_counts += np.bincount(user[alive], minlength=num_users)
            item_counts += np.bincount(item[alive], minlength=num_items)
        left = users & (user_counts >= min_user), items & (item_counts >= min_item)
        if left[0].sum() == users.sum() and left[1].sum() == items.sum():
            return left
        users, items = left
