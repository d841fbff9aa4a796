"""What surrounds a training loop."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray
import ray.train.torch
import torch

from ctd_scale import environment, training
from ctd_scale.artifacts import Run
from ctd_scale.config_resources import StageResources
from ctd_scale.parts import WriteParts
from ctd_scale.terminal import TrainingError

SLOW = "The current node timed out during startup. This could happen because some of the raylet failed to startup"


@pytest.fixture
def tried(monkeypatch: pytest.MonkeyPatch) -> list[Exception]:
    """Ray's start fails with each of these in turn, then succeeds."""
    errors: list[Exception] = []

    def init(**options: Any) -> None:
        assert options["address"] == "local"
        if errors:
            raise errors.pop(0)

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", init)
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    return errors


def test_on_a_busy_machine_ray_is_started_again(tried: list[Exception]) -> None:
    tried += [Exception(SLOW)] * (training.STARTS - 1)
    training.start_ray()
    assert not tried


def test_in_the_end_it_is_said_what_to_do(tried: list[Exception]) -> None:
    tried += [Exception(SLOW)] * training.STARTS
    with pytest.raises(TrainingError, match=r"keeps this machine busy.*RAY_ADDRESS"):
        training.start_ray()


def test_another_error_is_not_tried_again(tried: list[Exception]) -> None:
    tried += [ValueError("no such option"), ValueError("tried again")]
    with pytest.raises(ValueError, match="no such option"):
        training.start_ray()


def test_a_cluster_that_cannot_be_joined_is_named(tried: list[Exception], monkeypatch: pytest.MonkeyPatch) -> None:
    def init(**_: Any) -> None:
        raise ConnectionError("Failed to connect to Ray cluster")

    monkeypatch.setenv("RAY_ADDRESS", "somewhere:6379")
    monkeypatch.setattr(ray, "init", init)
    with pytest.raises(TrainingError, match=r"Failed to connect.*RAY_ADDRESS=somewhere:6379.*RAY_AUTH_MODE=token"):
        training.start_ray()


@pytest.mark.parametrize(("chosen", "expected"), [(0, [4, 8]), (3, [3, 3])])
def test_workers_of_one_machine_share_its_cores(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chosen: int, expected: list[int]
) -> None:
    """Of four workers, two of which are here; of the actors of `write_parts`, of which any number may be here, one."""
    threads: list[int] = []
    resources = StageResources(num_workers=4, threads_per_worker=chosen)
    monkeypatch.setattr(environment, "cores", lambda: 16)
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    monkeypatch.setattr(ray.train.torch, "get_device", lambda: torch.device("cpu"))
    monkeypatch.setattr(ray.train, "get_context", lambda: SimpleNamespace(get_local_world_size=lambda: 2))
    WriteParts(SimpleNamespace, {}, str(tmp_path), resources)  # type: ignore[arg-type]
    training.prepare_worker({"resources": resources.model_dump()}, 0)
    assert threads == expected


def test_steps_are_passed_on_and_shown(tmp_path: Path) -> None:
    seen = []
    for item in training.shown_steps(iter("abc"), 3, "a stage", tmp_path):
        file = tmp_path / training.PROGRESS
        seen.append((item, json.loads(file.read_text())["step"] if file.exists() else 0))
    assert seen == [("a", 0), ("b", 1), ("c", 2)], "a step counts when it was used"
    assert json.loads((tmp_path / training.PROGRESS).read_text()) == {"step": 3, "total": 3}


def test_trainings_that_follow_each_other_cost_their_time_and_the_most_memory(tmp_path: Path) -> None:
    run = Run(str(tmp_path), "run")
    for name, seconds, memory in (("first", 4.0, 900.0), ("second", 2.5, 700.0)):
        (run.root / "logs" / name).mkdir(parents=True)
        values = {"training_seconds": seconds, "peak_memory_mb": memory}
        (run.root / "logs" / name / training.USAGE).write_text(json.dumps(values))
    assert training.usage(run, "second") == {"training_seconds": 2.5, "peak_memory_mb": 700.0}
    assert training.usage(run, "first", "second") == {"training_seconds": 6.5, "peak_memory_mb": 900.0}
    assert training.usage(run, "third") == {}, "of a machine whose files are not seen here"
