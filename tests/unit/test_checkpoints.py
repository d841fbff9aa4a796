"""Of what a kill leaves behind, the newest whole checkpoint is found and the rest is cleared away."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import fsspec
import pytest
from fsspec.implementations.local import LocalFileSystem

from ctd_scale import checkpoints
from ctd_scale.checkpoints import KEPT, discard, discard_staged, keep_newest, new_start, seal


def checkpoint(root: Path, name: str, ranks: int = 1, start: str = "first") -> Path:
    """A checkpoint in which every rank wrote a file of its own, sealed by each as it goes."""
    folder = root / start / f"checkpoint_{name}"
    for rank in range(ranks):
        part = root.parent / f"part-{name}-{rank}"
        (part / "export").mkdir(parents=True)
        (part / f"state-{rank}.pt").write_bytes(b"x" * (10 + rank))
        (part / "export" / f"weights-{rank}").write_bytes(b"y" * 20)
        seal(part, rank, ranks)
        shutil.copytree(part, folder, dirs_exist_ok=True)
    return folder


def test_nothing_was_written_yet(tmp_path: Path) -> None:
    assert keep_newest(str(tmp_path / "graph-1")) is None
    (tmp_path / "graph-1").mkdir()
    assert keep_newest(str(tmp_path / "graph-1")) is None


@pytest.mark.parametrize("ranks", [1, 3])
def test_the_newest_is_kept_and_the_others_go(tmp_path: Path, ranks: int) -> None:
    root = tmp_path / "graph-1"
    for name, start in (("2026-01-01_10", "b"), ("2026-01-03_09", "a"), ("2026-01-02_11", "a")):
        checkpoint(root, name, ranks, start)
    (root / "a" / "checkpoint_manager_snapshot.json").write_text("")
    kept = f"{root}/{KEPT}/checkpoint_2026-01-03_09"
    assert keep_newest(str(root)) == kept
    assert [entry.name for entry in root.iterdir()] == [KEPT]
    assert [entry.name for entry in (root / KEPT).iterdir()] == ["checkpoint_2026-01-03_09"]
    assert keep_newest(str(root)) == kept
    checkpoint(root, "2026-01-03_10", ranks, "c")
    assert keep_newest(str(root)) == f"{root}/{KEPT}/checkpoint_2026-01-03_10"
    assert [entry.name for entry in (root / KEPT).iterdir()] == ["checkpoint_2026-01-03_10"]


def test_what_is_deleted_meanwhile_is_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By what a killed driver has started, which goes on for a moment."""
    root = tmp_path / "graph-1"
    for name in ("1", "2"):
        checkpoint(root, name)
    complete = checkpoints.is_complete

    def asked(filesystem: Any, path: str) -> bool:
        found = complete(filesystem, path)
        if path.endswith("first/checkpoint_2"):
            shutil.rmtree(path)
        return found

    monkeypatch.setattr(checkpoints, "is_complete", asked)
    assert keep_newest(str(root)) == f"{root}/{KEPT}/checkpoint_1"


def test_half_of_it_that_a_kill_left_where_it_was_to_lie_is_replaced(tmp_path: Path) -> None:
    root = tmp_path / "graph-1"
    checkpoint(root, "1")
    shutil.copytree(root / "first" / "checkpoint_1", root / KEPT / "checkpoint_1")
    (root / KEPT / "checkpoint_1" / "state-0.pt").unlink()
    assert keep_newest(str(root)) == f"{root}/{KEPT}/checkpoint_1"
    assert checkpoints.is_complete(fsspec.filesystem("file"), f"{root}/{KEPT}/checkpoint_1")


