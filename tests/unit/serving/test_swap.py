"""When a swap is over, and when it is given up."""

from __future__ import annotations

import concurrent.futures
import os
import signal
import threading
from dataclasses import replace
from pathlib import Path

import pytest
from ray.exceptions import RayActorError
from ray.serve.exceptions import DeploymentUnavailableError

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


def test_a_coordinator_that_is_away_is_asked_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = Source(Run(str(tmp_path), "run"), RunConfig(), "models", "reader", "index", "new")
    monkeypatch.setattr(app, "source_of", lambda *_: source)
    monkeypatch.setattr(app.time, "sleep", lambda _: None)
    away = iter([DeploymentUnavailableError("Coordinator"), concurrent.futures.TimeoutError()])

    def asked(method: str, _: Source) -> Source | bool:
        if method == "serves" and (error := next(away, None)):
            raise error
        return source if method != "serves" else True

    monkeypatch.setattr(app, "_ask_coordinator", asked)
    assert app.swap(source.run, source.config) == "new"
    assert next(away, None) is None


def test_whatever_goes_wrong_with_a_swap_the_server_stays(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    failures = iter([RayActorError(), KeyError("[run]")])

    def reload(_: object) -> str:
        error = next(failures, None)
        os.kill(os.getpid(), signal.SIGTERM if error is None else signal.SIGHUP)
        raise error or ValueError("it ends")

    os.kill(os.getpid(), 0)
    threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGHUP)).start()
    app._wait_for_signal(reload)
    out = capsys.readouterr().out
    assert out.count("not swapped: ") == 3
    assert "'[run]'" in out
