"""Minibatches streamed by Ray Data are those of a thread, also when a sampler is killed on the way."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest

from ctd_scale.config import GraphConfig
from ctd_scale.graph.csr import BipartiteGraph
from ctd_scale.graph.sampler import Minibatch
from ctd_scale.graph.stream import stream_minibatches

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("ray_session")]

STEPS = 4_000


def streamed(graph: Path, streaming: str) -> Iterator[Minibatch]:
    config = GraphConfig.model_validate({"fanout": (3, 2), "batch_size": 8, "streaming": streaming})
    return stream_minibatches(config, str(graph), seed=0, rank=0, world_size=1, start=5, stop=STEPS)


def samplers() -> dict[int, psutil.Process]:
    found = {}
    for process in psutil.Process().children(recursive=True):
        try:
            if "SampleMinibatches" in process.name() + "".join(process.cmdline()):
                found[process.pid] = process
        except (psutil.NoSuchProcess, psutil.ZombieProcess):
            continue
    return found


def test_a_killed_sampler_changes_nothing(tmp_path: Path) -> None:
    pairs = np.argwhere(np.random.default_rng(0).random((40, 30)) < 0.3)
    BipartiteGraph.from_edges(pairs[:, 0], pairs[:, 1], 40, 30).save(tmp_path)
    killed: set[int] = set()
    later: set[int] = set()
    pairs_of_streams = zip(streamed(tmp_path, "ray_data"), streamed(tmp_path, "in_process"), strict=True)
    for number, (one, other) in enumerate(pairs_of_streams):
        for name in ("users", "positives", "negatives", "nodes"):
            assert np.array_equal(getattr(one, name), getattr(other, name)), (number, name)
        for left, right in zip(one.blocks, other.blocks, strict=True):
            assert np.array_equal(left.sources, right.sources)
            assert np.array_equal(left.weights, right.weights)
        if number == 0:
            for process in samplers().values():
                process.kill()
                killed.add(process.pid)
            assert killed
        elif number % 500 == 0:
            later |= samplers().keys()
    assert number == STEPS - 6
    assert later - killed, "the stream was over before another sampler was needed"
