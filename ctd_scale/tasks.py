"""Train something that ranks the catalogue after a history: whole epochs, ranked on validation now and then, the best
of them exported. A `Task` says what is trained on what; the loop does not know more of it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from jaxtyping import Int64
from numpy import ndarray
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ctd_scale import training
from ctd_scale.averaging import update_average
from ctd_scale.batches import InteractionLog
from ctd_scale.config_section import EpochsConfig
from ctd_scale.ranking import Scorer, rank_targets, validation_users

WEIGHTS, FACTS = "model.safetensors", "facts.json"
CHUNK_USERS = 512
# Sequences of like length share a batch; they are sorted within so many batches of a shuffled order.
SORTED_BATCHES = 32


@dataclass(frozen=True)
class Task:
    """A model and its epochs.

    `model(*batch)` is the loss summed over the samples, `model.score(users, histories)` the scores [batch, items] of
    the whole catalogue. `steps(epoch)` gives the samples of each optimizer step, `collate` their tensors, whose first
    axis is cut among the workers; `supervised` counts what the summed loss is divided by. `groups` are the optimizer's
    (default: one of all parameters).
    """

    model: nn.Module
    steps: Callable[[int], list[ndarray]]
    collate: Callable[[ndarray, np.random.Generator], tuple[Tensor, ...]]
    supervised: Callable[[tuple[Tensor, ...]], int]
    groups: list[dict[str, Any]] = field(default_factory=list)
    half_precision: bool = False


def in_order(count: int, batch_size: int, random: np.random.Generator) -> list[ndarray]:
    """All samples once, shuffled, `batch_size` at a time."""
    order = random.permutation(count)
    return [order[start : start + batch_size] for start in range(0, count, batch_size)]


def by_length(lengths: Int64[ndarray, "samples"], batch_size: int, random: np.random.Generator) -> list[ndarray]:
    """All samples once, shuffled, with samples of like length in a batch, the batches in shuffled order."""
    order = random.permutation(len(lengths))
    steps = []
    for start in range(0, len(order), SORTED_BATCHES * batch_size):
        part = order[start : start + SORTED_BATCHES * batch_size]
        part = part[np.argsort(lengths[part], kind="stable")]
        steps += [part[first : first + batch_size] for first in range(0, len(part), batch_size)]
    return [steps[number] for number in random.permutation(len(steps))]


def train_task(
    task: Task,
    settings: EpochsConfig,
    log: InteractionLog,
    arguments: dict[str, Any],
    *,
    seed: int,
    mask_seen: bool,
    device: torch.device,
) -> None:
    """One worker: its share of every global batch. Every `validate_every` epochs validation items are ranked, and after
    `patience` rankings that are not the best nothing more is trained. Where `ema_decay` is not 0 it is the average of
    the weights that ranks. The export holds the weights of the best epoch (`WEIGHTS`, read again by `restore`) and what
    is to be said of it (`FACTS`)."""
    model = task.model.to(device)
    groups = task.groups or [{"params": [each for each in model.parameters() if each.requires_grad]}]
    optimizer = torch.optim.Adam(groups, lr=settings.learning_rate, weight_decay=settings.weight_decay, fused=True)
    best, best_ndcg, best_epoch, epoch, step = learned(model), -1.0, 0, 0, 0
    validated: dict[str, float] = {}  # by epoch
    average = learned(model) if settings.ema_decay else {}
    with training.latest_checkpoint(arguments) as folder:
        if folder is not None:
            state = torch.load(folder / "state.pt", map_location=device, weights_only=True)
            restore(model, state["model"])
            optimizer.load_state_dict(state["optimizer"])
            average = state["average"]
            best, best_ndcg, best_epoch = state["best"], state["best_ndcg"], state["best_epoch"]
            epoch, step, validated = state["epoch"], state["step"], state["validated"]

    def write(folder: Path) -> None:
        state = {"model": learned(model), "optimizer": optimizer.state_dict(), "average": average, "best": best}
        numbers = {"best_ndcg": best_ndcg, "best_epoch": best_epoch, "epoch": epoch, "step": step}
        torch.save({**state, **numbers, "validated": validated}, folder / "state.pt")
        (folder / training.EXPORT).mkdir()
        save_file({key: value.contiguous().cpu() for key, value in best.items()}, folder / training.EXPORT / WEIGHTS)
        facts = {"best_epoch": best_epoch, "validation_ndcg@10": round(best_ndcg, 6)}
        (folder / training.EXPORT / FACTS).write_text(json.dumps(facts))

    parallel: nn.Module = DistributedDataParallel(model) if training.world_size() > 1 else model
    mine = slice(training.rank(), None, training.world_size())
    users = validation_users(log, settings.validation_users, seed)
    steplog = training.StepLog(arguments["logs"], settings.epochs * len(task.steps(0)))

    def finished() -> bool:
        return epoch == settings.epochs or epoch - best_epoch >= settings.patience * settings.validate_every

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
            if average:
                update_average(average.values(), trained(model).values(), settings.ema_decay, step)
            steplog.step(step, {"loss": loss.detach() * training.world_size(), "best_ndcg": best_ndcg})
        epoch += 1
        if epoch % settings.validate_every == 0 or epoch == settings.epochs:
            with holding(model, average) if average else nullcontext():
                ndcg = validation_ndcg(log, model, users, mask_seen)
                if ndcg > best_ndcg or not len(users):  # nobody to choose by: the last
                    best, best_ndcg, best_epoch = learned(model), ndcg, epoch
            validated[str(epoch)] = ndcg
            training.report_checkpoint({"epoch": epoch, "validated": dict(validated)}, write)
    training.report_checkpoint({"epoch": epoch, "validated": dict(validated)}, write)
    steplog.close()


def validation_ndcg(log: InteractionLog, model: nn.Module, users: Int64[ndarray, "users"], mask_seen: bool) -> float:
    """NDCG@10 over these users' validation items among all items; each worker ranks its share of the users."""
    model.eval()
    own = users[training.rank() :: training.world_size()]
    ranks = rank_targets(log, scorer_of(model), "validation", mask_seen=mask_seen, chunk_users=CHUNK_USERS, users=own)
    total = float(ranks.gains().sum())
    model.train()
    if training.world_size() > 1:
        summed = torch.tensor(total, dtype=torch.float64, device=next(model.parameters()).device)
        dist.all_reduce(summed)
        total = float(summed)
    return total / max(1, len(users))


def scorer_of(model: Any) -> Scorer:
    """The model's scores as numpy."""

    @torch.inference_mode()
    def scores(users: ndarray, histories: list[ndarray]) -> ndarray:
        return np.asarray(model.score(users, histories).float().cpu().numpy())

    return scores


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    """The weights that training changes."""
    return {name: each for name, each in model.named_parameters() if each.requires_grad}


def learned(model: nn.Module) -> dict[str, Tensor]:
    """A copy of the weights that training changes."""
    return {name: each.detach().clone() for name, each in trained(model).items()}


def restore(model: nn.Module, weights: dict[str, Tensor]) -> None:
    """Put what `learned` gave back into a model of the same making."""
    if weights.keys() != trained(model).keys():
        raise ValueError(f"these weights are of another model ({', '.join(sorted(weights)[:3])}, ...); train it again")
    model.load_state_dict(weights, strict=False)


@contextmanager
def holding(model: nn.Module, weights: dict[str, Tensor]) -> Iterator[None]:
    """The model with these weights in the place of its own, which it gets back."""
    own = learned(model)
    restore(model, weights)
    try:
        yield
    finally:
        restore(model, own)
