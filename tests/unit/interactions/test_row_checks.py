"""Row checks: every rule with a planted bad row, types, times and titles."""

from __future__ import annotations

from datetime import date, datetime, timezone
from decimal import Decimal
from uuid import UUID

import numpy as np
import pyarrow as pa
import pytest

from ctd_scale.interactions.schema import (
    BadInputError,
    as_text,
    check_interactions,
    check_items,
    clean_titles,
    mark_duplicate_items,
    parse_number,
    parse_position,
    parse_time,
)

GOOD = {"user": "u", "item": "a", "order": "5", "rating": "4.5"}


def interactions(*rows: dict[str, object]) -> pa.RecordBatch:
    """Text rows as the reader gives them; what a row does not say is as in GOOD."""
    columns = {name: pa.array([{**GOOD, **row}[name] for row in rows], pa.string()) for name in GOOD}
    unparsable = pa.array([bool(row.get("unparsable")) for row in rows], pa.bool_())
    numbers = pa.array(range(1, len(rows) + 1), pa.int64())
    return pa.RecordBatch.from_pydict({**columns, "row": numbers, "unparsable": unparsable})


def reasons(batch: pa.RecordBatch, *, position: bool = False) -> list[str | None]:
    checked = check_interactions(batch, position=position, known_items=pa.array(["a", "b"]))
    return checked["reason"].to_pylist()


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({}, None),
        ({"user": None}, "missing user_id"),
        ({"user": ""}, "missing user_id"),
        ({"item": None}, "missing item_id"),
        ({"order": None}, "missing time"),
        ({"order": ""}, "missing time"),
        ({"order": "soon"}, "unparsable time"),
        ({"order": "2024-02-30"}, "unparsable time"),
        ({"order": "inf"}, "unparsable time"),
        ({"order": "99999999999999999999"}, "unparsable time"),
        ({"rating": "good"}, "unparsable rating"),
        ({"rating": None}, None),
        ({"rating": " 3 "}, None),
        ({"item": "z"}, "unknown item"),
        ({"item": " a"}, "unknown item"),  # ids are not stripped
        ({"user": None, "item": None, "order": None, "unparsable": True}, "unparsable line"),
        ({"user": None, "item": "z", "order": "soon"}, "missing user_id"),  # the first reason counts
    ],
)
def test_each_rule_names_its_row(row: dict[str, object], reason: str | None) -> None:
    assert reasons(interactions({}, row, {})) == [None, reason, None]


def test_a_bad_row_keeps_its_raw_values_and_number() -> None:
    checked = check_interactions(interactions({}, {"order": "soon"}), position=False, known_items=pa.array(["a"]))
    assert checked.to_pylist()[1] == {
        "user_id": "u",
        "item_id": "a",
        "order": None,
        "time": "soon",
        "row": 2,
        "reason": "unparsable time",
        "item": 0,
    }


def test_position_must_be_whole() -> None:
    rows = interactions({"order": "3"}, {"order": "3.0"}, {"order": "3.5"}, {"order": "2024-01-01"})
    assert reasons(rows, position=True) == [None, None, "unparsable time", "unparsable time"]
    assert parse_position(pa.array(["3", "-4", "5.0", None, "x"])).to_pylist() == [3, -4, 5, None, None]
    assert parse_position(pa.array([7, None], pa.uint8())).to_pylist() == [7, None]
    assert parse_position(pa.array([7.0, 7.5])).to_pylist() == [7, None]
    assert parse_position(pa.array([2**63, 1], pa.uint64())).to_pylist() == [None, 1]


NOON = datetime(2024, 1, 5, 12, 0, 0, 250_000, tzinfo=timezone.utc)
NOON_MICROSECONDS = 1_704_456_000_250_000


