"""What training the denoiser will need, and what one user costs it when it ranks."""

from __future__ import annotations

import torch

from ctd_scale.config_diffusion import DiffusionConfig
from ctd_scale.diffusion.denoiser import Denoiser, new_denoiser
from ctd_scale.diffusion.distill import BATCH
from ctd_scale.diffusion.objective import cumulative_alphas, diffusion_losses
from ctd_scale.diffusion.sampler import at_once, common_noise, denoising_errors, error_probes, generate
from ctd_scale.estimates import Estimate, seconds_per_call

USERS = 32


def plan_diffusion(prefixes: float, items: int, cond_dim: int, config: DiffusionConfig) -> Estimate:
    """`prefixes` preferences to train on."""
    model = new_denoiser(cond_dim, config)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    batch = max(1, min(config.batch_size, int(prefixes)))
    alphas = cumulative_alphas(config.num_train_timesteps, config.beta_schedule, config.prediction_type)
    rows = torch.randn(batch, 3, cond_dim)
    negatives = torch.randn(batch, config.num_negatives, cond_dim)
    latest = some_latest(batch, cond_dim, config)
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
            latest=latest,
        )
        optimizer.zero_grad(set_to_none=True)
        torch.stack(tuple(losses)).sum().backward()
        optimizer.step()

    stepping = seconds_per_call(step)
    steps = config.epochs * (int(prefixes) // batch)
    seconds, said = steps * stepping, f"{steps:,} steps of {1000 * stepping:.0f} ms"
    if config.sampler == "distilled":
        teaching = seconds_per_call(lambda: teach(model, optimizer, cond_dim, config))
        seconds += config.distill_steps * teaching
        said += f", {config.distill_steps:,} of the sampler of {1000 * teaching:.0f} ms"
    return Estimate(
        "train_diffusion",
        seconds,
        4.0 * cond_dim * (2 * prefixes + 2 * items),
        4.0 * cond_dim * items,
        said,
    )


def teach(model: Denoiser, optimizer: torch.optim.Optimizer, cond_dim: int, config: DiffusionConfig) -> None:
    """A step of distillation; teacher and student are of one size, so one network stands for both."""
    condition, latest = torch.randn(BATCH, cond_dim), some_latest(BATCH, cond_dim, config)
    noise = torch.randn(BATCH, 1, cond_dim)
    ends = generate(model, condition, noise, config, latest).clone()
    optimizer.zero_grad(set_to_none=True)
    (at_once(model, condition, noise, config, latest) - ends).square().mean().backward()
    optimizer.step()


def seconds_per_user(cond_dim: int, config: DiffusionConfig, seed: int) -> float:
    """Draws and errors of one user, in a batch."""
    model = new_denoiser(cond_dim, config).eval().requires_grad_(False)
    condition, latest = torch.randn(USERS, cond_dim), some_latest(USERS, cond_dim, config)
    noise, probes = common_noise(config.num_draws, cond_dim, seed), error_probes(config, cond_dim, seed)
    candidates = torch.randn(USERS, config.error_candidates, cond_dim)
    draw = at_once if config.sampler == "distilled" else generate

    def rank() -> None:
        draw(model, condition, noise, config, latest)
        denoising_errors(model, condition, candidates, *probes, config, latest)

    return seconds_per_call(rank, at_most=5) / USERS


def some_latest(users: int, cond_dim: int, config: DiffusionConfig) -> torch.Tensor | None:
    """Vectors of as many latest items as the denoiser attends to."""
    count = config.condition_items
    return torch.randn(users, count, cond_dim) if count else None
