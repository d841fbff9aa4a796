"""Where an endpoint listens."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from ctd_scale.artifacts import Run
from ctd_scale.config import RunConfig
from ctd_scale.serving import app


@pytest.mark.parametrize(("cluster", "port"), [("", 0), ("somewhere:6379", 0), ("somewhere:6379", 8123)])
def test_a_port_is_found_where_none_is_named(cluster: str, port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also for a cluster that is joined: what is asked for there is this port and not 0, which nobody would know."""
    started: list[int] = []

    def start(application: Any, config: Any, host: str, port: int) -> str:
        started.append(port)
        return f"http://{host}:{port}"

    source = SimpleNamespace(run=Run("runs", "run"), config=RunConfig(), tuned=None)
    monkeypatch.setenv("RAY_ADDRESS", cluster)
    for name, function in {"source_of": lambda *_: source, "build_app": lambda _: None, "_start": start}.items():
        monkeypatch.setattr(app, name, function)
    monkeypatch.setattr(app, "start_ray", lambda: None)
    url = app.serve_run(lambda: (source.run, source.config), host="127.0.0.1", port=port, blocking=False)
    assert started[0] > 0
    assert started[0] == port or not port
    assert url.endswith(f":{started[0]}")
