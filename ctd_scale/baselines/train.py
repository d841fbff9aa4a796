"""Train a baseline with Ray Train: whole epochs, ranked on validation now and then, the best of them published."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy import ndarray
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ctd_scale import training
from ctd_scale.artifacts import Run
from ctd_scale.baselines.discrete import discrete_task
from ctd_scale.baselines.matrix_factorization import matrix_factorization_task
from ctd_scale.baselines.names import DISCRETE, SEQUENTIAL
from ctd_scale.baselines.sequential import sequential_task
from ctd_scale.baselines.task import Task
from ctd_scale.batches import InteractionLog
from ctd_scale.config import RunConfig
from ctd_scale.ranking import Scorer, rank_targets, validation_users

WEIGHTS, FACTS = "model.safetensors", "facts.json"
CHUNK_USERS = 512
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


def scorer_of(model: Any) -> Scorer:
    """The model's scores as numpy."""

    @torch.inference_mode()
    def scores(users: ndarray, histories: list[ndarray]) -> ndarray:
        return np.asarray(model.score(users, histories).float().cpu().numpy())

    return scores


def learned(model: nn.Module) -> dict[str, torch.Tensor]:
    """A copy of the weights that training changes."""
    return {name: each.detach().clone() for name, each in model.named_parameters() if each.requires_grad}


def restore(model: nn.Module, weights: dict[str, torch.Tensor]) -> None:
    """Put what `learned` gave back into a model of the same making."""
    if weights.keys() != learned(model).keys():
        raise ValueError(f"these weights are of another model ({', '.join(sorted(weights)[:3])}, ...); train it again")
    model.load_state_dict(weights, strict=False)


def train_loop(arguments: dict[str, Any]) -> None:
    """One worker: its share of every global batch."""
    name, whole = str(arguments["name"]), RunConfig.model_validate(arguments["config"])
    config, seed = getattr(whole.baselines, name), whole.seed
    device = training.prepare_worker(arguments, seed)
    log = InteractionLog.load(Path(arguments["interactions"]))
    task = MAKERS[name](log, whole)
    model = task.model.to(device)
    groups = task.groups or [{"params": list(model.parameters())}]
    optimizer = torch.optim.Adam(groups, lr=config.learning_rate, weight_decay=config.weight_decay, fused=True)
    best, best_ndcg, best_epoch, epoch, step = learned(model), -1.0, 0, 0, 0
    with training.latest_checkpoint(arguments) as folder:
        if folder is not None:
            state = torch.load(folder / "state.pt", map_location=device, weights_only=True)
            restore(model, state["model"])
            optimizer.load_state_dict(state["optimizer"])
            best, best_ndcg, best_epoch = state["best"], state["best_ndcg"], state["best_epoch"]
            epoch, step = state["epoch"], state["step"]

    def write(folder: Path) -> None:
        state = {"model": learned(model), "optimizer": optimizer.state_dict(), "best": best}
        numbers = {"best_ndcg": best_ndcg, "best_epoch": best_epoch, "epoch": epoch, "step": step}
        torch.save({**state, **numbers}, folder / "state.pt")
        (folder / training.EXPORT).mkdir()
        save_file({key: value.contiguous().cpu() for key, value in best.items()}, folder / training.EXPORT / WEIGHTS)
        facts = {"best_epoch": best_epoch, "validation_ndcg@10": round(best_ndcg, 6)}
        (folder / training.EXPORT / FACTS).write_text(json.dumps(facts))

    parallel: nn.Module = DistributedDataParallel(model) if training.world_size() > 1 else model
    mine = slice(training.rank(), None, training.world_size())
    steplog = training.StepLog(arguments["logs"], config.epochs * len(task.steps(0)))

    def finished() -> bool:
        return epoch == config.epochs or epoch - best_epoch >= config.patience * config.validate_every

    while not finished():
        for samples in task.steps(epoch):
            # Drawn for the global batch, then cut: N workers see what one would.
            batch = task.collate(samples, np.random.default_rng((seed, 42, step)))
            torch.manual_seed((seed * 1_000_003 + step) * training.world_size() + training.rank())  # dropout
            with torch.autocast(device.type, torch.bfloat16, enabled=task.half_precision):
                loss = parallel(*(part[mine].to(device) for part in batch)) / task.supervised(batch)
            optimizer.zero_grad(set_to_none=True)
            (loss * training.world_size()).backward()
            optimizer.step()
            step += 1
            steplog.step(step, {"loss": loss.detach() * training.world_size(), "best_ndcg": best_ndcg})
        epoch += 1
        if epoch % config.validate_every == 0 or epoch == config.epochs:
            ndcg = validation_ndcg(log, model, whole.evaluation.mask_seen, config.validation_users, seed)
            if ndcg > best_ndcg:
                best, best_ndcg, best_epoch = learned(model), ndcg, epoch
            training.report_checkpoint({"epoch": epoch, "ndcg": ndcg}, write)
    training.report_checkpoint({"epoch": epoch}, write)
    steplog.close()


def validation_ndcg(log: InteractionLog, model: nn.Module, mask_seen: bool, limit: int, seed: int) -> float:
    """NDCG@10 over (at most `limit`) validation items among all items; each worker ranks its share of the users."""
    users = validation_users(log, limit, seed)
    model.eval()
    own = users[training.rank() :: training.world_size()]
    ranks = rank_targets(log, scorer_of(model), "validation", mask_seen=mask_seen, chunk_users=CHUNK_USERS, users=own)
    total = float(ranks.gains().sum())
    model.train()
    if training.world_size() > 1:
        summed = torch.tensor(total, dtype=torch.float64, device=next(model.parameters()).device)
        dist.all_reduce(summed)
        total = float(summed)
    return total / len(users)
