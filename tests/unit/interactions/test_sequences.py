"""Duplicates, k-core, order, indices and split against plain Python."""

from __future__ import annotations

from collections import Counter, defaultdict
from typing import Literal

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ctd_scale.interactions.sequences import Sequences, build_sequences, k_core, repeated_pairs

Row = tuple[str, str, int]
ITEMS = list("abcdefgh")
ROWS = st.lists(
    st.tuples(st.sampled_from(["u", "v", "w", "x", "y"]), st.sampled_from(ITEMS), st.integers(-3, 3)),
    max_size=40,
)


def build(
    rows: list[Row],
    duplicates: Literal["keep", "first", "last"] = "keep",
    min_user: int = 1,
    min_item: int = 1,
) -> Sequences:
    columns = {name: [row[place] for row in rows] for place, name in enumerate(("user_id", "item_id", "order"))}
    schema = pa.schema([("user_id", pa.string()), ("item_id", pa.string()), ("order", pa.int64())])
    items = pa.table({"item_id": ITEMS, "title": [f"title {item}" for item in ITEMS], "category": [""] * len(ITEMS)})
    return build_sequences(
        pa.table(columns, schema=schema),
        items,
        duplicates=duplicates,
        min_user_interactions=min_user,
        min_item_interactions=min_item,
    )


def plain_core(rows: list[Row], min_user: int, min_item: int) -> list[Row]:
    while True:
        users, items = Counter(row[0] for row in rows), Counter(row[1] for row in rows)
        kept = [row for row in rows if users[row[0]] >= min_user and items[row[1]] >= min_item]
        if len(kept) == len(rows):
            return kept
        rows = kept


def plain_sequences(rows: list[Row], duplicates: str, min_user: int, min_item: int) -> dict[str, list[str]]:
    rows = sorted(rows, key=lambda row: row[2])
    if duplicates != "keep":
        walk = rows if duplicates == "first" else rows[::-1]
        kept: dict[tuple[str, str], Row] = {}
        for row in walk:
            kept.setdefault(row[:2], row)
        rows = list(kept.values()) if duplicates == "first" else list(kept.values())[::-1]
    sequences: dict[str, list[str]] = defaultdict(list)
    for user, item, _ in plain_core(rows, min_user, min_item):
        sequences[user].append(item)
    return dict(sequences)


def named(made: Sequences) -> dict[str, list[str]]:
    log = made.log
    return {
        name: [log.catalogue.item_ids[item] for item in log.full_history(user)]
        for user, name in enumerate(log.user_ids)
    }


@settings(deadline=None)
@given(ROWS, st.sampled_from(["keep", "first", "last"]), st.integers(1, 4), st.integers(1, 4))
def test_sequences_equal_plain_python(
    rows: list[Row], duplicates: Literal["keep", "first", "last"], min_user: int, min_item: int
) -> None:
    made = build(rows, duplicates, min_user, min_item)
    expected = plain_sequences(rows, duplicates, min_user, min_item)
    assert named(made) == expected
    seen = dict.fromkeys(row[0] for row in rows)
    assert made.log.user_ids == [user for user in seen if user in expected]
    present = {item for sequence in expected.values() for item in sequence}
    assert made.log.catalogue.item_ids == [item for item in ITEMS if min_item == 1 or item in present]
    assert made.log.catalogue.titles == [f"title {item}" for item in made.log.catalogue.item_ids]
    assert len(rows) == len(made.log.items) + made.core_interactions + int(made.duplicates.sum())
    assert made.log.items.dtype == np.int32
    assert made.log.offsets.dtype == np.int64


@settings(deadline=None)
@given(ROWS)
def test_leave_one_out_equals_plain_python(rows: list[Row]) -> None:
    log = build(rows).log
    train, validation, test = {}, {}, {}
    for user, sequence in plain_sequences(rows, "keep", 1, 1).items():
        if len(sequence) >= 3:
            train[user], validation[user], test[user] = sequence[:-2], sequence[-2], sequence[-1]
        else:
            train[user] = sequence
    names = log.catalogue.item_ids
    assert train == {
        user: [names[item] for item in log.train_sequence(index)] for index, user in enumerate(log.user_ids)
    }
    users = log.split_users()
    split = [log.user_ids[user] for user in users]
    assert validation == dict(zip(split, [names[item] for item in log.targets(users, "validation")], strict=True))
    assert test == dict(zip(split, [names[item] for item in log.targets(users, "test")], strict=True))


@settings(deadline=None)
@given(ROWS, st.integers(1, 5), st.integers(1, 5))
def test_core_equals_plain_python_and_keeps_order(rows: list[Row], min_user: int, min_item: int) -> None:
    users = np.array([ord(row[0]) for row in rows], dtype=np.int64)
    items = np.array([ord(row[1]) for row in rows], dtype=np.int64)
    kept = k_core(users, items, min_user, min_item)
    assert [row for row, keep in zip(rows, kept, strict=True) if keep] == plain_core(rows, min_user, min_item)


def test_core_is_iterated() -> None:
    rows = [("u", "a", 0), ("u", "b", 1), ("v", "a", 0), ("v", "c", 1), ("w", "b", 0)]
    made = build(rows, min_user=2, min_item=2)
    assert named(made) == {}
    assert (made.core_interactions, made.core_users, made.core_items) == (5, 3, 8)


def test_items_without_interactions_stay_only_without_a_core() -> None:
    rows = [("u", "a", 0), ("u", "b", 1), ("u", "b", 2)]
    assert build(rows, min_user=3).log.catalogue.item_ids == ITEMS
    assert build(rows, min_item=2).log.catalogue.item_ids == ["b"]


@pytest.mark.parametrize(
    ("duplicates", "sequence", "dropped"),
    [
        ("keep", ["b", "a", "b", "b"], []),
        ("first", ["b", "a"], [0, 3]),
        ("last", ["a", "b"], [0, 2]),
    ],
)
def test_repeated_pairs_by_time(
    duplicates: Literal["keep", "first", "last"], sequence: list[str], dropped: list[int]
) -> None:
    # In file order; rows 0 and 3 are exact duplicates of each other.
    rows = [("u", "b", 5), ("u", "a", 3), ("u", "b", 1), ("u", "b", 5)]
    made = build(rows, duplicates)
    assert named(made) == {"u": sequence}
    assert np.flatnonzero(made.duplicates).tolist() == dropped


def test_equal_times_keep_file_order() -> None:
    rows = [("u", item, 7) for item in "hbgacf"]
    assert named(build(rows)) == {"u": list("hbgacf")}


def test_repeated_pairs_of_nothing() -> None:
    nothing = np.array([], dtype=np.int64)
    assert repeated_pairs(nothing, nothing, "first").tolist() == []
