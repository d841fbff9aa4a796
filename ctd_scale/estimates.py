"""What a stage will need, said before it runs, and how that is measured."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np


@dataclass(frozen=True)
class Estimate:
    """What one stage needs: seconds, bytes of memory beyond the interpreter's, bytes on disk; where they come from."""

    stage: str
    seconds: float
    memory: float
    disk: float
    reason: str


def seconds_per_call(work: Callable[[], object], budget: float = 3.0, warm_up: int = 1, at_most: int = 50) -> float:
    """Mean time of a call, after some to warm up; stops after `budget` seconds or `at_most` calls."""
    for _ in range(warm_up):
        work()
    calls, started = 0, time.perf_counter()
    while calls == 0 or (calls < at_most and time.perf_counter() - started < budget):
        work()
        calls += 1
    return (time.perf_counter() - started) / calls


def seconds_per_byte_written(folder: Path, size: int = 1 << 27) -> float:
    """How long a byte takes to reach the disk under `folder`."""
    file, block = folder / "written", np.random.default_rng(0).bytes(size)
    started = time.perf_counter()
    with file.open("wb") as opened:
        opened.write(block)
        opened.flush()
        os.fsync(opened.fileno())
    elapsed = time.perf_counter() - started
    file.unlink()
    return elapsed / size


def anonymous_memory() -> float:
    """Bytes of this process that are not mapped files (which the system takes back when it must)."""
    status = Path("/proc/self/status")
    if not status.exists():  # another system than Linux
        return 0.0
    lines = status.read_text().splitlines()
    return 1024 * float(next(line.split()[1] for line in lines if line.startswith("RssAnon")))


@contextmanager
def peak_memory() -> Iterator[list[float]]:
    """The most anonymous memory so far, in bytes above that at the start, as the one element of the list."""
    start, most, stop = anonymous_memory(), [0.0], threading.Event()

    def watch() -> None:
        while not stop.wait(0.01):
            most[0] = max(most[0], anonymous_memory() - start)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield most
    finally:
        stop.set()
        thread.join()
