"""Raw files as batches: which files a path means, the pieces they are read in, and their rows.

A piece is a Parquet row group or a whole text file, and every row knows its number in its file. Files are
opened through fsspec, so a path may be local or a URL, and `.gz` text files are read as they are.
"""

from __future__ import annotations

import codecs
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ctd_scale.interactions.schema import BadInputError, as_text
from ctd_scale.interactions.text_rows import text_batches, text_columns

# .inter and .item are RecBole's tab-separated files, which never quote.
FORMATS = {
    ".parquet": "parquet",
    ".csv": "csv",
    ".tsv": "tsv",
    ".inter": "tab",
    ".item": "tab",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
}
# Looking ids up begins with hashing the catalogue, once per batch: a million items took 0.2 s, so batches are large.
BATCH_ROWS = 1 << 19


@dataclass(frozen=True)
class Piece:
    """What one task reads: a file, or one row group of it. `file` is its place in the list of files."""

    path: str
    file: int
    row_group: int
    first_row: int


def expand(pattern: str, key: str) -> list[str]:
    """The files that a file, folder, glob or URL means, in name order.

    `key` is the config key they come from. Raises BadInputError: nothing there, or a suffix not in FORMATS.
    """
    filesystem, root = fsspec.url_to_fs(pattern)
    if filesystem.isfile(root):
        found = [root]
    elif filesystem.isdir(root):
        inside = [str(file) for file in filesystem.find(root)]
        found = [file for file in inside if _suffix(file) in FORMATS and not _is_hidden(file, root)]
    else:
        found = [str(file) for file in filesystem.glob(root) if filesystem.isfile(file)]
    if not found:
        known = ", ".join(FORMATS)
        raise BadInputError(f"{key}={pattern!r}: no such file, folder or glob with files in it ({known})")
    for file in found:
        if _suffix(file) not in FORMATS:
            known = ", ".join(FORMATS)
            raise BadInputError(f"{key}: {file} has no known suffix; expected one of {known} (text also as .gz)")
    return sorted(str(filesystem.unstrip_protocol(file)) if "://" in pattern else file for file in found)


def columns_of(path: str) -> list[str]:
    """The columns of a file: its schema, its header, or the keys of its first lines.

    Raises BadInputError: the file is empty, not of the format that its suffix says, or not in UTF-8.
    """
    filesystem, root = fsspec.url_to_fs(path)
    if filesystem.size(root) == 0:
        raise BadInputError(f"{path} is empty (0 bytes)")
    with _opened(path) as file:
        kind = FORMATS[_suffix(path)]
        if kind == "parquet":
            return [str(name) for name in pq.ParquetFile(file).schema_arrow.names]
        if file.read(2) in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):  # how spreadsheets save "Unicode text"
            raise BadInputError(f"{path} is in UTF-16, expected UTF-8; convert it: iconv -f UTF-16 -t UTF-8")
        file.seek(0)
        columns = text_columns(file, kind)
    if not columns and kind == "jsonl":
        raise BadInputError(f"{path}: none of its first lines is a JSON object; write one object per line")
    if kind == "csv" and (not columns or (len(columns) == 1 and any(mark in columns[0] for mark in ";\t|"))):
        raise BadInputError(
            f"{path}: its first line is no header with commas between the columns; write commas (or tabs, as .tsv)"
        )
    if any("\r" in name for name in columns):
        raise BadInputError(f"{path}: its lines end in CR alone; convert it: tr '\\r' '\\n' < FILE > NEW")
    return columns


def pieces_of(paths: Sequence[str]) -> list[Piece]:
    """Every file in its pieces, in order. Rows are counted from 1."""
    pieces: list[Piece] = []
    for number, path in enumerate(paths):
        if FORMATS[_suffix(path)] != "parquet":
            pieces.append(Piece(path, number, 0, 1))
            continue
        first_row = 1
        with _opened(path) as file:
            metadata = pq.ParquetFile(file).metadata
        for group in range(metadata.num_row_groups):
            pieces.append(Piece(path, number, group, first_row))
            first_row += metadata.row_group(group).num_rows
    return pieces


def read_piece(piece: Piece, columns: Mapping[str, str]) -> Iterator[pa.RecordBatch]:
    """Batches with our column names, `row` (int64) and `unparsable` (bool).

    `columns` maps our name to the file's; a column that the file lacks is all null. Raises BadInputError
    where the file cannot be read further (damaged Parquet or gzip).
    """
    kind = FORMATS[_suffix(piece.path)]
    row = piece.first_row
    with _opened(piece.path) as file:
        batches = (
            _parquet_batches(file, piece, columns)
            if kind == "parquet"
            else text_batches(file, kind, columns, BATCH_ROWS)
        )
        for batch in batches:
            numbers = pa.array(np.arange(row, row + len(batch)))
            row += len(batch)
            yield batch.append_column("row", numbers)


def _parquet_batches(file: Any, piece: Piece, columns: Mapping[str, str]) -> Iterator[pa.RecordBatch]:
    parquet = pq.ParquetFile(file, page_checksum_verification=True)
    present = [name for name in columns.values() if name in parquet.schema_arrow.names]
    for name in present:
        try:
            as_text(pa.array([], parquet.schema_arrow.field(name).type))
        except BadInputError as error:
            raise BadInputError(f"{piece.path}, column {name!r}: {error}") from None
    for batch in parquet.iter_batches(BATCH_ROWS, row_groups=[piece.row_group], columns=present):
        arrays = [
            batch.column(name) if name in present else pa.nulls(len(batch), pa.string()) for name in columns.values()
        ]
        parsable = pa.repeat(pa.scalar(False), len(batch))
        yield pa.RecordBatch.from_arrays([*arrays, parsable], names=[*columns, "unparsable"])


@contextmanager
def _opened(path: str) -> Iterator[Any]:
    try:
        with fsspec.open(path, "rb", compression="infer") as file:
            yield file
    except (pa.ArrowException, OSError, EOFError, zlib.error) as error:
        raise BadInputError(f"{path} cannot be read: {error}") from None


def _suffix(path: str) -> str:
    return PurePosixPath(path.removesuffix(".gz")).suffix.lower()


def _is_hidden(path: str, root: str) -> bool:
    inside = path.removeprefix(root).split("/")
    return any(part.startswith((".", "_")) for part in inside if part)
