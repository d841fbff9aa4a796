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
from ctd_scale.artifacts import Artifact, Run
from ctd_scale.baselines.codes import Codes
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
}


def make_task(name: str, log: InteractionLog, config: RunConfig, codes: Path | None) -> Task:
    """What is trained; `codes` are where the discrete ids lie, for those who write them."""
    if name in DISCRETE:
        assert codes is not None, "assign_codes makes them"
        return discrete_task(log, config, name, Codes.load(codes))
    return MAKERS[name](log, config)


def train_baseline(name: str, run: Run, config: RunConfig, config_hash: str) -> None:
    """interactions (and codes/NAME, for discrete ids) -> baselines/NAME: the weights of the epoch that ranked the
    validation items best."""
    interactions, codes = run.fetch("interactions"), _codes(name, run)
    export = training.run_training(
        train_loop,
        {
            "name": name,
            "config": config.model_dump(),
            "interactions": str(interactions.path),
            "codes": str(codes.path) if codes else None,
        },
        run=run,
        stage=name,
        key=config_hash,
        resources=config.resources.baselines,
    )
    inputs = {each.name: each.digest for each in (interactions, codes) if each}
    facts = {**json.loads((export / FACTS).read_text()), **training.usage(run, name)}
    if codes and "training_seconds" in facts:  # who is trained on another machine may not say
        facts["training_seconds"] += codes.manifest["facts"]["training_seconds"]
    with run.publish(f"baselines/{name}", config_hash=config_hash, inputs=inputs, facts=facts) as folder:
        shutil.copy(export / WEIGHTS, folder / WEIGHTS)


def load_model(name: str, run: Run, config: RunConfig) -> nn.Module:
    """A published baseline."""
    interactions, artifact, codes = run.fetch("interactions"), run.fetch(f"baselines/{name}"), _codes(name, run)
    run.require_made_from(artifact, interactions, *([codes] if codes else []))
    task = make_task(name, InteractionLog.load(interactions.path), config, codes.path if codes else None)
    restore(task.model, load_file(artifact.path / WEIGHTS))
    return task.model.eval()


def _codes(name: str, run: Run) -> Artifact | None:
    return run.fetch(f"codes/{name}") if name in DISCRETE else None


def load_scorer(name: str, run: Run, config: RunConfig) -> Scorer:
    """A published baseline, ready to rank."""
    return scorer_of(load_model(name, run, config))


def train_loop(arguments: dict[str, Any]) -> None:
    """One worker of the baseline `arguments["name"]`."""
    name, config = str(arguments["name"]), RunConfig.model_validate(arguments["config"])
    device = training.prepare_worker(arguments, config.seed)
    log = InteractionLog.load(Path(arguments["interactions"]))
    codes = Path(arguments["codes"]) if arguments["codes"] else None
    train_task(
        make_task(name, log, config, codes),
        getattr(config.baselines, name),
        log,
        arguments,
        seed=config.seed,
        mask_seen=config.evaluation.mask_seen,
        device=device,
    )
