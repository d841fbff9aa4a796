"""Rows of CSV, tab-separated and JSONL files, every field as text.

Nothing here raises on bad data: a line that is no record comes out as a row marked `unparsable`.
"""

from __future__ import annotations

import csv
import json
import sys
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

import pyarrow as pa

# A quoted field may hold line breaks; one that is still open after this many lines was never meant as one.
MAX_RECORD_LINES = 100
# Of a JSONL file, whose columns are named on every line that has them.
HEAD_LINES = 10_000
csv.field_size_limit(min(sys.maxsize, 2**31 - 1))  # the default refuses a field above 128 KiB


def text_columns(file: Any, kind: str) -> list[str]:
    """The header of a delimited file, or the keys in the first lines of a JSONL file (may be none)."""
    lines = _lines(file)
    if kind != "jsonl":
        return _header(_records(lines, kind))
    parsed = [_json_object(line) for line in islice(lines, HEAD_LINES)]
    return list(dict.fromkeys(name for values in parsed if values for name in values))


def text_batches(file: Any, kind: str, columns: Mapping[str, str], batch_rows: int) -> Iterator[pa.RecordBatch]:
    """Batches with our column names and `unparsable`; `kind` is csv, tsv, tab (never quotes) or jsonl."""
    lines = _lines(file)
    names = list(columns.values())
    rows = _json_rows(lines, names) if kind == "jsonl" else _delimited_rows(_records(lines, kind), names)
    nothing: list[str | None] = [None] * len(names)
    while chunk := list(islice(rows, batch_rows)):
        values = [nothing if row is None else row for row in chunk]
        arrays = [pa.array([row[place] for row in values], pa.string()) for place in range(len(names))]
        unparsable = pa.array([row is None for row in chunk])
        yield pa.RecordBatch.from_arrays([*arrays, unparsable], names=[*columns, "unparsable"])


def _lines(file: Any) -> Iterator[str | None]:
    """Lines without their end; None for one that is not UTF-8. Blank lines are no rows and are left out."""
    mark = b"\xef\xbb\xbf"
    for raw in file:
        raw, mark = raw.removeprefix(mark).rstrip(b"\r\n"), b""
        if raw:
            try:
                yield raw.decode()
            except UnicodeDecodeError:
                yield None


def _json_rows(lines: Iterator[str | None], names: Sequence[str]) -> Iterator[list[str | None] | None]:
    for line in lines:
        record = _json_object(line)
        yield None if record is None else [_json_text(record.get(name)) for name in names]


def _json_object(line: str | None) -> dict[str, Any] | None:
    if line is None:
        return None
    try:
        # Numbers stay text, so that an id of twenty digits keeps them all.
        record = json.loads(line, parse_int=str, parse_float=_float_text, parse_constant=lambda _: None)
        if "\\u" in line:
            json.dumps(record, ensure_ascii=False).encode()  # half a surrogate pair is no text
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) else None


def _float_text(text: str) -> str:
    return text[:-2] if text.endswith(".0") else text


def _json_text(value: Any) -> str | None:
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, list) and all(isinstance(entry, str) for entry in value):
        return " ".join(value)
    return json.dumps(value, ensure_ascii=False)


def _delimited_rows(records: Iterator[list[str] | None], names: Sequence[str]) -> Iterator[list[str | None] | None]:
    header = _header(records)
    places = [header.index(name) if name in header else None for name in names]
    for fields in records:
        if fields is None or len(fields) != len(header):
            yield None
        else:
            yield [None if place is None else fields[place] for place in places]


def _header(records: Iterator[list[str] | None]) -> list[str]:
    return next(records, None) or []


def _records(lines: Iterator[str | None], kind: str) -> Iterator[list[str] | None]:
    """The fields of every record; None for a line that is none. Only quotes need a real parser."""
    delimiter = "," if kind == "csv" else "\t"
    ahead: deque[str | None] = deque()
    while True:
        try:
            line = ahead.popleft() if ahead else next(lines)
        except StopIteration:
            return
        if line is None:
            yield None
        elif kind == "tab" or '"' not in line:
            yield line.split(delimiter)
        else:
            fields, is_open = _quoted_fields(line, delimiter)
            taken: list[str] = []
            while is_open and len(taken) < MAX_RECORD_LINES:
                more = ahead.popleft() if ahead else next(lines, "")  # "" is the end: blank lines are left out
                if not more:
                    ahead.extendleft([more] if more is None else [])
                    break
                taken.append(more)
                line = f"{line}\n{more}"
                if '"' in more:
                    fields, is_open = _quoted_fields(line, delimiter)
            if fields is None:  # only the first line is lost: what follows may be good
                ahead.extendleft(reversed(taken))
            yield fields


def _quoted_fields(record: str, delimiter: str) -> tuple[list[str] | None, bool]:
    """(fields, False); (None, True) where a quote is still open; (None, False) where it is no record."""
    try:
        return next(csv.reader([record], delimiter=delimiter, strict=True)), False
    except csv.Error as error:
        return None, "unexpected end of data" in str(error)
