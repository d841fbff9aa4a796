"""BPR-MF (Rendle et al., 2009): a vector per user and item, trained on pairs of a chosen and an unchosen item."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from numpy import ndarray
from torch import Tensor, nn

from ctd_scale.batches import InteractionLog
from ctd_scale.config import RunConfig
from ctd_scale.config_baselines import MatrixFactorizationConfig
from ctd_scale.tasks import Task, in_order


class MatrixFactorization(nn.Module):
    """`s_ui = p_u . q_i`."""

    def __init__(self, num_users: int, num_items: int, config: MatrixFactorizationConfig) -> None:
        super().__init__()
        self.users = nn.Parameter(0.1 * torch.randn(num_users, config.embed_dim))
        self.items = nn.Parameter(0.1 * torch.randn(num_items, config.embed_dim))
        self.l2 = config.l2

    def forward(
        self, users: Int[Tensor, "batch"], positives: Int[Tensor, "batch"], negatives: Int[Tensor, "batch"]
    ) -> Float[Tensor, ""]:
        """`-log sigmoid(s_ui - s_uj)` plus half the squared norm of the three rows, summed over the batch."""
        user, positive, negative = self.users[users], self.items[positives], self.items[negatives]
        ranking = F.softplus((user * negative).sum(dim=1) - (user * positive).sum(dim=1)).sum()
        norm = user.square().sum() + positive.square().sum() + negative.square().sum()
        return ranking + 0.5 * self.l2 * norm

    def score(self, users: ndarray, histories: list[ndarray]) -> Float[Tensor, "batch items"]:
        """`s_ui` for all items; the history is what the user's vector was trained on."""
        return self.users[torch.from_numpy(users).to(self.users.device)] @ self.items.T


def matrix_factorization_task(log: InteractionLog, config: RunConfig) -> Task:
    """Every training interaction once an epoch, each with one negative, uniform over the other items."""
    settings, seed = config.baselines.bpr_mf, config.seed
    users, items = (torch.from_numpy(part.astype(np.int64)) for part in log.train_edges())

    def collate(samples: ndarray, random: np.random.Generator) -> tuple[Tensor, ...]:
        index = torch.from_numpy(samples)
        positives = items[index]
        negatives = torch.from_numpy(random.integers(0, log.num_items - 1, len(samples)))
        return users[index], positives, negatives + (negatives >= positives)

    return Task(
        model=MatrixFactorization(log.num_users, log.num_items, settings),
        steps=lambda epoch: in_order(len(users), settings.batch_size, np.random.default_rng((seed, 40, epoch))),
        collate=collate,
        supervised=lambda batch: len(batch[0]),
    )
