"""What every benchmark writes: one row a case, with the machine and the versions that it ran on."""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

from ctd_scale.environment import machine, versions


@dataclass(frozen=True)
class Case:
    """Ours beside a rival, in one unit; `ratio` above 1 means that ours is better."""

    bench: str
    case: str
    unit: str
    ours: float
    rival: float | None = None
    rival_name: str = ""
    ratio: float | None = None


def parser(description: str | None) -> argparse.ArgumentParser:
    """`--size small|full --json PATH`."""
    made = argparse.ArgumentParser(description=description)
    made.add_argument("--size", choices=("small", "full"), default="small", help="small ends within minutes")
    made.add_argument("--json", type=Path, help="where the cases are written")
    return made


def apart(measure: Callable[..., list[Case]], *arguments: object) -> list[Case]:
    """The cases of one size, measured in a process of their own, so that its memory is its own, and shown."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        measured = pool.submit(measure, *arguments).result()
    show(measured)
    return measured


def show(cases: list[Case]) -> None:
    for case in cases:
        rival = f"  {case.rival_name} {case.rival:.4g}  ratio {case.ratio:.2f}" if case.rival and case.ratio else ""
        print(f"{case.bench:12} {case.case:64} {case.ours:12.4g} {case.unit}{rival}", flush=True)


def write(cases: list[Case], path: Path | None) -> None:
    """Write the cases as JSON where asked."""
    if path is not None:
        command = f"python -m {Path(sys.argv[0]).parent.name}.{Path(sys.argv[0]).stem} {' '.join(sys.argv[1:])}"
        shared = {"machine": machine(), "versions": versions(), "command": command}
        path.write_text(json.dumps([asdict(case) | shared for case in cases], indent=2) + "\n")
