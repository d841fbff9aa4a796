"""When a swap is over, and when it is given up."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from ctd_scale.artifacts import Run
from ctd_scale.config import RunConfig
from ctd_scale.serving import app
from ctd_scale.serving.release import Source


def test_another_signal_calls_it_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = Source(Run(str(tmp_path), "run"), RunConfig(), "models", "reader", "index", "new")
    monkeypatch.setattr(app, "source_of", lambda *_: source)
    answers: dict[str, Source | bool] = {"publish": source, "current": source, "serves": False}
    monkeypatch.setattr(app, "_ask_coordinator", lambda asked, _: answers[asked])
    signals = iter([False, False, True, True])
    with pytest.raises(RuntimeError, match="version new is not served by every replica yet; called off"):
        app.swap(source.run, source.config, lambda: next(signals))
    # What replaces the refused one is served, and later than what was asked for.
    answers |= {"current": replace(source, number=2, version="old", instead_of="no such file"), "serves": True}
    with pytest.raises(RuntimeError, match="could not load it; serving version old: no such file"):
        app.swap(source.run, source.config)
    answers["current"] = replace(source, version="changed meanwhile")
    assert app.swap(source.run, source.config) == "changed meanwhile"
