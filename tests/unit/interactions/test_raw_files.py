"""Which files a path means, their columns, their pieces, and that every format gives the same rows."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet as pq
import pytest

from ctd_scale.interactions.reading import columns_of, expand, pieces_of, read_piece
from ctd_scale.interactions.schema import BadInputError, check_interactions

COLUMNS = {"user": "user_id", "item": "item_id", "order": "timestamp", "rating": "rating"}
TABLE = pa.table(
    {
        "user_id": [1, 1, 2, None, 3],
        "item_id": ["a", "b", "a,c", "a", None],
        "timestamp": [10.5, 9.0, 8.0, 7.0, 6.0],
        "rating": [5, None, 3, 4, 1],
    }
)


def write_parquet(path: Path) -> Path:
    pq.write_table(TABLE, path.with_suffix(".parquet"), row_group_size=2)
    return path.with_suffix(".parquet")


def write_csv(path: Path) -> Path:
    pyarrow.csv.write_csv(TABLE, path.with_suffix(".csv"))
    return path.with_suffix(".csv")


def write_jsonl(path: Path) -> Path:
    path.with_suffix(".jsonl").write_text("".join(json.dumps(row) + "\n" for row in TABLE.to_pylist()))
    return path.with_suffix(".jsonl")


def write_gzip(path: Path) -> Path:
    packed = path.with_suffix(".csv.gz")
    packed.write_bytes(gzip.compress(write_csv(path).read_bytes()))
    return packed


def checked_rows(path: Path) -> list[dict[str, object]]:
    known = pa.array(["a", "b", "a,c"])
    batches = [batch for piece in pieces_of([str(path)]) for batch in read_piece(piece, COLUMNS)]
    checked = [check_interactions(batch, position=False, known_items=known) for batch in batches]
    return [row for table in checked for row in table.drop_columns(["time", "item"]).to_pylist()]


@pytest.mark.parametrize("write", [write_parquet, write_csv, write_jsonl, write_gzip])
def test_every_format_gives_the_same_rows(write: Callable[[Path], Path], tmp_path: Path) -> None:
    expected = [
        ("1", "a", 10_500_000, 1, None),
        ("1", "b", 9_000_000, 2, None),
        ("2", "a,c", 8_000_000, 3, None),
        (None, "a", 7_000_000, 4, "missing user_id"),
        ("3", None, 6_000_000, 5, "missing item_id"),
    ]
    assert [tuple(row.values()) for row in checked_rows(write(tmp_path / "log"))] == expected


def test_pieces_are_row_groups_and_count_their_rows(tmp_path: Path) -> None:
    paths = [str(write_parquet(tmp_path / "log")), str(write_csv(tmp_path / "log"))]
    pieces = [(piece.file, piece.row_group, piece.first_row) for piece in pieces_of(paths)]
    assert pieces == [(0, 0, 1), (0, 1, 3), (0, 2, 5), (1, 0, 1)]
    last = next(iter(read_piece(pieces_of(paths)[2], COLUMNS)))
    assert last["row"].to_pylist() == [5]


def test_a_path_is_a_file_a_folder_or_a_glob(tmp_path: Path) -> None:
    for name in ("b.csv", "a.csv", "deep/c.csv", "_SUCCESS", ".hidden.csv", "_temporary/d.csv", "notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x\n")
    inside = [str(tmp_path / name) for name in ("a.csv", "b.csv", "deep/c.csv")]
    assert expand(str(tmp_path), "key") == inside
    assert expand(str(tmp_path / "*.csv"), "key")[-2:] == inside[:2]
    assert expand(str(tmp_path / "b.csv"), "key") == inside[1:2]
    assert expand(f"file://{tmp_path}/b.csv", "key") == [f"file://{tmp_path}/b.csv"]


def test_urls_are_read_through_fsspec() -> None:
    import fsspec

    memory = fsspec.filesystem("memory")
    memory.pipe_file("/raw/log.csv", b"user_id,item_id,timestamp\n1,a,5\n")
    assert expand("memory://raw", "key") == ["memory:///raw/log.csv"]
    assert columns_of("memory:///raw/log.csv") == ["user_id", "item_id", "timestamp"]
    batch = next(read_piece(pieces_of(["memory:///raw/log.csv"])[0], COLUMNS))
    assert batch["user"].to_pylist() == ["1"]


def test_missing_files_and_unknown_suffixes_name_the_config_key(tmp_path: Path) -> None:
    with pytest.raises(BadInputError, match=r"interactions\.items='.*/none\.csv': no such file, folder or glob"):
        expand(str(tmp_path / "none.csv"), "interactions.items")
    with pytest.raises(BadInputError, match="no such file, folder or glob"):
        expand(str(tmp_path), "interactions.items")  # an empty folder
    (tmp_path / "log.xlsx").write_bytes(b"PK")
    with pytest.raises(BadInputError, match=r"interactions\.items: .*/log\.xlsx has no known suffix"):
        expand(str(tmp_path / "log.xlsx"), "interactions.items")


def test_empty_and_damaged_files_are_refused(tmp_path: Path) -> None:
    empty = tmp_path / "empty.csv"
    empty.touch()
    with pytest.raises(BadInputError, match=r"/empty\.csv is empty \(0 bytes\)"):
        columns_of(str(empty))
    text = tmp_path / "text.parquet"
    text.write_text("user_id,item_id\n")
    with pytest.raises(BadInputError, match=r"/text\.parquet cannot be read: "):
        columns_of(str(text))
    array = tmp_path / "array.json"
    array.write_text('[{"user_id": 1},\n{"user_id": 2}]\n')
    with pytest.raises(BadInputError, match=r"none of its first lines is a JSON object; write one object per"):
        columns_of(str(array))
    wide = tmp_path / "wide.csv"
    wide.write_text("user_id,item_id\n1,2\n", encoding="utf-16")
    with pytest.raises(BadInputError, match=r"/wide\.csv is in UTF-16, expected UTF-8; convert it: iconv"):
        columns_of(str(wide))
    for text in ('"user_id";"item_id"\n"1";"2"\n', "user_id;item_id\n1;2\n", "user_id\titem_id\n1\t2\n"):
        wide.write_text(text)
        with pytest.raises(BadInputError, match=r"/wide\.csv: its first line is no header with commas between"):
            columns_of(str(wide))
    wide.write_bytes(b"user_id,item_id\r1,2\r")
    with pytest.raises(BadInputError, match=r"/wide\.csv: its lines end in CR alone"):
        columns_of(str(wide))
    packed = write_gzip(tmp_path / "log")
    packed.write_bytes(packed.read_bytes()[:-12])
    with pytest.raises(BadInputError, match=r"/log\.csv\.gz cannot be read: "):
        list(read_piece(pieces_of([str(packed)])[0], COLUMNS))


def test_a_flipped_bit_in_checksummed_parquet_is_seen(tmp_path: Path) -> None:
    path = tmp_path / "log.parquet"
    options = {"write_page_checksum": True, "use_dictionary": False, "compression": "none"}
    pq.write_table(pa.table({"user_id": ["x" * 50] * 1000}), path, **options)
    data = bytearray(path.read_bytes())
    data[10_000] ^= 1
    path.write_bytes(data)
    with pytest.raises(BadInputError, match="cannot be read"):
        list(read_piece(pieces_of([str(path)])[0], {"user": "user_id"}))


def test_columns_of_each_format(tmp_path: Path) -> None:
    for write in (write_parquet, write_csv, write_jsonl, write_gzip):
        assert columns_of(str(write(tmp_path / "log"))) == TABLE.column_names


def test_a_column_that_few_lines_have_is_found(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    path.write_text('{"user_id": 1}\n' * 5_000 + '{"user_id": 1, "price": 2}\n')
    assert columns_of(str(path)) == ["user_id", "price"]


def test_a_missing_optional_column_is_null(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "log")
    batch = next(read_piece(pieces_of([str(path)])[0], {**COLUMNS, "rating": "stars"}))
    assert pc.all(pc.is_null(batch["rating"])).as_py()


def test_a_nested_column_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "log.parquet"
    pq.write_table(pa.table({"user_id": [{"id": 1}]}), path)
    with pytest.raises(BadInputError, match=r"/log\.parquet, column 'user_id': struct<.*> is neither text, number"):
        list(read_piece(pieces_of([str(path)])[0], {"user": "user_id"}))
