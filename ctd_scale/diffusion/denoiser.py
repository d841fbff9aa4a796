"""The conditional denoiser: a residual MLP on (x_t, timestep, condition), conditioned per sample by adaLN."""

from __future__ import annotations

import math

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn


class AdaptiveBlock(nn.Module):
    """`h + gate * MLP(LN(h) * (1 + scale) + shift)`, (scale, shift, gate) from the condition (DiT, Peebles & Xie,
    2023). The last layer starts at zero, so that every block starts as the identity."""

    def __init__(self, hidden_dim: int, dropout: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(hidden_dim, elementwise_affine=False)
        self.modulate = nn.Linear(hidden_dim, 3 * hidden_dim)
        self.mlp = nn.Sequential(
            nn.Linear(hidden_dim, hidden_dim), nn.SiLU(), nn.Dropout(dropout), nn.Linear(hidden_dim, hidden_dim)
        )
        nn.init.zeros_(self.modulate.weight)
        nn.init.zeros_(self.modulate.bias)

    def forward(
        self, hidden: Float[Tensor, "*batch hidden_dim"], context: Float[Tensor, "*#batch hidden_dim"]
    ) -> Float[Tensor, "*batch hidden_dim"]:
        scale, shift, gate = self.modulate(context).chunk(3, dim=-1)
        inner: Tensor = self.mlp(self.norm(hidden) * (1 + scale) + shift)
        return hidden + gate * inner


class Denoiser(nn.Module):
    """Predicts noise, sample or velocity of item vectors at unit variance per dimension.

    One condition per sample: row b of the condition acts on row b alone (a condition broadcast over a batch would
    train every user on every target). Leading dimensions are free: candidates of one user share a timestep and a
    condition of size 1 in their dimension, and two thirds of the arithmetic, which lies in the context, with it.
    """

    def __init__(self, cond_dim: int, hidden_dim: int, num_blocks: int, dropout: float) -> None:
        super().__init__()
        self.enter = nn.Linear(cond_dim, hidden_dim)
        self.condition = nn.Sequential(nn.Linear(cond_dim, hidden_dim), nn.SiLU(), nn.Linear(hidden_dim, hidden_dim))
        self.time = nn.Sequential(nn.Linear(hidden_dim, hidden_dim), nn.SiLU(), nn.Linear(hidden_dim, hidden_dim))
        self.blocks = nn.ModuleList(AdaptiveBlock(hidden_dim, dropout) for _ in range(num_blocks))
        self.leave = nn.Sequential(nn.LayerNorm(hidden_dim), nn.Linear(hidden_dim, cond_dim))
        self.no_condition = nn.Parameter(torch.zeros(hidden_dim))
        frequencies = torch.exp(-math.log(10_000.0) * torch.arange(hidden_dim // 2) / (hidden_dim // 2))
        self.register_buffer("frequencies", frequencies, persistent=False)

    frequencies: Tensor

    def context(
        self,
        condition: Float[Tensor, "*batch cond_dim"],
        timesteps: Int[Tensor, "*batch"],
        dropped: Bool[Tensor, "*batch"] | None = None,
    ) -> Float[Tensor, "*batch hidden_dim"]:
        """Timestep and condition as one vector; where `dropped`, the learned no-condition (guidance)."""
        said = self.condition(condition)
        if dropped is not None:
            said = torch.where(dropped[..., None], self.no_condition, said)
        angles = timesteps[..., None].float() * self.frequencies
        when: Tensor = self.time(torch.cat([angles.sin(), angles.cos()], dim=-1))
        return when + said

    def forward(
        self,
        noisy: Float[Tensor, "*batch cond_dim"],
        timesteps: Int[Tensor, "*#batch"],
        condition: Float[Tensor, "*#batch cond_dim"],
        dropped: Bool[Tensor, "*#batch"] | None = None,
    ) -> Float[Tensor, "*batch cond_dim"]:
        context = self.context(condition, timesteps, dropped)
        hidden = self.enter(noisy)
        for block in self.blocks:
            hidden = block(hidden, context)
        prediction: Tensor = self.leave(hidden)
        return prediction
