"""Preparing a log of Parquet files: rows per second, and how much memory the process that sorts them needs."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.bench_graph import SIZES
from benchmarks.report import Case, apart, parser, write
from ctd_scale.artifacts import Run
from ctd_scale.config import InteractionsConfig
from ctd_scale.estimates import peak_memory
from ctd_scale.interactions.prepare import prepare_interactions
from ctd_scale.interactions.sketch import sketch_log
from ctd_scale.training import start_ray

ROW_GROUP = 1_000_000


def write_raw(folder: Path, users: int, items: int, interactions: int) -> dict[str, str]:
    """Rows in no order, items by a power law; the config keys that name the files."""
    rng = np.random.default_rng(0)
    log, catalogue = folder / "log.parquet", folder / "items.parquet"
    schema = pa.schema([("user_id", pa.int64()), ("item_id", pa.int64()), ("timestamp", pa.int64())])
    with pq.ParquetWriter(log, schema) as writer:
        for start in range(0, interactions, ROW_GROUP):
            count = min(ROW_GROUP, interactions - start)
            columns = [
                rng.integers(users, size=count),
                (items * rng.random(count) ** 2).astype(np.int64),
                rng.integers(1_500_000_000, 1_700_000_000, count),
            ]
            writer.write_table(pa.table(columns, schema=schema), row_group_size=ROW_GROUP)
    ids = np.arange(items)
    pq.write_table(pa.table({"item_id": ids, "title": [f"title of item {item}" for item in ids]}), catalogue)
    return {"dataset": "files", "interactions": str(log), "items": str(catalogue)}


def cases_of(name: str) -> list[Case]:
    users, items, interactions = SIZES[name]
    with tempfile.TemporaryDirectory() as root:
        config = InteractionsConfig.model_validate(write_raw(Path(root), users, items, interactions))
        run = Run(root, "bench")
        run.root.mkdir()
        start_ray()
        with peak_memory() as memory:
            started = time.perf_counter()
            report = prepare_interactions(config, run, "key")
            elapsed = time.perf_counter() - started
        started = time.perf_counter()
        sketch_log(config)
        sketching = time.perf_counter() - started
    said = f"{report.users:,} users, {report.items:,} items, {report.interactions:,} rows"
    return [
        Case("prepare", f"{name}: {said}", "rows/s", interactions / elapsed),
        Case("prepare", f"peak memory, {name}", "MB", memory[0] / 1e6),
        Case("prepare", f"sketched for a plan, {name}", "rows/s", interactions / sketching),
    ]


def main() -> None:
    options = parser(__doc__).parse_args()
    from benchmarks import bench_interactions as importable

    cases: list[Case] = []
    for name in ("5M", "50M") if options.size == "full" else ("1M",):
        cases += apart(importable.cases_of, name)
    write(cases, options.json)


if __name__ == "__main__":
    main()
