"""What a person at a terminal sees: the console, and the error that ends a command without a traceback.

Nothing heavy is imported here: a command that trains nothing answers at once.
"""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from rich.console import Console

# Redirected output gets a width in which the tables fit.
console = Console(width=None if sys.stdout is not None and sys.stdout.isatty() else 120)


class TrainingError(RuntimeError):
    """A training stage failed after its retries; the message carries the worker's error."""


class ServingError(RuntimeError):
    """The endpoint did not come up; the message says where it was looked for."""


def take_sigterm_as_ctrl_c() -> None:
    """From now on SIGTERM, which batch systems send, ends this process as Ctrl-C does, and also where a shell has made
    it deaf to Ctrl-C, as it does in the background."""

    def end(_: int, frame: FrameType | None) -> None:
        ctrl_c = signal.getsignal(signal.SIGINT)
        if not callable(ctrl_c):
            raise KeyboardInterrupt
        ctrl_c(signal.SIGINT, frame)

    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, end)


@contextmanager
def ctrl_c_kept() -> Iterator[None]:
    """What is called within may take Ctrl-C for itself and leave the process, as Ray Train does: it is an interruption
    all the same, and afterwards Ctrl-C is what it was. Other threads than the first one know nothing of signals."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGINT)
    try:
        yield
    except SystemExit:
        raise KeyboardInterrupt from None
    finally:
        signal.signal(signal.SIGINT, before)
