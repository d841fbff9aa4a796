"""Train a baseline with Ray Train, and publish its best epoch."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import nn

from ctd_scale import training
from ctd_scale.artifacts import Run
from ctd_scale.baselines.discrete import discrete_task
from ctd_scale.baselines.matrix_factorization import matrix_factorization_task
from ctd_scale.baselines.names import DISCRETE, SEQUENTIAL
from ctd_scale.baselines.sequential import sequential_task
from ctd_scale.batches import InteractionLog
from ctd_scale.config import RunConfig
from ctd_scale.ranking import Scorer
from ctd_scale.tasks import FACTS, WEIGHTS, Task, restore, scorer_of, train_task

MAKERS: dict[str, Callable[[InteractionLog, RunConfig], Task]] = {
    "bpr_mf": matrix_factorization_task,
    **{name: partial(sequential_task, name=name) for name in SEQUENTIAL},
    **{name: partial(discrete_task, name=name) for name in DISCRETE},
}


def train_baseline(name: str, run: Run, config: RunConfig, config_hash: str) -> None:
    """interactions -> baselines/NAME: the weights of the epoch that ranked the validation items best."""
    interactions = run.fetch("interactions")
    export = training.run_training(
        train_loop,
        {
            "name": name,
            "config": config.model_dump(),
            "interactions": str(interactions.path),
        },
        run=run,
        stage=name,
        key=config_hash,
        resources=config.resources.baselines,
    )
    inputs = {interactions.name: interactions.digest}
    facts = {**json.loads((export / FACTS).read_text()), **training.usage(run, name)}
    with run.publish(f"baselines/{name}", config_hash=config_hash, inputs=inputs, facts=facts) as folder:
        shutil.copy(export / WEIGHTS, folder / WEIGHTS)


def load_model(name: str, run: Run, config: RunConfig) -> nn.Module:
    """A published baseline."""
    task = MAKERS[name](InteractionLog.load(run.fetch("interactions").path), config)
    restore(task.model, load_file(run.fetch(f"baselines/{name}").path / WEIGHTS))
    return task.model.eval()


def load_scorer(name: str, run: Run, config: RunConfig) -> Scorer:
    """A published baseline, ready to rank."""
    return scorer_of(load_model(name, run, config))


def train_loop(arguments: dict[str, Any]) -> None:
    """One worker of the baseline `arguments["name"]`."""
    name, config = str(arguments["name"]), RunConfig.model_validate(arguments["config"])
    device = training.prepare_worker(arguments, config.seed)
    log = InteractionLog.load(Path(arguments["interactions"]))
    train_task(
        MAKERS[name](log, config),
        getattr(config.baselines, name),
        log,
        arguments,
        seed=config.seed,
        mask_seen=config.evaluation.mask_seen,
        device=device,
    )
