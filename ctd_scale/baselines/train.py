"""Train a baseline with Ray Train: whole epochs, ranked on validation now and then, the best of them published."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from copy import deepcopy
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
from ctd_scale.baselines.matrix_factorization import matrix_factorization_task
from ctd_scale.baselines.sequential import sequential_task
from ctd_scale.baselines.task import Task
from ctd_scale.batches import InteractionLog
from ctd_scale.config import BaselinesConfig, RunConfig
from ctd_scale.metrics import target_ranks
from ctd_scale.ranking import Scorer

WEIGHTS = "model.safetensors"
CHUNK_USERS = 512
MAKERS: dict[str, Callable[[InteractionLog, Any, int], Task]] = {
    "bpr_mf": matrix_factorization_task,
    "sasrec": sequential_task,
    "bsarec": sequential_task,
}


def train_baseline(name: str, run: Run, config: RunConfig, config_hash: str) -> None:
    """interactions -> baselines/NAME: the weights of the epoch that ranked the validation items best."""
    interactions = run.fetch("interactions")
    export = training.run_training(
        train_loop,
        {
            "name": name,
            "config": config.baselines.model_dump(),
            "mask_seen": config.evaluation.mask_seen,
            "seed": config.seed,
            "interactions": str(interactions.path),
        },
        run=run,
        stage=name,
        key=config_hash,
        resources=config.resources.baselines,
    )
    inputs = {interactions.name: interactions.digest}
    facts = training.usage(run, name)
    with run.publish(f"baselines/{name}", config_hash=config_hash, inputs=inputs, facts=facts) as folder:
        shutil.copy(export / WEIGHTS, folder / WEIGHTS)


def load_scorer(name: str, run: Run, config: RunConfig) -> Scorer:
    """A published baseline, ready to rank."""
    log = InteractionLog.load(run.fetch("interactions").path)
    task = MAKERS[name](log, getattr(config.baselines, name), config.seed)
    task.model.load_state_dict(load_file(run.fetch(f"baselines/{name}").path / WEIGHTS))
    return scorer_of(task.model.eval())


def scorer_of(model: Any) -> Scorer:
    """The model's scores as numpy."""

    @torch.inference_mode()
    def scores(users: ndarray, histories: list[ndarray]) -> ndarray:
        return np.asarray(model.score(users, histories).float().cpu().numpy())

    return scores


def train_loop(arguments: dict[str, Any]) -> None:
    """One worker: its share of every global batch."""
    name, seed = str(arguments["name"]), int(arguments["seed"])
    config = getattr(BaselinesConfig.model_validate(arguments["config"]), name)
    device = training.prepare_worker(arguments, seed)
    log = InteractionLog.load(Path(arguments["interactions"]))
    task = MAKERS[name](log, config, seed)
    model = task.model.to(device)
    optimizer = torch.optim.Adam(
        model.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay, fused=True
    )
    best, best_ndcg, best_epoch, epoch, step = deepcopy(model.state_dict()), -1.0, 0, 0, 0
    with training.latest_checkpoint(arguments) as folder:
        if folder is not None:
            state = torch.load(folder / "state.pt", map_location=device, weights_only=True)
            model.load_state_dict(state["model"])
            optimizer.load_state_dict(state["optimizer"])
            best, best_ndcg, best_epoch = state["best"], state["best_ndcg"], state["best_epoch"]
            epoch, step = state["epoch"], state["step"]

    def write(folder: Path) -> None:
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "best": best}
        numbers = {"best_ndcg": best_ndcg, "best_epoch": best_epoch, "epoch": epoch, "step": step}
        torch.save({**state, **numbers}, folder / "state.pt")
        (folder / training.EXPORT).mkdir()
        save_file({key: value.contiguous().cpu() for key, value in best.items()}, folder / training.EXPORT / WEIGHTS)

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
            loss = parallel(*(part[mine].to(device) for part in batch)) / task.supervised(batch)
            optimizer.zero_grad(set_to_none=True)
            (loss * training.world_size()).backward()
            optimizer.step()
            step += 1
            steplog.step(step, {"loss": loss.detach() * training.world_size(), "best_ndcg": best_ndcg})
        epoch += 1
        if epoch % config.validate_every == 0 or epoch == config.epochs:
            ndcg = validation_ndcg(log, model, arguments["mask_seen"], config.validation_users, seed)
            if ndcg > best_ndcg:
                best, best_ndcg, best_epoch = deepcopy(model.state_dict()), ndcg, epoch
            training.report_checkpoint({"epoch": epoch, "ndcg": ndcg}, write)
    training.report_checkpoint({"epoch": epoch, "ndcg": best_ndcg}, write)
    steplog.close()


def validation_ndcg(log: InteractionLog, model: nn.Module, mask_seen: bool, limit: int, seed: int) -> float:
    """NDCG@10 over (at most `limit`) validation items among all items; each worker ranks its share of the users."""
    users = log.split_users("validation")
    if len(users) > limit:
        users = np.sort(np.random.default_rng((seed, 43)).choice(users, limit, replace=False))
    model.eval()
    scorer, total = scorer_of(model), 0.0
    own = users[training.rank() :: training.world_size()]
    for start in range(0, len(own), CHUNK_USERS):
        chunk = own[start : start + CHUNK_USERS]
        histories = [np.asarray(log.history(int(user), "validation")) for user in chunk]
        scores = scorer(chunk, histories)
        if mask_seen:
            for row, history in enumerate(histories):
                scores[row, history] = -np.inf
        ranks = target_ranks(scores, log.targets(chunk, "validation"))
        total += float(np.where(ranks <= 10, 1 / np.log2(ranks + 1), 0.0).sum())
    model.train()
    if training.world_size() > 1:
        summed = torch.tensor(total, dtype=torch.float64, device=next(model.parameters()).device)
        dist.all_reduce(summed)
        total = float(summed)
    return total / len(users)
