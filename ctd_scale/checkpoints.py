"""Which checkpoint a killed stage goes on from: the newest one of which nothing is missing.

Ray Train keeps a list of its checkpoints in one file that it rewrites in place, so a kill can leave that file empty and
every later start in error; and a kill can leave a checkpoint half-copied or half-deleted. Hence each checkpoint says by
itself what belongs to it, and Ray's list is not read.
"""

from __future__ import annotations

import json
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import fsspec

PREFIX = "checkpoint_"  # Ray Train names them by time, so the newest sorts last
CONTENTS = "contents-{writer}.json"
SNAPSHOT = "checkpoint_manager_snapshot.json"
SCRATCH, LEFT_S = "ctd-checkpoint-", 86_400


@contextmanager
def scratch() -> Iterator[Path]:
    """A folder on this machine to write a checkpoint in before it is stored. Those that killed workers have left for a
    day are removed."""
    for left in Path(tempfile.gettempdir()).glob(f"{SCRATCH}*"):
        with suppress(OSError):  # somebody else's
            if time.time() - left.stat().st_mtime > LEFT_S:
                shutil.rmtree(left)
    with tempfile.TemporaryDirectory(prefix=SCRATCH) as folder:
        yield Path(folder)


def seal(folder: Path, writer: int, writers: int) -> None:
    """Write down the files of `folder` and their sizes, as the part of one of the checkpoint's writers (ranks)."""
    sizes = {str(file.relative_to(folder)): file.stat().st_size for file in sorted(folder.rglob("*")) if file.is_file()}
    (folder / CONTENTS.format(writer=writer)).write_text(json.dumps({"writers": writers, "sizes": sizes}))


def keep_newest(folder: str) -> str | None:
    """The newest complete checkpoint under a path or URL, or None. Everything else there is removed."""
    filesystem, path = fsspec.url_to_fs(folder)
    if not filesystem.exists(path):
        return None
    names = sorted(entry.rstrip("/").rsplit("/", 1)[-1] for entry in filesystem.ls(path, detail=False))
    kept = None
    for name in reversed([name for name in names if name.startswith(PREFIX) and name != SNAPSHOT]):
        if kept is None and is_complete(filesystem, f"{path}/{name}"):
            kept = name
        else:
            filesystem.rm(f"{path}/{name}", recursive=True)
    if SNAPSHOT in names:
        filesystem.rm(f"{path}/{SNAPSHOT}")
    return f"{folder}/{kept}" if kept is not None else None


def is_complete(filesystem: fsspec.AbstractFileSystem, path: str) -> bool:
    """Whether all writers have sealed their part and every file has the size that was written down."""
    writer, writers = 0, 1
    while writer < writers:
        try:
            part = json.loads(filesystem.cat_file(f"{path}/{CONTENTS.format(writer=writer)}"))
            if any(filesystem.size(f"{path}/{file}") != size for file, size in part["sizes"].items()):
                return False
        except (FileNotFoundError, ValueError):
            return False
        writer, writers = writer + 1, int(part["writers"])
    return True


def discard(folder: str, stage: str) -> None:
    """Remove the resumable state of a stage on this machine: once its artifact is published nothing needs it."""
    if "://" not in folder:
        for checkpoints in Path(folder).glob(f"{stage}-*"):
            shutil.rmtree(checkpoints, ignore_errors=True)


def discard_staged(folder: Path, stage: str, outputs: Sequence[str]) -> None:
    """Remove what was staged for a stage that is over: what its workers exported, of which its artifacts are copies
    (`stage`: the name of its checkpoints, if it has any), and what killed starts had begun to write of the artifacts.
    """
    begun = [f"{output.replace('/', '-')}-{'[0-9a-f]' * 8}" for output in outputs]
    for pattern in [f"{stage}-*-export", *begun] if stage else begun:
        for left in folder.glob(pattern):
            shutil.rmtree(left, ignore_errors=True)
