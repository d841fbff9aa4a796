"""Contrastive denoising diffusion: the noise schedule, what is predicted, and the three losses (method: diffusion)."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

PredictionType = Literal["sample", "epsilon", "v_prediction"]


def cumulative_alphas(
    num_train_timesteps: int, beta_schedule: str, prediction_type: PredictionType
) -> Float[Tensor, "timesteps"]:
    """abar_t. At the last timestep nothing of the sample is left (zero terminal SNR), so that sampling from pure noise
    begins where training ended; a noise prediction cannot be inverted there and keeps a trace."""
    scheduler = DDPMScheduler(
        num_train_timesteps=num_train_timesteps,
        beta_schedule=beta_schedule,
        rescale_betas_zero_snr=prediction_type != "epsilon",
    )
    return scheduler.alphas_cumprod.float()


def unit_variance(vectors: Float[Tensor, "*batch cond_dim"]) -> Float[Tensor, "*batch cond_dim"]:
    """Directions only, scaled so that a dimension has unit variance: the space in which diffusion runs."""
    return F.normalize(vectors, dim=-1) * vectors.shape[-1] ** 0.5


def add_noise(
    sample: Float[Tensor, "*batch cond_dim"],
    noise: Float[Tensor, "*#batch cond_dim"],
    alpha: Float[Tensor, "*#batch 1"],
) -> Float[Tensor, "*batch cond_dim"]:
    """`x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps`."""
    return alpha.sqrt() * sample + (1 - alpha).sqrt() * noise


def training_target(
    sample: Tensor, noise: Tensor, alpha: Tensor, prediction_type: PredictionType
) -> Float[Tensor, "*batch cond_dim"]:
    """What the network should output."""
    if prediction_type == "sample":
        return sample
    if prediction_type == "epsilon":
        return noise
    return alpha.sqrt() * noise - (1 - alpha).sqrt() * sample


def predicted_sample(
    output: Tensor, noisy: Tensor, alpha: Tensor, prediction_type: PredictionType
) -> Float[Tensor, "*batch cond_dim"]:
    """x_0 from the network's output at x_t."""
    if prediction_type == "sample":
        return output
    if prediction_type == "epsilon":
        return (noisy - (1 - alpha).sqrt() * output) / alpha.sqrt()
    return alpha.sqrt() * noisy - (1 - alpha).sqrt() * output


class Losses(NamedTuple):
    denoising: Float[Tensor, ""]
    contrastive: Float[Tensor, ""]
    recommendation: Float[Tensor, ""]


def diffusion_losses(
    denoiser: nn.Module,
    *,
    condition: Float[Tensor, "batch cond_dim"],
    positive: Float[Tensor, "batch cond_dim"],
    negatives: Float[Tensor, "batch negatives cond_dim"],
    timesteps: Int[Tensor, "batch"],
    noise: Float[Tensor, "batch cond_dim"],
    dropped: Bool[Tensor, "batch"],
    alphas: Float[Tensor, "timesteps"],
    prediction_type: PredictionType,
    temperature: float,
) -> Losses:
    """The three terms, each a mean over the batch. Vectors come in unit variance.

    denoising       ||target - prediction||^2 / cond_dim, on the positive
    contrastive     -log sigmoid( ||err-||^2 - ||err+||^2 ), the first negative noised with the same noise and timestep
    recommendation  softmax of cos(x_0^, .) / temperature over the positive and all negatives
    """
    alpha = alphas[timesteps][None, :, None]
    both = torch.stack([positive, negatives[:, 0]])
    noisy = add_noise(both, noise[None], alpha)
    output = denoiser(noisy, timesteps[None], condition[None], dropped[None])
    errors = (output - training_target(both, noise[None], alpha, prediction_type)).square()
    good, bad = errors.mean(dim=2)
    # BPR on whole squared norms saturates at once in 64 dimensions; per-dimension means differ by its scale alone.
    contrastive = F.softplus(good - bad)

    sample = predicted_sample(output, noisy, alpha, prediction_type)[0]
    items = torch.cat([positive[:, None], negatives], dim=1)
    cosines = torch.einsum("bd,bnd->bn", F.normalize(sample, dim=1), F.normalize(items, dim=2))
    chosen = torch.zeros(len(positive), dtype=torch.long, device=positive.device)
    recommendation = F.cross_entropy(cosines / temperature, chosen)
    return Losses(good.mean(), contrastive.mean(), recommendation)
