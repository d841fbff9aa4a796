"""The denoise step: preferences in, generated vectors and errors of candidates out."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float32
from numpy import ndarray
from safetensors.torch import load_file

from ctd_scale.config import DiffusionConfig
from ctd_scale.diffusion.denoiser import Denoiser
from ctd_scale.diffusion.objective import unit_variance
from ctd_scale.diffusion.sampler import common_noise, denoising_errors, error_probes, generate
from ctd_scale.diffusion.train import WEIGHTS


class DensityModel:
    """A published denoiser on one device; all randomness comes from `seed`."""

    def __init__(
        self, folder: Path, cond_dim: int, config: DiffusionConfig, seed: int, device: torch.device | None = None
    ) -> None:
        self.config = config
        self.device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.denoiser = Denoiser(cond_dim, config.hidden_dim, config.num_blocks, config.dropout)
        self.denoiser.load_state_dict(load_file(folder / WEIGHTS))
        self.denoiser.to(self.device).eval().requires_grad_(False)
        self.noise = common_noise(config.num_draws, cond_dim, seed)
        self.probes = error_probes(config, cond_dim, seed)

    def draws(
        self, preferences: Float32[ndarray, "batch cond_dim"], count: int | None = None
    ) -> Float32[ndarray, "batch draws cond_dim"]:
        """`count` generated vectors per preference (default: config.num_draws). The first of many is the same vector
        as the only one."""
        noise = self.noise[:count] if count is not None else self.noise
        drawn = generate(self.denoiser, self._condition(preferences), noise, self.config)
        return np.asarray(drawn.cpu().numpy())

    def errors(
        self,
        preferences: Float32[ndarray, "batch cond_dim"],
        candidates: Float32[ndarray, "batch pool cond_dim"],
    ) -> Float32[ndarray, "batch pool"]:
        """Denoising error of every candidate under its user's preference."""
        vectors = unit_variance(torch.tensor(candidates)).to(self.device)
        condition = self._condition(preferences)
        errors = denoising_errors(self.denoiser, condition, vectors, *self.probes, self.config)
        return np.asarray(errors.cpu().numpy())

    def _condition(self, preferences: Float32[ndarray, "batch cond_dim"]) -> torch.Tensor:
        return unit_variance(torch.tensor(preferences)).to(self.device)
