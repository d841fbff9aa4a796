"""Train the denoiser with Ray Train from exported preferences."""

from __future__ import annotations

import shutil
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ctd_scale import training
from ctd_scale.artifacts import Run
from ctd_scale.config import RunConfig
from ctd_scale.config_diffusion import DiffusionConfig
from ctd_scale.diffusion.denoiser import new_denoiser
from ctd_scale.diffusion.distill import STUDENT, distill_loop
from ctd_scale.diffusion.learner import Learner
from ctd_scale.diffusion.negatives import chosen_negatives, popularity_sums, uniform_negatives
from ctd_scale.diffusion.objective import cumulative_alphas, diffusion_losses
from ctd_scale.diffusion.training_set import TrainingSet

WEIGHTS = "denoiser.safetensors"
DISTILLATION = "diffusion-sampler"  # its checkpoints are the stage's: `diffusion-*`


def train_diffusion(run: Run, config: RunConfig, config_hash: str, vectors: np.ndarray) -> None:
    """preferences, item vectors of models/llm -> models/diffusion (EMA weights of the denoiser, and of its one-call
    student where that samples). Where it attends to the latest items, these are read from the interactions."""
    llm, preferences = run.fetch("models/llm"), run.fetch("preferences")
    others = [llm]
    read: dict[str, str] = {}
    if config.diffusion.condition_items:
        others.append(interactions := run.fetch("interactions"))
        read["interactions"] = str(interactions.path)
    run.require_made_from(preferences, *others)
    staged = run.root / ".staging" / "item_vectors.npy"
    staged.parent.mkdir(parents=True, exist_ok=True)
    np.save(staged, vectors)
    given = {
        "config": config.diffusion.model_dump(),
        "seed": config.seed,
        "preferences": str(preferences.path),
        "vectors": str(staged),
        **read,
    }
    trained = partial(training.run_training, run=run, key=config_hash, resources=config.resources.diffusion)
    trainings = ["diffusion"]
    files = [trained(train_loop, given, stage="diffusion") / WEIGHTS]
    if config.diffusion.sampler == "distilled":
        trainings.append(DISTILLATION)
        files.append(trained(distill_loop, {**given, "denoiser": str(files[0])}, stage=DISTILLATION) / STUDENT)
    inputs = {artifact.name: artifact.digest for artifact in (preferences, *others)}
    facts = {"cond_dim": int(vectors.shape[1]), **training.usage(run, *trainings)}
    with run.publish("models/diffusion", config_hash=config_hash, inputs=inputs, facts=facts) as folder:
        for file in files:
            shutil.copy(file, folder / file.name)
    staged.unlink()


def train_loop(arguments: dict[str, Any]) -> None:
    """One worker: its rows of every global batch; the order of rows is a function of (seed, epoch)."""
    config, seed = DiffusionConfig.model_validate(arguments["config"]), int(arguments["seed"])
    device = training.prepare_worker(arguments, seed)
    data = TrainingSet(arguments, config, device)
    targets, vectors = data.targets, data.vectors
    sums = popularity_sums(torch.bincount(targets, minlength=len(vectors)))
    alphas = cumulative_alphas(config.num_train_timesteps, config.beta_schedule, config.prediction_type).to(device)

    batch_size = min(config.batch_size, len(data))
    steps_per_epoch = len(data) // batch_size
    total_steps = config.epochs * steps_per_epoch
    learner = Learner(new_denoiser(data.cond_dim, config).to(device), config, total_steps)
    learner.resume(arguments, device)
    write = partial(learner.write, published=WEIGHTS)

    model = learner.network
    parallel: nn.Module = DistributedDataParallel(model) if training.world_size() > 1 else model
    log = training.StepLog(arguments["logs"], total_steps)
    ordered, order = -1, np.empty(0, np.int64)
    while (step := learner.step) < total_steps:
        epoch, position = divmod(step, steps_per_epoch)
        if epoch != ordered:
            ordered, order = epoch, np.random.default_rng((seed, 20, epoch)).permutation(len(data))
        rows = torch.from_numpy(order[position * batch_size : (position + 1) * batch_size])
        # Everything random of a step is drawn for the global batch, then cut: N workers see what one would.
        generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
        draws = {
            "timesteps": torch.randint(config.num_train_timesteps, (batch_size,), generator=generator),
            "noise": torch.randn(batch_size, data.cond_dim, generator=generator),
            "dropped": torch.rand(batch_size, generator=generator) < config.condition_dropout,
        }
        negatives = uniform_negatives(targets[rows], config.num_negatives, len(vectors), generator)
        if config.contrastive_negatives != "uniform":
            kind, count = config.contrastive_negatives, config.num_contrasted
            negatives[:, :count] = chosen_negatives(kind, targets[rows], count, vectors, sums, generator)
        mine = slice(training.rank(), None, training.world_size())
        torch.manual_seed(seed * 1_000_003 + step)  # dropout
        losses = diffusion_losses(
            parallel,
            condition=data.conditions[rows[mine]],
            positive=vectors[targets[rows[mine]]],
            negatives=vectors[negatives[mine]],
            **{name: values[mine].to(device) for name, values in draws.items()},
            alphas=alphas,
            prediction_type=config.prediction_type,
            temperature=config.temperature,
            contrasted=config.num_contrasted,
            min_snr=config.min_snr,
            latest=data.latest(rows[mine]),
        )
        loss = (
            config.denoising_weight * losses.denoising
            + config.contrastive_weight * losses.contrastive
            + config.recommendation_weight * losses.recommendation
        )
        learner.advance(loss)
        step = learner.step
        log.step(step, {"loss": loss.detach(), **{name: term.detach() for name, term in losses._asdict().items()}})
        if step % config.checkpoint_every_steps == 0 and step < total_steps:
            training.report_checkpoint({"step": step, "loss": loss.item()}, write)
    training.report_checkpoint({"step": learner.step}, write)
    log.close()