@pytest.mark.parametrize(
    "values",
    [
        pa.array(["1704456000.25"]),
        pa.array([" 1704456000.25 "]),
        pa.array(["1.70445600025e9"]),
        pa.array([1704456000.25]),
        pa.array(["2024-01-05T12:00:00.25Z"]),
        pa.array(["2024-01-05 12:00:00.250000000"]),
        pa.array(["2024-01-05T14:00:00.25+02:00"]),
        pa.array(["2024-01-05T07:00:00.25-0500"]),
        pa.array([NOON]),
        pa.array([NOON.replace(tzinfo=None)], pa.timestamp("ns")),
        pa.array([NOON], pa.timestamp("us", "America/New_York")),
        pa.array(["1704456000.25"]).dictionary_encode(),
    ],
    ids=lambda values: f"{values.type}-{values[0]}",
)
def test_every_way_to_write_one_moment(values: pa.Array) -> None:
    assert parse_time(values).to_pylist() == [NOON_MICROSECONDS]


def test_dates_and_whole_seconds() -> None:
    midnight = 1_704_412_800
    for values in (
        pa.array(["2024-01-05"]),
        pa.array([date(2024, 1, 5)]),
        pa.array([midnight]),
        pa.array([midnight], pa.int32()),
        pa.array([str(midnight)]),
        pa.array([float(midnight)]),
    ):
        assert parse_time(values).to_pylist() == [midnight * 1_000_000]


def test_times_beyond_int64_and_nan_are_null() -> None:
    assert parse_time(pa.array([2**62, -(2**63), 1])).to_pylist() == [None, None, 1_000_000]
    assert parse_time(pa.array([float("nan"), float("inf"), 1e300])).to_pylist() == [None, None, None]
    assert parse_time(pa.array([True, None])).to_pylist() == [None, None]


@pytest.mark.parametrize(
    ("values", "text"),
    [
        (pa.array([5, -1]), ["5", "-1"]),
        (pa.array([5.0, 5.5, float("nan"), 1234567890.0]), ["5", "5.5", None, "1234567890"]),
        (pa.array([float("inf")]), ["inf"]),
        (pa.array([Decimal("34.00"), Decimal("5.10"), None, Decimal("100.00")]), ["34", "5.1", None, "100"]),
        (pa.array([Decimal("100")]), ["100"]),
        (pa.array([Decimal("0"), Decimal("1.5E-10"), None], pa.decimal128(38, 18)), ["0", "0.00000000015", None]),
        (pa.array(["5.0", "", " x ", None]), ["5.0", None, " x ", None]),
        (pa.array([b"ok", b"\xff"], pa.binary()), ["ok", None]),
        (pa.array([b"ok", b"\xff"], pa.large_binary()), ["ok", None]),
        (pa.array([b"ab", b"\xff\xff", None], pa.binary(2)), ["ab", None, None]),
        (pa.array([UUID(int=10).bytes, None], pa.uuid()), ["00000000-0000-0000-0000-00000000000a", None]),
        (pa.array(["é"], pa.large_string()), ["é"]),
        (pa.array([["Drama", "War"], None]), ["Drama War", None]),
        (pa.array([[b"Drama", b"War"], [b"ok", b"\xff"]]), ["Drama War", None]),
        (pa.array([["x"], ["Drama", None, "War"], None, [], [None]])[1:], ["Drama War", None, None, None]),
        (pa.nulls(2), [None, None]),
        (pa.array(["x", None]).dictionary_encode(), ["x", None]),
        (pa.array([True]), ["true"]),
    ],
    ids=lambda values: str(getattr(values, "type", "")),
)
def test_ids_of_any_type_become_text(values: pa.Array, text: list[str | None]) -> None:
    assert as_text(values).to_pylist() == text


def test_invalid_utf8_in_a_string_column_is_null() -> None:
    broken = pa.Array.from_buffers(pa.string(), 2, pa.array([b"ok", b"\xff"], pa.binary()).buffers())
    assert as_text(broken).to_pylist() == ["ok", None]


