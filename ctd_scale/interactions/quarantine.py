"""The rows that are left out: what is written of them, and when they are too many to go on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from pathlib import Path
from types import TracebackType
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ctd_scale.interactions.schema import BadInputError

QUARANTINE = "quarantine.parquet"
SHOWN_BAD_ROWS = 5
SCHEMA = pa.schema(
    [
        ("file", pa.string()),
        ("row", pa.int64()),
        ("user_id", pa.string()),
        ("item_id", pa.string()),
        ("time", pa.string()),
        ("reason", pa.string()),
    ]
)


@dataclass
class Refused:
    """How many rows were refused, for which reasons, and the first of them."""

    reasons: Counter[str] = field(default_factory=Counter)
    first: list[dict[str, Any]] = field(default_factory=list)

    def add(self, rows: pa.Table) -> None:
        self.reasons.update({entry["values"]: entry["counts"] for entry in pc.value_counts(rows["reason"]).to_pylist()})
        self.first += rows.slice(0, SHOWN_BAD_ROWS - len(self.first)).to_pylist()


class Quarantine:
    """A Parquet file of refused rows: file, row (from 1), user_id, item_id, time (raw text), reason; null where not
    known. Written as the rows come, and there under its name once they are complete, also where the run is refused.
    """

    def __init__(self, path: Path, labels: Sequence[str]) -> None:
        self.path = path
        self._labels = pa.array(labels, pa.string())
        self._aside = path.with_name(f".{path.name}")
        path.parent.mkdir(parents=True, exist_ok=True)
        self._writer = pq.ParquetWriter(self._aside, SCHEMA, write_page_checksum=True)

    def add(self, rows: pa.Table, refused: Refused) -> None:
        """Rows of a checked table (`file` is a place among the labels) that have a reason, counted in `refused`."""
        if not len(rows):
            return
        given = {name: rows[name] for name in rows.column_names}
        given["file"] = self._labels.take(rows["file"].combine_chunks())
        table = pa.table([given.get(name, pa.nulls(len(rows), pa.string())) for name in SCHEMA.names], schema=SCHEMA)
        refused.add(table)
        self._writer.write_table(table)

    def __enter__(self) -> Quarantine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._writer.close()
        if kind is None or issubclass(kind, BadInputError):
            self._aside.replace(self.path)
        else:
            self._aside.unlink()


def refuse_too_many(refused: Refused, total: int, paths: Sequence[str], max_bad_fraction: float, kept_at: Path) -> None:
    """Raise BadInputError where more than this share of the rows is bad, or all are; `kept_at` is where they lie."""
    bad = refused.reasons.total()
    if bad / total <= max_bad_fraction and bad < total:
        return
    allowed = f", interactions.max_bad_fraction={max_bad_fraction} allows {int(max_bad_fraction * total + 1e-6):,}"
    lines = [
        f"{list_paths(paths)}: {bad:,} of {total:,} rows ({bad / total:.2%}) cannot be used"
        + (allowed if max_bad_fraction < 1 else ""),
        f"  {list_reasons(dict(refused.reasons.most_common()))}",
    ]
    for row in refused.first:
        known = [f"{name}={row[name]!r:.60}" for name in ("user_id", "item_id", "time") if row[name] is not None]
        lines.append(f"  {row['file']}:{row['row']} {row['reason']} {' '.join(known)}".rstrip())
    lines.append(f"  all of them: {kept_at}")
    instead = ", or leave them out by raising interactions.max_bad_fraction" if bad < total else ""
    lines.append(f"  repair the rows{instead}")
    raise BadInputError("\n".join(lines))


def list_reasons(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{reason}: {count:,}" for reason, count in counts.items())


def list_paths(paths: Sequence[str]) -> str:
    return paths[0] if len(paths) == 1 else f"{paths[0]} and {len(paths) - 1:,} more"


def label_paths(paths: Sequence[str]) -> list[str]:
    """File names, with as much of their folders as tells them apart."""
    levels = zip(*(path.split("/")[:-1] for path in paths), strict=False)
    shared = len(list(takewhile(lambda level: len(set(level)) == 1, levels)))
    return ["/".join(path.split("/")[shared:]) for path in paths]
