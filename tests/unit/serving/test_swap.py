"""When a swap is given up."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

import pytest

from ctd_scale.artifacts import Run
from ctd_scale.config import RunConfig
from ctd_scale.serving import app
from ctd_scale.serving.release import Source


def test_another_signal_calls_it_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = Source(Run(str(tmp_path), "run"), RunConfig(), "models", "new")
    monkeypatch.setattr(app, "source_of", lambda *_: source)
    monkeypatch.setattr(app, "_ask_coordinator", lambda *_: source)
    monkeypatch.setattr(app, "_served_version", lambda _: "old")
    signals = iter([False, False, True, True])
    with pytest.raises(RuntimeError, match="still serving version old; called off"):
        app.swap(source.run, source.config, "url", lambda: next(signals))
    refusing = replace(source, models="before", version="old2", instead_of="no such file")
    monkeypatch.setattr(app, "_ask_coordinator", lambda asked, _: source if asked == "publish" else refusing)
    started = time.monotonic()
    with pytest.raises(RuntimeError, match="could not load it; serving version old2: no such file"):
        app.swap(source.run, source.config, "url")
    assert time.monotonic() - started < 10
