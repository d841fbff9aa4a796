"""On what a figure was measured: machine and versions, without names."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version

PACKAGES = ("torch", "ray", "numpy", "torch-geometric", "deepspeed", "transformers", "scann", "faiss-cpu")


def machine() -> str:
    """Cores, memory and architecture; no names."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return f"{os.cpu_count()} cores, {memory:.0f} GiB, {platform.machine()}, CPython {platform.python_version()}"


def versions() -> dict[str, str]:
    """The installed ones of the packages that decide a figure."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
