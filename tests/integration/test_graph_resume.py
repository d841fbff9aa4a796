"""A worker of two is killed in the middle of an epoch; the stage goes on by itself and ends where it would have."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
from test_two_workers import make_run

from ctd_scale.batches import NodeArrays
from ctd_scale.config import validate_config
from ctd_scale.graph.train import train_graph

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("ray_session")]

CONFIG = validate_config(
    {
        "graph": {"embed_dim": 8, "fanout": [3, 2], "epochs": 30, "batch_size": 32, "checkpoint_every_steps": 6},
        "resources": {"graph": {"num_workers": 2, "threads_per_worker": 1, "max_failures": 1}},
    },
    source="test",
)


def workers() -> list[psutil.Process]:
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if "RayTrainWorker" in process.name() + "".join(process.cmdline()):
                found.append(process)
        except (psutil.NoSuchProcess, psutil.ZombieProcess):
            continue
    return found


def test_a_killed_worker_changes_nothing(tmp_path: Path) -> None:
    whole, broken = make_run(tmp_path, "whole"), make_run(tmp_path, "broken")
    train_graph(whole, CONFIG, "key")
    killed: list[int] = []

    def kill_one() -> None:
        deadline = time.monotonic() + 300
        while time.monotonic() < deadline and not killed:
            # The second checkpoint is begun when the first is complete.
            if len(list((tmp_path / "broken" / "checkpoints").glob("graph-*/checkpoint_*"))) >= 2:
                victim = workers()[1]
                victim.kill()
                killed.append(victim.pid)
            time.sleep(0.02)

    killer = threading.Thread(target=kill_one)
    killer.start()
    train_graph(broken, CONFIG, "key")
    killer.join()
    assert killed
    ends = [NodeArrays.load(run.fetch("embeddings").path) for run in (whole, broken)]
    np.testing.assert_allclose(ends[1].users, ends[0].users, atol=1e-6)
    np.testing.assert_allclose(ends[1].items, ends[0].items, atol=1e-6)
