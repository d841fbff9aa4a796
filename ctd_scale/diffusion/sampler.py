"""Few-step seeded sampling with the schedulers of diffusers, and the denoiser's error as a density.

The noise is common to all users: an answer depends on (condition, seed) alone, never on who shares the batch.
"""

from __future__ import annotations

from copy import copy
from functools import cache
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from ctd_scale.config_diffusion import DiffusionConfig
from ctd_scale.diffusion.objective import add_noise, cumulative_alphas, predicted_sample, schedule_options


def make_scheduler(config: DiffusionConfig) -> Any:
    """A sampling scheduler: same betas as in training, timesteps that begin at the very last one."""
    return copy(_scheduler(config))


@cache
def _scheduler(config: DiffusionConfig) -> Any:
    """Of which every generation takes a copy: `set_timesteps` begins it anew, and computing betas takes longer than a
    call of a small denoiser."""
    from diffusers import DDIMScheduler, DPMSolverMultistepScheduler

    options = {
        **schedule_options(config.num_train_timesteps, config.beta_schedule, config.prediction_type),
        "prediction_type": config.prediction_type,
        "timestep_spacing": "trailing",
    }
    if config.sampler != "dpmsolver++":
        return DDIMScheduler(**options, clip_sample=False)
    return DPMSolverMultistepScheduler(**options, algorithm_type="dpmsolver++")


def common_noise(num_draws: int, cond_dim: int, seed: int) -> Float[Tensor, "draws cond_dim"]:
    """Starting noise of every user's draws."""
    return torch.randn(num_draws, cond_dim, generator=torch.Generator().manual_seed(seed))


@torch.inference_mode()
def generate(
    denoiser: nn.Module,
    conditions: Float[Tensor, "batch cond_dim"],
    noise: Float[Tensor, "*#batch draws cond_dim"],
    config: DiffusionConfig,
    latest: Float[Tensor, "batch items cond_dim"] | None = None,
) -> Float[Tensor, "batch draws cond_dim"]:
    """Generated vectors: `sampling_steps` denoiser calls (twice as many with guidance) for all draws at once."""
    scheduler = make_scheduler(config)
    scheduler.set_timesteps(config.sampling_steps)
    sample = noise.to(conditions.device).expand(len(conditions), -1, -1).contiguous()
    shared, heard = conditions[:, None], None if latest is None else latest[:, None]
    nobody = torch.ones(shared.shape[:2], dtype=torch.bool, device=sample.device)
    for timestep in scheduler.timesteps:
        timesteps = torch.full(shared.shape[:2], int(timestep), device=sample.device)
        output = denoiser(sample, timesteps, shared, None, heard)
        if config.guidance != 1.0:
            without = denoiser(sample, timesteps, shared, nobody, heard)
            output = without + config.guidance * (output - without)
        outcome = scheduler.step(output, timestep, sample)
        sample = outcome.prev_sample
    # Where the steps do not divide the chain, DDIM's last one ends a trace above no noise; x_0 itself is meant.
    clean: torch.Tensor = getattr(outcome, "pred_original_sample", sample)
    return clean


def at_once(
    student: nn.Module,
    conditions: Float[Tensor, "batch cond_dim"],
    noise: Float[Tensor, "*#batch draws cond_dim"],
    config: DiffusionConfig,
    latest: Float[Tensor, "batch items cond_dim"] | None = None,
) -> Float[Tensor, "batch draws cond_dim"]:
    """What `generate` would end at, by one call of a network that was taught it (`diffusion.distill`)."""
    sample = noise.to(conditions.device).expand(len(conditions), -1, -1)
    shared, heard = conditions[:, None], None if latest is None else latest[:, None]
    timesteps = torch.full(shared.shape[:2], config.num_train_timesteps - 1, device=sample.device)
    # Nobody's condition is dropped; said so that all parameters have a gradient, as several workers need.
    nobody = torch.zeros(shared.shape[:2], dtype=torch.bool, device=sample.device)
    ends: Tensor = student(sample, timesteps, shared, nobody, heard)
    return ends


def error_probes(
    config: DiffusionConfig, cond_dim: int, seed: int
) -> tuple[Int[Tensor, "evaluations"], Float[Tensor, "evaluations cond_dim"]]:
    """Timesteps spread evenly over the chain (ends left out) and one noise each, common to all candidates."""
    count = config.error_evaluations
    timesteps = ((torch.arange(count) + 0.5) / count * config.num_train_timesteps).long()
    return timesteps, common_noise(count, cond_dim, seed + 1)


@torch.inference_mode()
def denoising_errors(
    denoiser: nn.Module,
    conditions: Float[Tensor, "batch cond_dim"],
    candidates: Float[Tensor, "batch pool cond_dim"],
    timesteps: Int[Tensor, "evaluations"],
    noise: Float[Tensor, "evaluations cond_dim"],
    config: DiffusionConfig,
    latest: Float[Tensor, "batch items cond_dim"] | None = None,
) -> Float[Tensor, "batch pool"]:
    """`mean over (t, eps) of ||x_0 - x_theta(x_t, t, c)||^2 / cond_dim` of every candidate: low where the density is
    high, and exactly what the contrastive loss trains."""
    alphas = cumulative_alphas(config.num_train_timesteps, config.beta_schedule, config.prediction_type)
    total = torch.zeros(candidates.shape[:2], device=candidates.device)
    shared, heard = conditions[:, None], None if latest is None else latest[:, None]
    for timestep, eps in zip(timesteps.tolist(), noise.to(candidates.device), strict=True):
        alpha = alphas[timestep].to(candidates.device).reshape(1, 1, 1)
        noisy = add_noise(candidates, eps, alpha)
        when = torch.full(shared.shape[:2], timestep, device=candidates.device)
        output = denoiser(noisy, when, shared, None, heard)
        sample = predicted_sample(output, noisy, alpha, config.prediction_type)
        total += (candidates - sample).square().mean(dim=-1)
    return total / len(timesteps)
