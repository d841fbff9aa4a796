"""Ray Train glue shared by the training loops: start Ray, run a loop on N workers, resume it, show its progress.

A loop is a plain function `loop(arguments)` that runs on every worker. It asks `latest_checkpoint` where to go on,
calls `report_checkpoint` as it goes, and logs steps through a `StepLog`. What the last checkpoint holds under `export/`
is what the stage publishes. A loop that ranks validation items reports, and keeps in its checkpoints, all that was
`validated` so far: NDCG@10 by epoch or step.
"""

from __future__ import annotations

import json
import logging
import os
import random
import resource
import shutil
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import ray
import ray.data
import ray.train
import torch
from ray.train import Checkpoint, CheckpointConfig, FailureConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.v2.api.callback import UserCallback
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from ctd_scale import checkpoints, environment
from ctd_scale.artifacts import Run, write_text
from ctd_scale.config_resources import StageResources
from ctd_scale.terminal import TrainingError, console, ctrl_c_kept, take_sigterm_as_ctrl_c

OBJECT_STORE_BYTES = 512 * 1024**2
EXPORT = "export"
PROGRESS = "progress.json"
USAGE = "usage.json"
STARTS = 3  # tries to start Ray
# Who is told, besides, what workers report (`reporting_to`).
_told: list[UserCallback] = []


def start_ray() -> None:
    """Join the cluster named by RAY_ADDRESS (as under `ray job submit`), or start a private one on this machine.

    Raises TrainingError where the machine is too busy for Ray to start.
    """
    if ray.is_initialized():
        return
    # Workers must not print a warning per library; ours are errors or rich output.
    os.environ.setdefault("RAY_DATA_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    # A busy machine imports torch in more than the minute that Ray Train grants its workers.
    os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "300")
    environment.set_defaults()
    # A worker waits in `report` until its previous checkpoint was polled: by default up to two seconds each.
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.25")
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR, "configure_logging": True}
    if os.environ.get("RAY_ADDRESS"):
        try:
            ray.init(address="auto", **options)
        except ConnectionError as error:
            hint = "is it up, and where it asks for a token, is RAY_AUTH_MODE=token set here, too?"
            raise TrainingError(f"{error} (RAY_ADDRESS={os.environ['RAY_ADDRESS']}): {hint}") from error
    else:
        # Nobody takes this machine away with a notice: an actor less to start for every training.
        os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
        # Logical CPUs only admit actors: samplers and the trainer overlap even on two cores.
        _start_private(
            address="local",
            num_cpus=max(environment.cores(), 4),
            object_store_memory=OBJECT_STORE_BYTES,
            include_dashboard=False,
            **options,
        )
    take_sigterm_as_ctrl_c()  # not before Ray has its own way with it, which is to abort
    for noisy in ("ray.data", "ray.train"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.execution_options.preserve_order = True


def _start_private(**options: Any) -> None:
    """`ray.init`, tried again where Ray's own processes were not up within the half minute that it grants them."""
    for tries in range(1, STARTS + 1):
        try:
            ray.init(**options)
            return
        except Exception as error:  # Ray has no class for it
            if "timed out during startup" not in str(error):
                raise
            ray.shutdown()
            if tries == STARTS:
                raise TrainingError(
                    f"Ray did not start within 30 s, {STARTS} times over: other work keeps this machine busy. End some "
                    "of it, or name a cluster that runs in RAY_ADDRESS"
                ) from error
            console.print("  Ray did not start within 30 s on this busy machine; once more", style="yellow")


def run_training(
    loop: Callable[[dict[str, Any]], None],
    arguments: Mapping[str, Any],
    *,
    run: Run,
    stage: str,
    key: str,
    resources: StageResources,
    datasets: Mapping[str, ray.data.Dataset] | None = None,
) -> Path:
    """Run `loop` on the stage's workers until it ends; returns the local `export/` folder of its last checkpoint.

    Checkpoints lie under `{run}/checkpoints/{stage}-{key}/{start}`: the same key goes on from the newest complete one,
    another key (another config or other inputs) starts anew. Raises TrainingError after `resources.max_failures`
    failures.
    """
    start_ray()
    name = f"{stage}-{key[:12]}"
    starts = f"{run.checkpoints}/{name}"
    logs = run.root / "logs" / stage
    trainer = TorchTrainer(
        loop,
        train_loop_config={
            **arguments,
            "logs": str(logs),
            "resources": resources.model_dump(),
            "resume_from": checkpoints.keep_newest(starts),
        },
        scaling_config=ScalingConfig(
            num_workers=resources.num_workers,
            use_gpu=resources.use_gpu,
            resources_per_worker={"GPU": resources.num_gpus} if resources.use_gpu else None,
        ),
        torch_config=TorchConfig(backend="nccl" if resources.use_gpu else "gloo"),
        run_config=ray.train.RunConfig(
            name=checkpoints.new_start(),
            storage_path=starts,
            failure_config=FailureConfig(max_failures=resources.max_failures),
            checkpoint_config=CheckpointConfig(num_to_keep=2),
            callbacks=list(_told),
        ),
        datasets=dict(datasets or {}),
        # Every worker reads the dataset made for it, whole: the split is ours, so it is the same on every run.
        dataset_config=ray.train.DataConfig(datasets_to_split=[]),
    )
    with shown_progress(stage, logs), ctrl_c_kept():
        try:
            result = trainer.fit()
        except Exception as error:
            raise TrainingError(f"{stage} failed on its workers: {error}") from error
    if result.error is not None:
        raise TrainingError(f"{stage} failed on its workers: {result.error}")
    assert result.checkpoint is not None, "a loop must report a checkpoint before it ends"
    target = run.root / ".staging" / f"{name}-export"
    shutil.rmtree(target, ignore_errors=True)
    with result.checkpoint.as_directory() as folder:
        shutil.copytree(Path(folder) / EXPORT, target)
    return target


@contextmanager
def reporting_to(callback: UserCallback) -> Iterator[None]:
    """Whatever is trained within tells this callback, too, what its workers report."""
    _told.append(callback)
    try:
        yield
    finally:
        _told.remove(callback)


def usage(run: Run, *trainings: str) -> dict[str, float]:
    """What trainings that followed each other took: `training_seconds` together, interruptions left out, and the most
    `peak_memory_mb` of a first worker. Empty where these ran on a machine whose files are not seen here."""
    files = [run.root / "logs" / name / USAGE for name in trainings]
    found = [json.loads(file.read_text()) for file in files if file.exists()]
    rules: dict[str, Callable[[list[float]], float]] = {"training_seconds": sum, "peak_memory_mb": max}
    return {name: of([each[name] for each in found]) for name, of in rules.items()} if found else {}


# -- inside a worker -----------------------------------------------------------------------------------------


def rank() -> int:
    return int(ray.train.get_context().get_world_rank())


def local_rank() -> int:
    return int(ray.train.get_context().get_local_rank())


def world_size() -> int:
    return int(ray.train.get_context().get_world_size())


def prepare_worker(arguments: Mapping[str, Any], seed: int) -> torch.device:
    """Seeds, thread count (what is set, or an equal share of this machine's cores) and device of this worker.
    Oversubscribed threads cost a factor of ten on CPU."""
    here = int(ray.train.get_context().get_local_world_size())
    torch.set_num_threads(arguments["resources"]["threads_per_worker"] or environment.share_of_cores(here))
    seed_all(seed)
    device: torch.device = ray.train.torch.get_device()
    return device


def peak_memory_mb() -> float:
    """The most memory that this process has held: on its GPU where it has one, else of the machine."""
    if torch.cuda.is_available():
        return round(torch.cuda.max_memory_allocated() / 1e6, 1)
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6, 1)


