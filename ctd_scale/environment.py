"""The environment: what libraries read of it, where the cache lies, and on what a figure was measured (machine,
versions and code, no names)."""

from __future__ import annotations

import os
import platform
import subprocess
from collections import Counter
from importlib.metadata import PackageNotFoundError, version
from math import ceil
from pathlib import Path

PACKAGES = ("torch", "ray", "numpy", "torch-geometric", "deepspeed", "transformers", "scann", "faiss-cpu")


def set_defaults() -> None:
    """Set what libraries read when they are loaded, unless it is set: call it before torch is imported. Ray's workers
    on this machine inherit it; other nodes of a cluster have it from their image."""
    # Fresh memory in large pages: with small ones, a training step on 200,000 rows spent half its time on page faults.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    # OpenMP's threads wait for each other awake, by default for milliseconds. Where another process wants the core,
    # they wait for one that sleeps: two training loops of two threads on two cores made 5 steps a second instead of 55.
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")


def cache_folder() -> Path:
    """What can be made or fetched again: backbones, downloaded sets, artifacts of remote runs, what is compiled."""
    return Path(os.environ.get("CTD_CACHE_DIR") or Path.home() / ".cache" / "ctd-scale").expanduser().absolute()


def cores(cgroups: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> int:
    """How many cores this process may use: of those of the machine, those it is bound to, and no more than the CPU
    quota of its control group (v2 or v1), and of all above it, pays for, rounded up: a container may have less than the
    machine."""
    bound = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(os.cpu_count() or 1, bound, *map(ceil, _quotas(cgroups, own))))


def share_of_cores(processes: int) -> int:
    """Threads for each of so many processes on this machine, at least one."""
    return max(1, cores() // processes)


def _quotas(cgroups: Path, own: Path) -> list[float]:
    """CPU quotas in cores. Within a container the group may go by the name that it has outside, and be found at the top
    of what is mounted."""
    try:
        lines = [line.split(":", 2) for line in own.read_text().splitlines()]
    except OSError:  # no Linux
        return []
    found: list[float | None] = []
    for _, controllers, path in lines:
        if controllers and "cpu" not in controllers.split(","):
            continue
        top = cgroups / "cpu" if controllers else cgroups  # v1 names them, v2 has one tree for all
        group = top / path.lstrip("/")
        found += [_quota(folder) for folder in (group, *group.parents) if folder.is_relative_to(top)]
    return [quota for quota in found if quota is not None]


def _quota(group: Path) -> float | None:
    """That of one group alone, None where it has none."""
    try:
        if (group / "cpu.max").exists():
            quota, period = (group / "cpu.max").read_text().split()
        else:
            quota, period = ((group / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
        return float(quota) / float(period) if float(quota) > 0 else None
    except (OSError, ValueError, ZeroDivisionError):  # there is no such file, or it says `max`
        return None


def machine() -> str:
    """Processor, cores, memory, architecture and GPUs; no host's name."""
    import torch  # not above: `set_defaults` comes first

    can = torch.cpu.get_capabilities()
    # Two machines of as many cores may differ eightfold by this alone.
    half = "AMX" if can.get("amx_bf16") else "AVX-512 BF16" if can.get("avx512_bf16") else ""
    processor = " with ".join(filter(None, [str(can.get("cpu_name", "")), half]))
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    first = f"{cores()} cores ({processor}), {memory:.0f} GiB, {platform.machine()}"
    gpus = Counter(torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count()))
    said = [f"{count} x {name}" for name, count in gpus.items()]
    return ", ".join([first, *said, f"CPython {platform.python_version()}"])


def versions() -> dict[str, str]:
    """The installed ones of the packages that decide a figure."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def git_revision() -> str:
    """Of the code, where it is a checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=5).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown"
