"""What training the denoiser will need, and what one user costs it when it ranks."""

from __future__ import annotations

import torch

from ctd_scale.config import DiffusionConfig
from ctd_scale.diffusion.denoiser import Denoiser
from ctd_scale.diffusion.objective import cumulative_alphas, diffusion_losses
from ctd_scale.diffusion.sampler import common_noise, denoising_errors, error_probes, generate
from ctd_scale.estimates import Estimate, seconds_per_call

USERS = 32


def plan_diffusion(prefixes: float, items: int, cond_dim: int, config: DiffusionConfig) -> Estimate:
    """`prefixes` preferences to train on."""
    model = Denoiser(cond_dim, config.hidden_dim, config.num_blocks, config.dropout)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    batch = max(1, min(config.batch_size, int(prefixes)))
    alphas = cumulative_alphas(config.num_train_timesteps, config.beta_schedule, config.prediction_type)
    rows = torch.randn(batch, 3, cond_dim)
    negatives = torch.randn(batch, config.num_negatives, cond_dim)
    timesteps, dropped = torch.randint(config.num_train_timesteps, (batch,)), torch.zeros(batch, dtype=torch.bool)

    def step() -> None:
        losses = diffusion_losses(
            model,
            condition=rows[:, 0],
            positive=rows[:, 1],
            negatives=negatives,
            timesteps=timesteps,
            noise=rows[:, 2],
            dropped=dropped,
            alphas=alphas,
            prediction_type=config.prediction_type,
            temperature=config.temperature,
            contrasted=config.num_contrasted,
            min_snr=config.min_snr,
        )
        optimizer.zero_grad(set_to_none=True)
        torch.stack(tuple(losses)).sum().backward()
        optimizer.step()

    stepping = seconds_per_call(step)
    steps = config.epochs * (int(prefixes) // batch)
    return Estimate(
        "train_diffusion",
        steps * stepping,
        4.0 * cond_dim * (2 * prefixes + 2 * items),
        4.0 * cond_dim * items,
        f"{steps:,} steps of {1000 * stepping:.0f} ms",
    )


def seconds_per_user(cond_dim: int, config: DiffusionConfig, seed: int) -> float:
    """Draws and errors of one user, in a batch."""
    model = Denoiser(cond_dim, config.hidden_dim, config.num_blocks, config.dropout).eval().requires_grad_(False)
    condition = torch.randn(USERS, cond_dim)
    noise, probes = common_noise(config.num_draws, cond_dim, seed), error_probes(config, cond_dim, seed)
    candidates = torch.randn(USERS, config.error_candidates, cond_dim)

    def rank() -> None:
        generate(model, condition, noise, config)
        denoising_errors(model, condition, candidates, *probes, config)

    return seconds_per_call(rank, at_most=5) / USERS