def seed_all(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002 - libraries that draw from the global state
    torch.manual_seed(seed)


@contextmanager
def latest_checkpoint(arguments: Mapping[str, Any]) -> Iterator[Path | None]:
    """The checkpoint to go on from, as a local folder, or None on a fresh start: that of a worker that failed a moment
    ago, or that of a run that was killed."""
    checkpoint = ray.train.get_checkpoint()
    if checkpoint is None and arguments["resume_from"] is not None:
        checkpoint = Checkpoint(arguments["resume_from"])
    if checkpoint is None:
        yield None
    else:
        with checkpoint.as_directory() as folder:
            yield Path(folder)


def report_checkpoint(metrics: Mapping[str, Any], write: Callable[[Path], None], *, every_rank: bool = False) -> None:
    """Persist a checkpoint. Every rank must call this; rank 0 alone writes unless `every_rank`."""
    with checkpoints.scratch() as folder:
        checkpoint = None
        if every_rank or rank() == 0:
            write(folder)
            checkpoints.seal(folder, rank(), world_size() if every_rank else 1)
            checkpoint = Checkpoint.from_directory(folder)
        ray.train.report(dict(metrics), checkpoint=checkpoint)


def report(metrics: Mapping[str, Any]) -> None:
    """Tell the driver, without a checkpoint. Every rank must call this."""
    ray.train.report(dict(metrics))


T = TypeVar("T")


class WaitClock(Iterator[T]):
    """Passes an iterator's items on and measures how long its reader waited for them."""

    def __init__(self, source: Iterator[T]) -> None:
        self._source = source
        self._waited, self._since = 0.0, time.perf_counter()

    def __next__(self) -> T:
        started = time.perf_counter()
        try:
            return next(self._source)
        finally:
            self._waited += time.perf_counter() - started

    def share(self) -> float:
        """Share of the time since the last call (or the start) that was spent waiting."""
        now = time.perf_counter()
        share = self._waited / max(now - self._since, 1e-9)
        self._waited, self._since = 0.0, now
        return share


class StepLog:
    """TensorBoard events, the progress file and the time and memory used, written by rank 0."""

    def __init__(self, logs: str, total_steps: int) -> None:
        self._total, self._folder = total_steps, Path(logs)
        self._writer: Any = None
        self._shown = 0.0
        self._before: float | None = None  # seconds of this training before it was interrupted
        if rank() == 0:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(logs)
        self._started = time.monotonic()

    def step(self, step: int, scalars: Mapping[str, float | torch.Tensor | Callable[[], float]]) -> None:
        """`step` counts finished optimizer steps, from 1. Scalars are read, or called, at most once a second."""
        if self._writer is not None and self._before is None:
            self._before = 0.0 if step == 1 else self._seconds_before()
        due = time.monotonic() - self._shown >= 1.0 or step == self._total
        if self._writer is None or not due:
            return
        values = {name: float(value() if callable(value) else value) for name, value in scalars.items()}
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        write_progress(self._folder, step, self._total, values)
        self._write_usage()
        self._shown = time.monotonic()

    def close(self) -> None:
        if self._writer is not None:
            self._write_usage()
            self._writer.close()

    def _seconds_before(self) -> float:
        try:
            return float(json.loads((self._folder / USAGE).read_text())["training_seconds"])
        except (OSError, ValueError, KeyError):
            return 0.0

    def _write_usage(self) -> None:
        before = self._seconds_before() if self._before is None else self._before  # None: no step was left to make
        used = {
            "training_seconds": round(before + time.monotonic() - self._started, 1),
            "peak_memory_mb": peak_memory_mb(),
        }
        write_text(self._folder / USAGE, json.dumps(used))


# -- on the driver -------------------------------------------------------------------------------------------


def write_progress(logs: Path, step: int, total: int, values: Mapping[str, float] | None = None) -> None:
    """Say how far a stage has come; whoever shows it reads the file."""
    write_text(logs / PROGRESS, json.dumps({"step": step, "total": total, **(values or {})}))


@contextmanager
def shown_progress(stage: str, logs: Path) -> Iterator[None]:
    """Draw the stage's progress file: a bar on a terminal, a line every 15 s elsewhere."""
    logs.mkdir(parents=True, exist_ok=True)
    file = logs / PROGRESS
    file.unlink(missing_ok=True)
    stop = threading.Event()
    draw = _draw_bar if console.is_terminal else _print_lines
    thread = threading.Thread(target=draw, args=(stage, file, stop), daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def shown_steps(items: Iterable[T], total: int, stage: str, logs: Path) -> Iterator[T]:
    """Passes items on and shows how many of the `total` were used."""
    with shown_progress(stage, logs):
        for number, item in enumerate(items, start=1):
            yield item
            write_progress(logs, number, total)


def _read_progress(file: Path) -> dict[str, Any] | None:
    with suppress(OSError, json.JSONDecodeError):
        return dict(json.loads(file.read_text()))
    return None


def _describe(progress: Mapping[str, Any]) -> str:
    return "  ".join(f"{name} {value:.4g}" for name, value in progress.items() if name not in ("step", "total"))


def _draw_bar(stage: str, file: Path, stop: threading.Event) -> None:
    columns = (
        TextColumn("[bold]{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[values]}"),
    )
    with Progress(*columns, console=console) as bar:
        task = bar.add_task(stage, total=None, values="starting")
        while True:
            stopped = stop.wait(0.5)
            if (progress := _read_progress(file)) is not None:
                bar.update(task, completed=progress["step"], total=progress["total"], values=_describe(progress))
            if stopped:
                return


def _print_lines(stage: str, file: Path, stop: threading.Event) -> None:
    while not stop.wait(15.0):
        if (progress := _read_progress(file)) is not None:
            console.print(
                f"  {stage} step {progress['step']}/{progress['total']}  {_describe(progress)}",
                highlight=False,
                soft_wrap=True,
            )
