"""Where DeepSpeed compiles: no environment stands in another's way, and no dead process in anybody's."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import pytest

from ctd_scale.llm.zero import STALE_SECONDS, prepare_extensions


def test_each_environment_compiles_in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CTD_CACHE_DIR", str(tmp_path))
    found = set()
    for prefix in ("one", "other", "one"):
        monkeypatch.delenv("TORCH_EXTENSIONS_DIR", raising=False)
        monkeypatch.setattr(sys, "prefix", prefix)
        found.add(prepare_extensions())
        assert os.environ["TORCH_EXTENSIONS_DIR"] == str(prepare_extensions())
    assert len(found) == 2
    assert all(folder.is_relative_to(tmp_path) for folder in found)


def test_only_a_lock_that_nobody_can_hold_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    for name, age in (("dead", STALE_SECONDS + 60), ("compiling", 60.0)):
        (tmp_path / name).mkdir()
        lock = tmp_path / name / "lock"
        lock.touch()
        os.utime(lock, (time.time() - age,) * 2)
    assert prepare_extensions() == tmp_path
    assert not (tmp_path / "dead" / "lock").exists()
    assert (tmp_path / "compiling" / "lock").exists()
