"""The load test waits for replicas to come to rest, and a probe of the index gives way to requests."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import numpy as np
import pytest

from ctd_scale.retrieval.dense import ExactIndex, unit_vectors
from ctd_scale.retrieval.hybrid import HybridRetriever
from ctd_scale.serving import load
from ctd_scale.serving.probe import REST, probed_recall


def test_calm_must_last_before_the_load_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load, "WATCH_S", 0.0)
    said = iter([False, True, True, False, *[True] * load.CALM_POLLS])
    load.settle(lambda: next(said))
    assert next(said, None) is None, "neither before nor after"


def test_replicas_that_never_rest_are_not_waited_for_forever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load, "WATCH_S", 0.01)
    monkeypatch.setattr(load, "SETTLE_S", 0.1)
    started = time.monotonic()
    load.settle(lambda: False)
    assert 0.1 <= time.monotonic() - started < 5


def test_a_probe_rests_longer_than_it_works() -> None:
    vectors = unit_vectors(np.random.default_rng(0).standard_normal((30, 4)).astype(np.float32))
    worked = 0.0

    async def compute(function: Any, *arguments: Any) -> Any:
        nonlocal worked
        if not arguments or function.__name__ == "search":
            return function(*arguments)
        time.sleep(0.01)
        worked += 0.01
        return function(*arguments)

    started = time.perf_counter()
    retriever = HybridRetriever(vectors, ExactIndex(vectors), None, 0.0)
    assert asyncio.run(probed_recall(retriever, vectors[0], compute, chunk_items=10)) == 1
    assert worked == pytest.approx(0.03)
    assert time.perf_counter() - started >= (1 + REST) * worked
