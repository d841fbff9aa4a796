"""Good rows on disk, divided by user: one part at a time fits in memory, however many rows there are.

The first half of an external sort; `sequences.py` is the second.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

# Raw bytes per part: about a million rows of text, or a few million of Parquet.
PART_BYTES = 32 << 20
# All parts are open while they are written.
MAX_PARTS = 512
# Rows of a file that a place has room for.
FILE_ROWS = 1 << 40


def count_parts(paths: Sequence[str]) -> int:
    """How many parts the rows of these files are divided into."""
    total = 0
    for path in paths:
        filesystem, root = fsspec.url_to_fs(path)
        total += int(filesystem.size(root))
    return min(max(-(-total // PART_BYTES), 1), MAX_PARTS)


def add_parts(rows: pa.Table, num_parts: int) -> pa.Table:
    """The same checked rows with `part`, that of the user, and `place`, which orders rows as the files do."""
    encoded = pc.fill_null(rows["user_id"].combine_chunks(), "").dictionary_encode()
    hashes = [zlib.crc32(user) for user in encoded.dictionary.cast(pa.binary()).to_pylist()]
    part = np.array(hashes, np.int64)[encoded.indices.to_numpy()] % num_parts
    place = rows["file"].to_numpy().astype(np.int64) * FILE_ROWS + rows["row"].to_numpy()
    return rows.append_column("part", pa.array(part.astype(np.int16))).append_column("place", pa.array(place))


class PartWriter:
    """Divides tables that have a column `part` into one file per part, without that column."""

    def __init__(self, folder: Path, num_parts: int) -> None:
        self.paths = [folder / f"part-{part}.arrow" for part in range(num_parts)]
        self._writers: list[pa.RecordBatchStreamWriter | None] = [None] * num_parts
        self._rows = 0

    def add(self, rows: pa.Table) -> None:
        part = rows["part"].to_numpy()
        order = np.argsort(part, kind="stable")
        rows = rows.drop_columns("part").take(pa.array(order))
        self._rows += len(rows)
        bounds = np.searchsorted(part[order], np.arange(len(self.paths) + 1))
        for number, (start, stop) in enumerate(zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True)):
            if start < stop:
                writer = self._writers[number] or pa.ipc.new_stream(self.paths[number], rows.schema)
                writer.write_table(rows.slice(start, stop - start))
                self._writers[number] = writer

    def __enter__(self) -> PartWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for writer in self._writers:
            if writer is not None:
                writer.close()

    def read(self) -> Iterator[pa.Table]:
        """The parts that have rows, one after the other, their rows in any order.

        Raises OSError, after the last one, where they are not all the rows that were added.
        """
        found = 0
        for path, writer in zip(self.paths, self._writers, strict=True):
            if writer is None:
                continue
            with pa.OSFile(str(path)) as file:
                rows = pa.ipc.open_stream(file).read_all()
            found += len(rows)
            yield rows
        if found != self._rows:
            raise OSError(f"{self.paths[0].parent} held {found:,} of {self._rows:,} rows when they were read again")
