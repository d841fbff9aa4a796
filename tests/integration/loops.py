"""Training loops of several stages, one after the other on the same workers, because those take long to start."""

from __future__ import annotations

import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray

from ctd_scale import training
from ctd_scale.artifacts import Run
from ctd_scale.config_resources import StageResources


@dataclass(frozen=True)
class Training:
    """A stage's own loop and its arguments, after which step it is killed, and which checkpoint it goes on from."""

    name: str
    loop: Callable[[dict[str, Any]], None]
    arguments: dict[str, Any]
    killed_after: int = 0
    goes_on: str = ""


class Killed(Exception):
    pass


def train_one_by_one(arguments: dict[str, Any]) -> None:
    """Each of `trainings` in turn, on this worker; `folder`/name/NUMBER is a checkpoint of it."""
    folder = Path(arguments["folder"])
    training.report = lambda metrics: None  # type: ignore[assignment]
    for each in arguments["trainings"]:
        training.report_checkpoint, training.latest_checkpoint = _kept(folder, each)  # type: ignore[assignment]
        with suppress(Killed):
            each.loop({**arguments, **each.arguments})


def _kept(folder: Path, each: Training) -> tuple[Callable[..., None], Callable[..., Any]]:
    def report(metrics: Any, write: Callable[[Path], None], *, every_rank: bool = False) -> None:
        number = metrics["step"] if "step" in metrics else metrics["epoch"]
        if every_rank or training.rank() == 0:
            with tempfile.TemporaryDirectory() as own:  # every rank's, which Ray Train then lays over each other
                write(Path(own))
                shutil.copytree(own, folder / each.name / str(number), dirs_exist_ok=True)
        if number == each.killed_after:
            raise Killed

    @contextmanager
    def latest(_: Any) -> Iterator[Path | None]:
        yield folder / each.goes_on if each.goes_on else None

    return report, latest


def _on_workers(arguments: dict[str, Any]) -> None:
    train_one_by_one(arguments)
    import ray.train
    import torch.distributed

    torch.distributed.barrier()
    with tempfile.TemporaryDirectory() as empty:
        (Path(empty) / training.EXPORT).mkdir()
        ray.train.report({}, checkpoint=ray.train.Checkpoint.from_directory(empty))


def train_on_two(trainings: Sequence[Training], folder: Path) -> None:
    """The same on two workers that Ray Train has."""
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # the workers cannot import this file
    training.run_training(
        _on_workers,
        {"trainings": list(trainings), "folder": str(folder)},
        run=Run(str(folder), "run"),
        stage="loops",
        key="key",
        resources=StageResources(num_workers=2, threads_per_worker=1, max_failures=0),
    )


def exported(folder: Path, name: str) -> Path:
    """What a training of `folder` would publish."""
    last = max((folder / name).iterdir(), key=lambda each: int(each.name))
    return last / training.EXPORT
