"""What `ctd plan` says of the graph stage before it runs, against what is then measured."""

from __future__ import annotations

import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from benchmarks.bench_graph import SIZES
from benchmarks.bench_interactions import write_raw
from benchmarks.report import Case, apart, parser, write
from ctd_scale.artifacts import Run
from ctd_scale.config import load_config
from ctd_scale.estimates import peak_memory
from ctd_scale.graph import train
from ctd_scale.interactions.prepare import prepare_interactions
from ctd_scale.plan import plan_run
from ctd_scale.training import start_ray

# One epoch of small neighbourhoods, so that the largest log ends within minutes.
OVERRIDES = ["graph.epochs=1", "graph.fanout=[4, 2]", "graph.batch_size=16384", "graph.checkpoint_every_steps=500"]
MEMORY = "memory.txt"
train_loop = train.train_loop


def watched_loop(arguments: dict[str, Any]) -> None:
    """The stage's own loop, and the most memory that it had beyond the interpreter's."""
    with peak_memory() as most:
        train_loop(arguments)
    Path(arguments["logs"], MEMORY).write_text(str(most[0]))


def kept_while_training(run: Run, stop: threading.Event, most: list[float]) -> None:
    """The most bytes of files below the run's folder."""
    while not stop.wait(0.5):
        total = 0
        for file in run.root.rglob("*"):
            try:
                total += file.stat().st_size if file.is_file() else 0
            except OSError:  # gone meanwhile
                continue
        most[0] = max(most[0], total)


def cases_of(name: str) -> list[Case]:
    from benchmarks import bench_plan as importable  # Ray's workers cannot find what is defined in __main__

    users, items, interactions = SIZES[name]
    with tempfile.TemporaryDirectory() as root:
        keys = write_raw(Path(root), users, items, interactions)
        config = load_config(None, [*OVERRIDES, *(f'interactions.{key}="{value}"' for key, value in keys.items())])
        run = Run(root, "planned")
        start_ray()
        started = time.perf_counter()
        (planned,) = plan_run(run, config, "graph")
        planning = time.perf_counter() - started
        print(planned.reason, flush=True)
        prepare_interactions(config.interactions, run, "key")
        before = sum(file.stat().st_size for file in run.root.rglob("*") if file.is_file())
        train.train_loop = importable.watched_loop
        stop, disk = threading.Event(), [0.0]
        watch = threading.Thread(target=kept_while_training, args=(run, stop, disk), daemon=True)
        watch.start()
        started = time.perf_counter()
        train.train_graph(run, config, "key")
        elapsed = time.perf_counter() - started
        stop.set()
        watch.join()
        memory = float((run.root / "logs" / "graph" / MEMORY).read_text())

    def against(what: str, unit: str, said: float, measured: float) -> Case:
        return Case("plan", f"{what}, {name}", unit, said, measured, "measured", said / measured)

    return [
        against("time of the graph stage", "s", planned.seconds, elapsed),
        against("memory of its worker", "MB", planned.memory / 1e6, memory / 1e6),
        against("disk", "MB", planned.disk / 1e6, (disk[0] - before) / 1e6),
        Case("plan", f"planning takes, {name}", "s", planning),
    ]


def main() -> None:
    options = parser(__doc__).parse_args()
    from benchmarks import bench_plan as importable

    cases: list[Case] = []
    for name in ("5M",) if options.size == "small" else ("5M", "50M"):
        cases += apart(importable.cases_of, name)
    write(cases, options.json)


if __name__ == "__main__":
    main()
