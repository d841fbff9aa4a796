"""A one-call sampler: a student learns where the many-call sampling of the trained denoiser ends.

DDIM adds no noise on its way, so what it generates is a function of the starting noise and the condition; the student
learns that function by regression (Luhman & Luhman, 2021), guidance included. Denoiser and error ranking stay as they
are.
"""

from __future__ import annotations

from copy import deepcopy
from functools import partial
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ctd_scale import training
from ctd_scale.config_diffusion import DiffusionConfig
from ctd_scale.diffusion.denoiser import new_denoiser
from ctd_scale.diffusion.learner import Learner
from ctd_scale.diffusion.sampler import at_once, generate
from ctd_scale.diffusion.training_set import TrainingSet

STUDENT = "sampler.safetensors"
BATCH = 512  # pairs of noise and condition a step; more noises can always be drawn, so the data do not bound it


def distill_loop(arguments: dict[str, Any]) -> None:
    """One worker: its rows of every global batch. `arguments["denoiser"]` holds the teacher's weights, from which the
    student starts; a step is a function of (seed, step)."""
    config, seed = DiffusionConfig.model_validate(arguments["config"]), int(arguments["seed"])
    device = training.prepare_worker(arguments, seed)
    data = TrainingSet(arguments, config, device)
    # Every step has noises of its own, so there is nothing to learn by heart and nothing to drop.
    teacher = new_denoiser(data.cond_dim, config.model_copy(update={"dropout": 0.0}))
    teacher.load_state_dict(load_file(arguments["denoiser"]))
    teacher = teacher.to(device)
    learner = Learner(deepcopy(teacher), config, config.distill_steps)
    teacher.eval().requires_grad_(False)
    learner.resume(arguments, device)
    write = partial(learner.write, published=STUDENT)

    student = learner.network
    parallel: nn.Module = DistributedDataParallel(student) if training.world_size() > 1 else student
    mine = slice(training.rank(), None, training.world_size())
    log = training.StepLog(arguments["logs"], learner.total_steps)
    while learner.step < learner.total_steps:
        # Drawn for the global batch, then cut: N workers see what one would.
        generator = torch.Generator().manual_seed(seed * 1_000_003 + learner.step)
        rows = torch.randint(len(data), (BATCH,), generator=generator)[mine]
        noise = torch.randn(BATCH, 1, data.cond_dim, generator=generator)[mine]
        condition, latest = data.conditions[rows], data.latest(rows)
        ends = generate(teacher, condition, noise, config, latest).clone()
        loss = (at_once(parallel, condition, noise, config, latest) - ends).square().mean()
        learner.advance(loss)
        step = learner.step
        log.step(step, {"distance": loss.detach()})
        if step % config.checkpoint_every_steps == 0 and step < learner.total_steps:
            training.report_checkpoint({"step": step, "loss": loss.item()}, write)
    training.report_checkpoint({"step": learner.step}, write)
    log.close()
