"""A one-call sampler: a student learns where the many-call sampling of the trained denoiser ends.

DDIM adds no noise on its way, so what it generates is a function of the starting noise and the condition; the student
learns that function by regression (Luhman & Luhman, 2021), guidance included. Denoiser and error ranking stay as they
are.
"""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ctd_scale import training
from ctd_scale.averaging import update_average
from ctd_scale.config_diffusion import DiffusionConfig
from ctd_scale.diffusion.denoiser import new_denoiser
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
    student, average = deepcopy(teacher), deepcopy(teacher)
    teacher.eval().requires_grad_(False)
    optimizer = torch.optim.AdamW(
        student.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay, fused=True
    )
    total = config.distill_steps
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, total, eta_min=config.learning_rate / 50)
    step = 0
    with training.latest_checkpoint(arguments) as folder:
        if folder is not None:
            state = torch.load(folder / "state.pt", map_location=device, weights_only=True)
            for name, part in (("student", student), ("average", average)):
                part.load_state_dict(state[name])
            optimizer.load_state_dict(state["optimizer"])
            schedule.load_state_dict(state["schedule"])
            step = state["step"]

    def write(folder: Path) -> None:
        parts: dict[str, Any] = {"student": student, "average": average, "optimizer": optimizer, "schedule": schedule}
        torch.save({"step": step, **{name: part.state_dict() for name, part in parts.items()}}, folder / "state.pt")
        (folder / training.EXPORT).mkdir()
        save_file(average.state_dict(), folder / training.EXPORT / STUDENT)

    parallel: nn.Module = DistributedDataParallel(student) if training.world_size() > 1 else student
    mine = slice(training.rank(), None, training.world_size())
    log = training.StepLog(arguments["logs"], total)
    while step < total:
        # Drawn for the global batch, then cut: N workers see what one would.
        generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
        rows = torch.randint(len(data), (BATCH,), generator=generator)[mine]
        noise = torch.randn(BATCH, 1, data.cond_dim, generator=generator)[mine]
        condition, latest = data.conditions[rows], data.latest(rows)
        ends = generate(teacher, condition, noise, config, latest).clone()
        loss = (at_once(parallel, condition, noise, config, latest) - ends).square().mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
        step += 1
        update_average(average.parameters(), student.parameters(), config.ema_decay, step)
        log.step(step, {"distance": loss.detach()})
        if step % config.checkpoint_every_steps == 0 and step < total:
            training.report_checkpoint({"step": step, "loss": loss.item()}, write)
    training.report_checkpoint({"step": step}, write)
    log.close()