@pytest.mark.parametrize("broken", ["mv", "ls"])
def test_where_the_storage_fails_nothing_is_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    root = tmp_path / "graph-1"
    whole, list_entries = [checkpoint(root, name) for name in ("1", "2")], LocalFileSystem.ls

    def fails(self: LocalFileSystem, path: str, *arguments: Any, **options: Any) -> Any:
        if broken == "ls" and not path.endswith("first"):
            return list_entries(self, path, *arguments, **options)
        raise PermissionError(path)

    monkeypatch.setattr(LocalFileSystem, broken, fails)
    with pytest.raises(PermissionError):
        keep_newest(str(root))
    assert all((folder / "state-0.pt").exists() for folder in whole)


def test_it_is_kept_where_there_are_no_folders() -> None:
    """In a store of objects, as behind a URL."""
    files = fsspec.filesystem("memory")
    files.pipe("/run/llm-1/first/checkpoint_1/state-0.pt", b"x" * 10)
    part = {"writers": 1, "sizes": {"state-0.pt": 10}}
    files.pipe("/run/llm-1/first/checkpoint_1/contents-0.json", json.dumps(part).encode())
    files.pipe("/run/llm-1/first/checkpoint_2/state-0.pt", b"x" * 10)
    try:
        assert keep_newest("memory://run/llm-1") == "memory://run/llm-1/kept/checkpoint_1"
        assert sorted(files.find("/run/llm-1")) == [
            f"/run/llm-1/kept/checkpoint_1/{name}" for name in ("contents-0.json", "state-0.pt")
        ]
    finally:
        files.rm("/run", recursive=True)


def test_starts_have_names_of_their_own() -> None:
    assert len({new_start() for _ in range(5)}) == 5


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: (folder / "state-0.pt").unlink(),
        lambda folder: (folder / "export" / "weights-1").write_bytes(b"y" * 19),
        lambda folder: (folder / "contents-0.json").unlink(),
        lambda folder: (folder / "contents-1.json").unlink(),
        lambda folder: (folder / "contents-1.json").write_text(""),
        lambda folder: (folder / "contents-0.json").write_text("{"),
    ],
)
def test_what_is_not_whole_is_passed_over(tmp_path: Path, damage: object) -> None:
    root = tmp_path / "llm-1"
    checkpoint(root, "1", ranks=2)
    newest = checkpoint(root, "2", ranks=2)
    assert callable(damage)
    damage(newest)
    assert keep_newest(str(root)) == f"{root}/{KEPT}/checkpoint_1"
    assert not newest.exists()


@pytest.mark.parametrize("where", ["", "file://", "memory://"])
def test_once_a_stage_is_over_its_checkpoints_go(tmp_path: Path, where: str) -> None:
    folder = f"{where}{tmp_path}/checkpoints"
    files, path = fsspec.url_to_fs(folder)
    discard(folder, "llm")  # there is nothing yet
    for name in ("llm-0123/first/checkpoint_1/state-0.pt", "llm-4567/kept/x/y", "llm_more-0123/x", "graph-0123/x"):
        files.pipe(f"{path}/{name}", b"x") if where == "memory://" else _write(Path(path) / name)
    discard(folder, "llm")
    assert sorted(entry.rsplit("/", 1)[-1] for entry in files.ls(path, detail=False)) == ["graph-0123", "llm_more-0123"]


def _write(file: Path) -> None:
    file.parent.mkdir(parents=True)
    file.write_bytes(b"x")


def test_what_a_stage_staged_goes_and_nothing_else(tmp_path: Path) -> None:
    mine = ("graph-0123456789ab-export", "graph-01234567", "embeddings-89abcdef", "embeddings_at_test-89abcdef")
    others = ("models-llm-01234567", "llm-0123456789ab-export", "changes-3-01234567", "graph-01234567-more")
    for name in (*mine, *others):
        (tmp_path / name).mkdir()
        (tmp_path / name / "weights").touch()
    discard_staged(tmp_path, "graph", ("graph", "embeddings", "embeddings_at_test"))
    assert sorted(left.name for left in tmp_path.iterdir()) == sorted(others)
    discard_staged(tmp_path, "", ("models/llm",))
    assert sorted(left.name for left in tmp_path.iterdir()) == sorted(others[1:])
