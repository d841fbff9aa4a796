"""Contrastive denoising diffusion: the noise schedule, what is predicted, and the three losses (method: diffusion)."""

from __future__ import annotations

from functools import cache
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

PredictionType = Literal["sample", "epsilon", "v_prediction"]
EXPONENTIAL_BETAS = (1e-4, 0.02)  # the first and the last, the usual ends of the linear schedule


def schedule_options(num_train_timesteps: int, beta_schedule: str, prediction_type: PredictionType) -> dict[str, Any]:
    """What a scheduler of diffusers must be told to have the betas of training. At the last timestep nothing of the
    sample is left (zero terminal SNR; Lin et al., 2024), so that sampling from pure noise begins where training ended;
    a noise prediction cannot be inverted there and keeps a trace."""
    options: dict[str, Any] = {
        "num_train_timesteps": num_train_timesteps,
        "rescale_betas_zero_snr": prediction_type != "epsilon",
    }
    if beta_schedule == "exponential":
        return {**options, "trained_betas": np.geomspace(*EXPONENTIAL_BETAS, num_train_timesteps).tolist()}
    return {**options, "beta_schedule": beta_schedule}


@cache
def cumulative_alphas(
    num_train_timesteps: int, beta_schedule: str, prediction_type: PredictionType
) -> Float[Tensor, "timesteps"]:
    """abar_t of every timestep. Whoever asks gets the same tensor: a request has no time to have it computed."""
    from diffusers import DDPMScheduler  # takes seconds, and a ranking without a denoiser never comes here

    with torch.inference_mode(False):  # it may be asked for in training later
        scheduler = DDPMScheduler(**schedule_options(num_train_timesteps, beta_schedule, prediction_type))
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


def min_snr_weights(
    alpha: Float[Tensor, "batch"], prediction_type: PredictionType, gamma: float
) -> Float[Tensor, "batch"]:
    """`min(SNR_t, gamma)` in terms of the sample, whatever is predicted (Hang et al., 2023); 0 = all weigh 1."""
    if not gamma:
        return torch.ones_like(alpha)
    snr = alpha / (1 - alpha)
    capped = snr.clamp_max(gamma)
    return {"sample": capped, "epsilon": capped / snr.clamp_min(1e-8), "v_prediction": capped / (snr + 1)}[
        prediction_type
    ]


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
    contrasted: int = 1,
    min_snr: float = 0.0,
    latest: Float[Tensor, "batch items cond_dim"] | None = None,
) -> Losses:
    """The three terms, each a mean over the batch. Vectors come in unit variance; `latest` as the denoiser takes them.

    denoising       ||target - prediction||^2 / cond_dim, on the positive, weighed by `min_snr_weights`
    contrastive     -log softmax( -||err||^2 ) of the positive among the first `contrasted` negatives, all noised with
                    the same noise and timestep; with one of them -log sigmoid( ||err-||^2 - ||err+||^2 )
    recommendation  softmax of cos(x_0^, .) / temperature over the positive and all negatives
    """
    alpha = alphas[timesteps][None, :, None]
    noised = torch.cat([positive[None], negatives[:, :contrasted].transpose(0, 1)])
    noisy = add_noise(noised, noise[None], alpha)
    heard = None if latest is None else latest[None]
    output = denoiser(noisy, timesteps[None], condition[None], dropped[None], heard)
    # On whole squared norms it saturates at once in 64 dimensions; per-dimension means differ by its scale alone.
    errors = (output - training_target(noised, noise[None], alpha, prediction_type)).square().mean(dim=2)
    chosen = torch.zeros(len(positive), dtype=torch.long, device=positive.device)
    contrastive = F.cross_entropy(-errors.T, chosen)
    denoising = (min_snr_weights(alphas[timesteps], prediction_type, min_snr) * errors[0]).mean()

    sample = predicted_sample(output, noisy, alpha, prediction_type)[0]
    items = torch.cat([positive[:, None], negatives], dim=1)
    cosines = torch.einsum("bd,bnd->bn", F.normalize(sample, dim=1), F.normalize(items, dim=2))
    recommendation = F.cross_entropy(cosines / temperature, chosen)
    return Losses(denoising, contrastive, recommendation)
