"""Raw files to checked tables: the catalogue on the driver, the interactions in Ray Data tasks.

A module of its own, so that a worker process imports Arrow and no training stack.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import ray
import ray.data

from ctd_scale.interactions.quarantine import list_paths
from ctd_scale.interactions.reading import Piece, pieces_of, read_piece
from ctd_scale.interactions.schema import (
    CHECKED_INTERACTION,
    BadInputError,
    check_interactions,
    check_items,
    mark_duplicate_items,
)

UNREADABLE_ROW = 0  # rows count from 1


def read_catalogue(paths: Sequence[str], columns: Mapping[str, str]) -> pa.Table:
    """Checked item rows in file order: item_id, title, category, row, reason, file.

    Read on the driver, which holds the whole catalogue anyway. Raises BadInputError: no rows.
    """
    tables = [
        _with_file(check_items(batch), piece.file) for piece in pieces_of(paths) for batch in read_piece(piece, columns)
    ]
    if not tables:
        raise BadInputError(f"{list_paths(paths)} holds no items (0 rows)")
    return mark_duplicate_items(pa.concat_tables(tables))


def read_interactions(paths: Sequence[str], columns: Mapping[str, str], known_items: pa.Array) -> pa.Table:
    """Checked interaction rows in file order: user_id, item_id, order, time, row, reason, file.

    Needs a started Ray: one task per piece (a text file, or a row group of a Parquet file), on files that
    every node sees under the same path. Raises BadInputError: no rows, or a file cannot be read to its end.
    """
    pieces = pieces_of(paths)
    blocks: list[pa.Table] = []
    if pieces:
        arguments = {"columns": dict(columns), "known_items": ray.put(known_items)}
        dataset = ray.data.from_items([asdict(piece) for piece in pieces], override_num_blocks=len(pieces))
        checked = dataset.map_batches(_check_batch, batch_size=1, batch_format="pyarrow", fn_kwargs=arguments)
        blocks = [block for block in checked.iter_batches(batch_size=None, batch_format="pyarrow") if len(block)]
    if not blocks:
        raise BadInputError(f"{list_paths(paths)} holds no interactions (0 rows)")
    # A block holds rows that follow each other, so this is file order however the blocks arrived.
    blocks.sort(key=lambda block: (block["file"][0].as_py(), block["row"][0].as_py()))
    rows = pa.concat_tables(blocks)
    unreadable = rows.filter(pc.equal(rows["row"], UNREADABLE_ROW))
    if len(unreadable):
        raise BadInputError(unreadable["reason"][0].as_py())
    return rows


def check_piece(piece: Piece, columns: Mapping[str, str], known_items: pa.Array) -> Iterator[pa.Table]:
    """The checked rows of one piece, a batch at a time."""
    for raw in read_piece(piece, columns):
        checked = check_interactions(raw, position=columns["order"] == "position", known_items=known_items)
        yield _with_file(checked, piece.file)


def _check_batch(batch: pa.Table, columns: dict[str, str], known_items: ray.ObjectRef) -> Iterator[pa.Table]:
    known = ray.get(known_items)
    for values in batch.to_pylist():
        piece = Piece(**values)
        try:
            yield from check_piece(piece, columns, known)
        except BadInputError as error:  # as a row: Ray would bury it in tracebacks of its own
            failure = [{"row": UNREADABLE_ROW, "reason": str(error)}]
            yield _with_file(pa.Table.from_pylist(failure, schema=CHECKED_INTERACTION), piece.file)


def _with_file(table: pa.Table, file: int) -> pa.Table:
    return table.append_column("file", pa.array(np.full(len(table), file, dtype=np.int32)))
