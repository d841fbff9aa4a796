"""What the denoiser and its one-call student are trained on, in the space of diffusion."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from ctd_scale.batches import InteractionLog, Preferences
from ctd_scale.config_diffusion import DiffusionConfig
from ctd_scale.diffusion.objective import unit_variance
from ctd_scale.sequence import latest_first


class LatestRead:
    """The latest items that were read before the target of each training row, in the space of diffusion.

    Rows are a user's last training prefixes, in order (`export_windows`). Raises ValueError where they are not.
    """

    def __init__(self, log: InteractionLog, data: Preferences, count: int, vectors: Tensor) -> None:
        self._log, self._users, self._count, self._vectors = log, data.users, count, vectors
        rows = np.bincount(data.users, minlength=log.num_users)
        self._ends = np.arange(len(data)) + (log.train_lengths() - np.cumsum(rows))[data.users]
        if not np.array_equal(log.items[log.offsets[data.users] + self._ends], data.targets):
            raise ValueError("the preferences are not those of this log's training prefixes; export them again")

    def __call__(self, rows: Int[Tensor, "batch"]) -> Float[Tensor, "batch items cond_dim"]:
        """[rows, at most `count`, cond_dim], the newest first, zeros where there are fewer."""
        chosen = zip(self._users[rows].tolist(), self._ends[rows].tolist(), strict=True)
        read = [self._log.train_sequence(user)[max(0, end - self._count) : end] for user, end in chosen]
        items = torch.from_numpy(latest_first(read, self._count)).to(self._vectors.device)
        return self._vectors[items.clamp_min(0)] * (items >= 0)[:, :, None]


class TrainingSet:
    """Exported preferences, what followed each, and all item vectors; on `device`, unit variance per dimension."""

    def __init__(self, arguments: Mapping[str, Any], config: DiffusionConfig, device: torch.device) -> None:
        data = Preferences.load(Path(arguments["preferences"]), "train")
        self.conditions = unit_variance(torch.tensor(data.vectors)).to(device)
        self.targets = torch.tensor(data.targets, dtype=torch.long)
        self.vectors = unit_variance(torch.tensor(np.load(arguments["vectors"]))).to(device)
        self._latest = None
        if config.condition_items:
            log = InteractionLog.load(Path(arguments["interactions"]))
            self._latest = LatestRead(log, data, config.condition_items, self.vectors)

    def __len__(self) -> int:
        return len(self.targets)

    @property
    def cond_dim(self) -> int:
        return int(self.vectors.shape[1])

    def latest(self, rows: Int[Tensor, "batch"]) -> Float[Tensor, "batch items cond_dim"] | None:
        """As the denoiser takes them; None where it attends to none."""
        return None if self._latest is None else self._latest(rows)