def test_nested_columns_are_refused() -> None:
    with pytest.raises(BadInputError, match=r"struct<a: int64> is neither text, number nor time"):
        as_text(pa.array([{"a": 1}]))
    with pytest.raises(BadInputError, match=r"list<.*struct<a: int64>> is neither text, number nor time"):
        as_text(pa.array([], pa.list_(pa.struct([("a", pa.int64())]))))


def item_batch(*rows: tuple[str | None, str | None, str | None]) -> pa.RecordBatch:
    columns = {
        name: pa.array([row[place] for row in rows], pa.string())
        for place, name in enumerate(("item", "title", "category"))
    }
    numbers = pa.array(range(1, len(rows) + 1), pa.int64())
    unparsable = pa.array([False] * len(rows))
    return pa.RecordBatch.from_pydict({**columns, "row": numbers, "unparsable": unparsable})


def test_items_without_id_and_repeated_items() -> None:
    checked = mark_duplicate_items(
        check_items(item_batch(("a", "A", ""), (None, "B", ""), ("a", "C", ""), ("b", "", ""), ("a", "", "")))
    )
    assert checked["reason"].to_pylist() == [
        None,
        "missing item_id",
        "duplicate item_id",
        None,
        "duplicate item_id",
    ]


NAN = float("nan")


@pytest.mark.parametrize(
    ("values", "numbers"),
    [
        (pa.array(["5", " -2.50 ", "1e3", ".5", "", " ", None]), [5, -2.5, 1000, 0.5, None, None, None]),
        (pa.array(["cheap", "1,5", "inf", "nan", "1e999", "5 EUR"]), [NAN] * 6),
        (pa.array([5, None], pa.int8()), [5, None]),
        (pa.array([2**62 + 1]), [float(2**62)]),
        (pa.array([1.5, NAN, float("inf"), None]), [1.5, None, NAN, None]),
        (pa.array([0.1], pa.float32()), [float(np.float32(0.1))]),
        (pa.array([Decimal("19.99")]), [19.99]),
        (pa.array([True]), [NAN]),
        (pa.array(["7", None]).dictionary_encode(), [7, None]),
    ],
    ids=lambda values: str(getattr(values, "type", "")),
)
def test_numbers_are_read_missing_or_not_numbers(values: pa.Array, numbers: list[float | None]) -> None:
    assert list(map(str, parse_number(values).to_pylist())) == [
        str(None if number is None else float(number)) for number in numbers
    ]


def test_a_number_that_cannot_be_read_does_not_cost_the_item() -> None:
    batch = item_batch(("a", "A", ""), ("b", "B", "")).append_column("attribute:price", pa.array(["5", "cheap"]))
    cleaned, _, _ = clean_titles(check_items(batch), 10)
    assert check_items(batch)["reason"].to_pylist() == [None, None]
    assert np.array_equal(cleaned["attribute:price"].to_numpy(), [5, NAN], equal_nan=True)


def test_missing_titles_take_the_category_or_the_id() -> None:
    items = check_items(item_batch(("a", "A", "x"), ("b", "", "x"), ("c", None, None), ("d", " \n\t ", "")))
    cleaned, cut, missing = clean_titles(items, 10)
    assert cleaned["title"].to_pylist() == ["A", "x", "c", "d"]
    assert cleaned["category"].to_pylist() == ["x", "x", "", ""]
    assert (cut, missing) == (0, 3)


def test_titles_are_one_line_and_cut_at_characters() -> None:
    items = check_items(
        item_batch(("a", "one\r\ntwo\x00\x85\u2028three\t", ""), ("b", "é" * 200_000, ""), ("c", "x", ""))
    )
    cleaned, cut, missing = clean_titles(items, 512)
    assert cleaned["title"].to_pylist() == ["one two three", "é" * 512, "x"]
    assert (cut, missing) == (1, 0)


def test_empty_batches_pass() -> None:
    empty = check_interactions(interactions(), position=False, known_items=pa.array([], pa.string()))
    assert len(empty) == 0
    assert empty.column_names == ["user_id", "item_id", "order", "time", "row", "reason", "item"]
