"""Duplicates, k-core, order, indices and split against plain Python."""

from __future__ import annotations

import tempfile
from collections import Counter, defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ctd_scale.interactions.parts import PartWriter, add_parts
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
    num_parts: int = 1,
    refused: list[int] | None = None,
) -> Sequences:
    """Of rows that arrive in some order; `refused` is given the places of the duplicates."""
    table = pa.table(
        {
            "user_id": pa.array([row[0] for row in rows], pa.string()),
            "item": pa.array([ITEMS.index(row[1]) for row in rows], pa.int32()),
            "order": pa.array([row[2] for row in rows], pa.int64()),
            "file": pa.array([0] * len(rows), pa.int32()),
            "row": pa.array(range(len(rows)), pa.int64()),
        }
    )
    items = pa.table({"item_id": ITEMS, "title": [f"title {item}" for item in ITEMS], "category": [""] * len(ITEMS)})
    places = [] if refused is None else refused
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shuffled = add_parts(table, num_parts).take(np.random.default_rng(0).permutation(len(rows)))
        with PartWriter(folder, num_parts) as parts:
            for block in (shuffled.slice(0, 7), shuffled.slice(7)):
                parts.add(block)
        made = build_sequences(
            parts.read(),
            items,
            folder,
            duplicates=duplicates,
            min_user_interactions=min_user,
            min_item_interactions=min_item,
            refuse=lambda rows: places.extend(rows["place"].to_pylist()),
        )
        return replace(made, log=replace(made.log, items=np.array(made.log.items)))


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
@given(ROWS, st.sampled_from(["keep", "first", "last"]), st.integers(1, 4), st.integers(1, 4), st.integers(1, 3))
def test_sequences_equal_plain_python(
    rows: list[Row], duplicates: Literal["keep", "first", "last"], min_user: int, min_item: int, num_parts: int
) -> None:
    made = build(rows, duplicates, min_user, min_item, num_parts)
    expected = plain_sequences(rows, duplicates, min_user, min_item)
    assert named(made) == expected
    seen = dict.fromkeys(row[0] for row in rows)
    assert made.log.user_ids == [user for user in seen if user in expected]
    present = {item for sequence in expected.values() for item in sequence}
    assert made.log.catalogue.item_ids == [item for item in ITEMS if min_item == 1 or item in present]
    assert made.log.catalogue.titles == [f"title {item}" for item in made.log.catalogue.item_ids]
    assert len(rows) == len(made.log.items) + made.core_interactions + made.duplicates
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
    items = np.array([ord(row[1]) for row in rows], dtype=np.int32)
    halves = [(users[part], items[part]) for part in (slice(0, 11), slice(11, None))]
    in_users, in_items = k_core(lambda: halves, 128, 128, min_user, min_item)
    kept = in_users[users] & in_items[items]
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
    refused: list[int] = []
    made = build(rows, duplicates, refused=refused)
    assert named(made) == {"u": sequence}
    assert refused == dropped
    assert made.duplicates == len(dropped)


def test_equal_times_keep_file_order() -> None:
    rows = [("u", item, 7) for item in "hbgacf"]
    assert named(build(rows)) == {"u": list("hbgacf")}


def test_repeated_pairs_of_nothing() -> None:
    nothing = np.array([], dtype=np.int64)
    assert repeated_pairs(nothing, nothing, "first").tolist() == []


def test_rows_that_are_no_longer_there_are_missed(tmp_path: Path) -> None:
    with PartWriter(tmp_path, 2) as parts:
        parts.add(pa.table({"part": pa.array([0, 1, 1], pa.int16()), "order": [1, 2, 3]}))
    assert [part["order"].to_pylist() for part in parts.read()] == [[1], [2, 3]]
    with pa.ipc.new_stream(parts.paths[1], pa.schema([("order", pa.int64())])) as other:  # as who writes there, too
        other.write_table(pa.table({"order": [2]}))
    with pytest.raises(OSError, match="held 2 of 3 rows when they were read again"):
        list(parts.read())
