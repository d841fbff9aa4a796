"""What a person at a terminal sees: the console, and the error that ends a command without a traceback.

Nothing heavy is imported here: a command that trains nothing answers at once.
"""

from __future__ import annotations

import sys

from rich.console import Console

# Redirected output gets a width in which the tables fit.
console = Console(width=None if sys.stdout is not None and sys.stdout.isatty() else 120)


class TrainingError(RuntimeError):
    """A training stage failed after its retries; the message carries the worker's error."""


class ServingError(RuntimeError):
    """The endpoint did not come up; the message says where it was looked for."""
