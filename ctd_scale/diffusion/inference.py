"""The denoise step: preferences in, generated vectors and errors of candidates out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float32, Int32
from numpy import ndarray
from safetensors.torch import load_file

from ctd_scale.config_diffusion import DiffusionConfig
from ctd_scale.diffusion.denoiser import Denoiser, new_denoiser
from ctd_scale.diffusion.distill import STUDENT
from ctd_scale.diffusion.objective import unit_variance
from ctd_scale.diffusion.sampler import at_once, common_noise, denoising_errors, error_probes, generate
from ctd_scale.diffusion.train import WEIGHTS
from ctd_scale.sequence import latest_first


class DensityModel:
    """A published denoiser on one device; all randomness comes from `seed`."""

    def __init__(
        self, folder: Path, cond_dim: int, config: DiffusionConfig, seed: int, device: torch.device | None = None
    ) -> None:
        self.config = config
        self.device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.denoiser = self._read(folder / WEIGHTS, cond_dim)
        self.student = self._read(folder / STUDENT, cond_dim) if config.sampler == "distilled" else None
        self.noise = common_noise(config.num_draws, cond_dim, seed)
        self.probes = error_probes(config, cond_dim, seed)

    def _read(self, file: Path, cond_dim: int) -> Denoiser:
        if not file.exists():
            raise ValueError(
                f"{file.parent} has no {file.name}, which diffusion.sampler={self.config.sampler!r} needs; run "
                "train_diffusion with that setting"
            )
        network = new_denoiser(cond_dim, self.config)
        network.load_state_dict(load_file(file))
        return network.to(self.device).eval().requires_grad_(False)

    def latest(
        self, histories: Sequence[Int32[ndarray, "_"]], vectors: Any
    ) -> Float32[ndarray, "batch items cond_dim"] | None:
        """The vectors of what each history ends with, of `vectors` [items, cond_dim]: as much as the denoiser attends
        to, the newest first, zeros where there is less. None where it attends to none."""
        if not self.config.condition_items:
            return None
        items = latest_first([np.asarray(history) for history in histories], self.config.condition_items)
        return np.asarray(np.where(items[:, :, None] >= 0, vectors[np.maximum(items, 0)], 0), np.float32)

    def draws(
        self,
        preferences: Float32[ndarray, "batch cond_dim"],
        count: int | None = None,
        latest: Float32[ndarray, "batch items cond_dim"] | None = None,
    ) -> Float32[ndarray, "batch draws cond_dim"]:
        """`count` generated vectors per preference (default: config.num_draws). The first of many is the same vector
        as the only one."""
        noise = self.noise[:count] if count is not None else self.noise
        condition, heard = self._told(preferences, latest)
        if self.student is None:
            drawn = generate(self.denoiser, condition, noise, self.config, heard)
        else:
            drawn = at_once(self.student, condition, noise, self.config, heard)
        return np.asarray(drawn.cpu().numpy())

    def errors(
        self,
        preferences: Float32[ndarray, "batch cond_dim"],
        candidates: Float32[ndarray, "batch pool cond_dim"],
        latest: Float32[ndarray, "batch items cond_dim"] | None = None,
    ) -> Float32[ndarray, "batch pool"]:
        """Denoising error of every candidate under its user's preference."""
        vectors = unit_variance(torch.tensor(candidates)).to(self.device)
        condition, heard = self._told(preferences, latest)
        errors = denoising_errors(self.denoiser, condition, vectors, *self.probes, self.config, heard)
        return np.asarray(errors.cpu().numpy())

    def _told(self, preferences: ndarray, latest: ndarray | None) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Both in the space of diffusion; zeros stay zeros."""
        condition = unit_variance(torch.tensor(preferences)).to(self.device)
        return condition, None if latest is None else unit_variance(torch.tensor(latest)).to(self.device)
