"""Which checkpoint a killed stage goes on from: the newest one of which nothing is missing.

Ray Train keeps a list of its checkpoints in one file that it rewrites in place, so a kill can leave that file empty and
every later start in error; and a kill can leave a checkpoint half-copied or half-deleted. Hence each checkpoint says by
itself what belongs to it, and Ray's list is not read. What a killed driver has started goes on for a moment, writing
and deleting: hence each start has a folder of its own, and takes what it goes on from out of that of the one before.
"""

from __future__ import annotations

import json
import shutil
import tempfile
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import fsspec

PREFIX = "checkpoint_"  # Ray Train names them by time, so the newest sorts last
KEPT = "kept"
CONTENTS = "contents-{writer}.json"
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


def new_start() -> str:
    """The name of the folder of a start, which no other has."""
    return f"{time.strftime('%Y-%m-%d_%H-%M-%S')}-{uuid.uuid4().hex[:8]}"


def keep_newest(folder: str) -> str | None:
    """The newest complete checkpoint of all starts under a path or URL, or None. It is moved to `folder`/kept, and
    everything else there is removed."""
    filesystem, path = fsspec.url_to_fs(folder)
    for name, found in sorted(_found(filesystem, path), reverse=True):
        target = f"{path}/{KEPT}/{name}"
        if not is_complete(filesystem, found):
            continue
        if found != target:
            filesystem.makedirs(f"{path}/{KEPT}", exist_ok=True)
            if filesystem.exists(target):  # half of it, where a kill came while it was moved
                filesystem.rm(target, recursive=True)
            with suppress(FileNotFoundError):  # who has just been killed was deleting it; of other errors nothing goes
                filesystem.mv(found, target, recursive=True)
            if not is_complete(filesystem, target):
                continue
        _remove(filesystem, path, but=KEPT)
        _remove(filesystem, f"{path}/{KEPT}", but=name)
        return f"{folder}/{KEPT}/{name}"
    _remove(filesystem, path)
    return None


def _found(filesystem: fsspec.AbstractFileSystem, path: str) -> Iterator[tuple[str, str]]:
    """Name and path of every checkpoint, whole or not."""
    for start in _entries(filesystem, path):
        for entry in _entries(filesystem, f"{path}/{start}"):
            if entry.startswith(PREFIX):
                yield entry, f"{path}/{start}/{entry}"


def _entries(filesystem: fsspec.AbstractFileSystem, path: str) -> list[str]:
    try:
        entries = filesystem.ls(path, detail=False)
    except (FileNotFoundError, NotADirectoryError):
        return []
    return [entry.rstrip("/").rsplit("/", 1)[-1] for entry in entries if entry.rstrip("/") != path]


def _remove(filesystem: fsspec.AbstractFileSystem, path: str, but: str = "") -> None:
    """Remove all in a folder. What is written at the same time may stay: the next start removes it."""
    for entry in _entries(filesystem, path):
        if entry != but:
            with suppress(OSError):
                filesystem.rm(f"{path}/{entry}", recursive=True)


def is_complete(filesystem: fsspec.AbstractFileSystem, path: str) -> bool:
    """Whether all writers have sealed their part and every file has the size that was written down."""
    writer, writers = 0, 1
    while writer < writers:
        try:
            part = json.loads(filesystem.cat_file(f"{path}/{CONTENTS.format(writer=writer)}"))
            if any(filesystem.size(f"{path}/{file}") != size for file, size in part["sizes"].items()):
                return False
        except (FileNotFoundError, NotADirectoryError, ValueError):  # Ray's list, too, is called checkpoint_...
            return False
        writer, writers = writer + 1, int(part["writers"])
    return True


def discard(folder: str, stage: str) -> None:
    """Remove the resumable state of a stage from a path or URL: once its artifact is published nothing needs it."""
    filesystem, path = fsspec.url_to_fs(folder)
    filesystem.invalidate_cache()  # of listings: they were written by workers
    with suppress(OSError):  # what stays does no harm
        for entry in _entries(filesystem, path):
            if entry.startswith(f"{stage}-"):
                filesystem.rm(f"{path}/{entry}", recursive=True)


def discard_staged(folder: Path, stage: str, outputs: Sequence[str]) -> None:
    """Remove what was staged for a stage that is over: what its workers exported, of which its artifacts are copies
    (`stage`: the name of its checkpoints, if it has any), and what killed starts had begun to write of the artifacts.
    """
    begun = [f"{output.replace('/', '-')}-{'[0-9a-f]' * 8}" for output in outputs]
    for pattern in [f"{stage}-*-export", *begun] if stage else begun:
        for left in folder.glob(pattern):
            shutil.rmtree(left, ignore_errors=True)
