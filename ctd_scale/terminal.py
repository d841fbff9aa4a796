"""What a person at a terminal sees: the console, and the error that ends a command without a traceback.

Nothing heavy is imported here: a command that trains nothing answers at once.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from rich.console import Console

# Redirected output gets a width in which the tables fit.
# A title may hold what looks like the name of an emoji.
console = Console(width=None if sys.stdout is not None and sys.stdout.isatty() else 120, emoji=False)

INTERRUPTED = 130  # what typer makes of Ctrl-C
INTERRUPTION = "interrupted; what is finished stays, and the same command goes on from there"
# An interrupted process has ended by then: less than the half minute that Kubernetes grants.
ENDING_S = 20.0


class TrainingError(RuntimeError):
    """A training stage failed after its retries; the message carries the worker's error."""


class ServingError(RuntimeError):
    """The endpoint did not come up; the message says where it was looked for."""


@contextmanager
def interruptible() -> Iterator[None]:
    """Within, Ctrl-C and SIGTERM interrupt a command, from its beginning on and for certain (`_end_for_certain`)."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def interrupt(*_: object) -> None:
        _end_for_certain()
        raise KeyboardInterrupt

    if before[signal.SIGINT] is signal.default_int_handler:
        signal.signal(signal.SIGINT, interrupt)
    take_sigterm_as_ctrl_c()
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _end_for_certain() -> None:
    """End this process in `ENDING_S`, if nothing else does. Python loses an interruption that comes within the callback
    of a weak reference; and where the signal went to Ray's servers, too, as systemd sends it, Ray waits a minute for
    them."""

    def end() -> None:
        print(INTERRUPTION, file=sys.stderr, flush=True)
        os._exit(INTERRUPTED)

    timer = threading.Timer(ENDING_S, end)
    timer.daemon = True
    timer.start()


def take_sigterm_as_ctrl_c() -> None:
    """From now on SIGTERM, which batch systems send, ends this process as Ctrl-C does, and also where a shell has made
    it deaf to Ctrl-C, as it does in the background."""

    def end(_: int, frame: FrameType | None) -> None:
        _end_for_certain()
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
