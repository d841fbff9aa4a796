"""The rows that are left out: what is written of them, and when they are too many to go on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from ctd_scale.batches import write_table
from ctd_scale.interactions.schema import BadInputError

QUARANTINE = "quarantine.parquet"
SHOWN_BAD_ROWS = 5


def quarantine_rows(rows: pa.Table, labels: Sequence[str]) -> pa.Table:
    """Refused rows as file, row (from 1), user_id, item_id, time (raw text), reason; null where not known."""
    nothing = pa.nulls(len(rows), pa.string())
    users, times = (rows[name] if name in rows.column_names else nothing for name in ("user_id", "time"))
    columns = {
        "file": pa.array(labels, pa.string()).take(rows["file"].combine_chunks()),
        "row": rows["row"],
        "user_id": users,
        "item_id": rows["item_id"],
        "time": times,
        "reason": rows["reason"],
    }
    return pa.table(columns)


def refuse_too_many(bad: pa.Table, total: int, paths: Sequence[str], max_bad_fraction: float, kept_at: Path) -> None:
    """Raise BadInputError where more than this share of the rows is bad; they are then kept at `kept_at`."""
    if len(bad) / total <= max_bad_fraction:
        return
    keep_quarantine(bad, kept_at)
    lines = [
        f"{list_paths(paths)}: {len(bad):,} of {total:,} rows ({len(bad) / total:.2%}) cannot be used, "
        f"interactions.max_bad_fraction={max_bad_fraction} allows {int(max_bad_fraction * total + 1e-6):,}",
        f"  {list_reasons(count_reasons(bad))}",
    ]
    for row in bad.slice(0, SHOWN_BAD_ROWS).to_pylist():
        known = [f"{name}={row[name]!r:.60}" for name in ("user_id", "item_id", "time") if row[name] is not None]
        lines.append(f"  {row['file']}:{row['row']} {row['reason']} {' '.join(known)}".rstrip())
    lines.append(f"  all of them: {kept_at}")
    lines.append("  repair the rows, or leave them out by raising interactions.max_bad_fraction")
    raise BadInputError("\n".join(lines))


def keep_quarantine(rows: pa.Table, path: Path) -> None:
    """Write refused rows where they outlive a refused run."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_table(rows, path)


def count_reasons(rows: pa.Table) -> dict[str, int]:
    """How many rows each reason has, most first."""
    counts: list[dict[str, Any]] = pc.value_counts(rows["reason"]).to_pylist()
    return {entry["values"]: entry["counts"] for entry in sorted(counts, key=lambda entry: -entry["counts"])}


def list_reasons(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{reason}: {count:,}" for reason, count in counts.items())


def list_paths(paths: Sequence[str]) -> str:
    return paths[0] if len(paths) == 1 else f"{paths[0]} and {len(paths) - 1:,} more"


def label_paths(paths: Sequence[str]) -> list[str]:
    """File names, with as much of their folders as tells them apart."""
    levels = zip(*(path.split("/")[:-1] for path in paths), strict=False)
    shared = len(list(takewhile(lambda level: len(set(level)) == 1, levels)))
    return ["/".join(path.split("/")[shared:]) for path in paths]
