"""CSV, tab-separated and JSONL rows: what is a record, what is not, and that nothing raises."""

from __future__ import annotations

import csv
import io

import pyarrow as pa
from hypothesis import given, settings
from hypothesis import strategies as st

from ctd_scale.interactions.text_rows import MAX_RECORD_LINES, text_batches, text_columns

COLUMNS = {"user": "u", "item": "i"}


def rows(data: bytes, kind: str, batch_rows: int = 1000) -> list[tuple[str | None, str | None, bool]]:
    batches = list(text_batches(io.BytesIO(data), kind, COLUMNS, batch_rows))
    table = pa.Table.from_batches(batches) if batches else pa.table({"user": [], "item": [], "unparsable": []})
    return list(zip(*(table[name].to_pylist() for name in ("user", "item", "unparsable")), strict=True))


BROKEN = (None, None, True)


def test_csv_fields_by_name_with_blank_lines_bom_and_crlf() -> None:
    data = "\ufeffi,x,u\r\n1,-,a\r\n\r\n2,-,b".encode()
    assert rows(data, "csv") == [("a", "1", False), ("b", "2", False)]
    assert text_columns(io.BytesIO(data), "csv") == ["i", "x", "u"]


def test_csv_lines_that_are_no_record() -> None:
    data = b'u,i\na,1\nb\nc,3,4\n\xff,5\n"d"x,6\ne,7\n'
    assert rows(data, "csv") == [("a", "1", False), BROKEN, BROKEN, BROKEN, BROKEN, ("e", "7", False)]


def test_csv_quotes_hold_delimiters_quotes_and_line_breaks() -> None:
    data = b'u,i\n"a,""b""","1\n2"\n5" disk,3\n'
    assert rows(data, "csv") == [('a,"b"', "1\n2", False), ('5" disk', "3", False)]


def test_csv_open_quote_loses_one_line_not_the_rest_of_the_file() -> None:
    good = b"".join(b"u%d,%d\n" % (number, number) for number in range(3 * MAX_RECORD_LINES))
    for tail in (b"", b'"open again,2\n', good):
        found = rows(b'u,i\n"open,1\n' + good + tail, "csv")
        assert found[0] == BROKEN
        assert found[1 : 1 + 3 * MAX_RECORD_LINES] == [
            (f"u{number}", str(number), False) for number in range(3 * MAX_RECORD_LINES)
        ]


def test_tab_files_of_recbole_never_quote() -> None:
    assert rows(b'u\ti\n"Great" Cats\t1\n', "tab") == [('"Great" Cats', "1", False)]
    assert rows(b'u\ti\n"a\tb"\t1\n', "tsv") == [("a\tb", "1", False)]


def test_a_column_that_the_file_lacks_is_null() -> None:
    assert rows(b"u,x\na,1\n", "csv") == [("a", None, False)]
    assert rows(b'{"u": "a"}\n', "jsonl") == [("a", None, False)]


def test_jsonl_values_become_text() -> None:
    data = b'{"u": 5, "i": 5.0}\n{"u": true, "i": null}\n{"u": ["x", "y"], "i": {"z": 1}}\n'
    data += b'{"u": NaN, "i": 1e3}\n'
    assert rows(data, "jsonl") == [
        ("5", "5", False),
        ("true", None, False),
        ("x y", '{"z": "1"}', False),
        (None, "1e3", False),
    ]
    assert rows(b'{"u": 123456789012345678901, "i": "\\u00e9"}', "jsonl") == [("123456789012345678901", "é", False)]


def test_jsonl_lines_that_are_no_object() -> None:
    lines = [
        b"{",
        b"[1]",
        b"5",
        b'"x"',
        b"\xff",
        b'{"u": "\\ud800"}',
        b"[" * 100_000,
        b'{"u": "a", "i": 1}',
        b"",
    ]
    assert rows(b"\n".join(lines), "jsonl") == [*[BROKEN] * 7, ("a", "1", False)]
    assert text_columns(io.BytesIO(b'{"u": 1}\n{"i": 2}\n['), "jsonl") == ["u", "i"]
    assert text_columns(io.BytesIO(b"[\n{\n"), "jsonl") == []


def test_fields_far_above_the_parsers_default_limit() -> None:
    long = "x" * 200_000
    assert rows(f'u,i\n"{long}",1\n'.encode(), "csv") == [(long, "1", False)]


def test_batches_follow_each_other() -> None:
    data = b"u,i\n" + b"".join(b"a,%d\n" % number for number in range(10))
    assert [row[1] for row in rows(data, "csv", batch_rows=3)] == [str(number) for number in range(10)]


ONE_LINE = st.text(st.characters(codec="utf-8", exclude_characters="\r\n"))


@settings(deadline=None)
@given(st.lists(st.tuples(ONE_LINE, ONE_LINE), max_size=20), st.sampled_from(["csv", "tsv"]))
def test_whatever_pythons_writer_wrote_is_read_back(pairs: list[tuple[str, str]], kind: str) -> None:
    out = io.StringIO()
    writer = csv.writer(out, delimiter="," if kind == "csv" else "\t", lineterminator="\n")
    writer.writerows([("u", "i"), *pairs])
    assert rows(out.getvalue().encode(), kind) == [(user, item, False) for user, item in pairs]


@settings(deadline=None)
@given(st.binary(max_size=300), st.sampled_from(["csv", "tsv", "tab", "jsonl"]))
def test_no_bytes_raise(data: bytes, kind: str) -> None:
    for user, item, unparsable in rows(b"u,i\tu\ti\n" + data, kind):
        assert not unparsable or (user is None and item is None)
    text_columns(io.BytesIO(data), kind)
