"""Raw files to checked tables: the catalogue on the driver, the interactions in Ray Data tasks.

A module of its own, so that a worker process imports Arrow and no training stack.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import ray
import ray.data

from ctd_scale.interactions.parts import add_parts
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


class Checked(NamedTuple):
    """A block of checked rows, and how many of all pieces were read when it ends."""

    good: pa.Table
    bad: pa.Table
    pieces: int
    of: int


def read_interactions(
    paths: Sequence[str], columns: Mapping[str, str], known_items: pa.Array, *, num_parts: int, keep_raw: bool
) -> Iterator[Checked]:
    """Checked interaction rows: user_id, item_id, order, time, row, reason, item, file, place, part.

    Good rows have item_id and time only if `keep_raw`. Needs a started Ray: one task per piece (a text file, or a row
    group of a Parquet file), on files that every node sees under the same path. Raises BadInputError: no rows, or a
    file cannot be read to its end.
    """
    pieces = pieces_of(paths)
    starts = [(piece.file, piece.first_row) for piece in pieces]
    some = False
    if pieces:
        task = {"columns": dict(columns), "known_items": ray.put(known_items)}
        dataset = ray.data.from_items([asdict(piece) for piece in pieces], override_num_blocks=len(pieces))
        checked = dataset.map_batches(
            _check_batch,
            batch_size=1,
            batch_format="pyarrow",
            fn_kwargs={**task, "num_parts": num_parts, "keep_raw": keep_raw},
        )
        for rows in checked.iter_batches(batch_size=None, batch_format="pyarrow"):
            if not len(rows):
                continue
            some = True
            is_good = pc.is_null(rows["reason"])
            bad = rows.filter(pc.invert(is_good))
            unreadable = bad.filter(pc.equal(bad["row"], UNREADABLE_ROW))
            if len(unreadable):
                raise BadInputError(unreadable["reason"][0].as_py())
            last = rows["file"][-1].as_py(), rows["row"][-1].as_py()
            yield Checked(rows.filter(is_good), bad, bisect_right(starts, last), len(pieces))
    if not some:
        raise BadInputError(f"{list_paths(paths)} holds no interactions (0 rows)")


def check_piece(piece: Piece, columns: Mapping[str, str], known_items: pa.Array) -> Iterator[pa.Table]:
    """The checked rows of one piece, a batch at a time."""
    for raw in read_piece(piece, columns):
        checked = check_interactions(raw, position=columns["order"] == "position", known_items=known_items)
        yield _with_file(checked, piece.file)


def _check_batch(
    batch: pa.Table, columns: dict[str, str], known_items: ray.ObjectRef, num_parts: int, keep_raw: bool
) -> Iterator[pa.Table]:
    known = ray.get(known_items)
    for values in batch.to_pylist():
        piece = Piece(**values)
        try:
            for rows in check_piece(piece, columns, known):
                yield add_parts(rows if keep_raw else _without_raw(rows), num_parts)
        except BadInputError as error:  # as a row: Ray would bury it in tracebacks of its own
            failure = [{"row": UNREADABLE_ROW, "reason": str(error)}]
            rows = _with_file(pa.Table.from_pylist(failure, schema=CHECKED_INTERACTION), piece.file)
            yield add_parts(rows, num_parts)


def _without_raw(rows: pa.Table) -> pa.Table:
    """Good rows without what only the quarantine wants to know."""
    is_bad = pc.is_valid(rows["reason"])
    for name in ("item_id", "time"):
        place = rows.schema.get_field_index(name)
        rows = rows.set_column(place, name, pc.if_else(is_bad, rows[name], pa.scalar(None, pa.string())))
    return rows


def _with_file(table: pa.Table, file: int) -> pa.Table:
    return table.append_column("file", pa.array(np.full(len(table), file, dtype=np.int32)))
