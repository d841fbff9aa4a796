"""The conditional denoiser: a residual MLP on (x_t, timestep, condition), conditioned per sample by adaLN. It may also
attend to the latest items of a history."""

from __future__ import annotations

import math

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from ctd_scale.config_diffusion import HEADS, DiffusionConfig


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


class LatestItems(nn.Module):
    """The latest items as what a block attends to: their vectors and how long ago each was, and before them one that is
    always there, for who has none or is told nothing. A row of zeros is no item."""

    def __init__(self, cond_dim: int, hidden_dim: int, count: int, dropout: float) -> None:
        super().__init__()
        self.enter, self.dropout = nn.Linear(cond_dim, hidden_dim), nn.Dropout(dropout)
        self.nothing, self.places = nn.Parameter(torch.zeros(hidden_dim)), nn.Parameter(torch.empty(count, hidden_dim))
        nn.init.normal_(self.places, std=0.02)

    def forward(
        self, latest: Float[Tensor, "*batch items cond_dim"], dropped: Bool[Tensor, "*batch"] | None
    ) -> tuple[Float[Tensor, "*batch items+1 hidden_dim"], Bool[Tensor, "*batch items+1"]]:
        """What may be attended to, and where there is something."""
        real = latest.any(dim=-1)
        if dropped is not None:
            real = real & ~dropped[..., None]
        entered = self.dropout(self.enter(latest)) + self.places[: latest.shape[-2]]
        nothing = self.nothing.expand(*entered.shape[:-2], 1, -1)
        always = torch.ones_like(real[..., :1])
        return torch.cat([nothing, entered], dim=-2), torch.cat([always, real], dim=-1)


class Attention(nn.Module):
    """What a noisy vector asks of the latest items. The last layer starts at zero, as in `AdaptiveBlock`."""

    def __init__(self, hidden_dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(hidden_dim)
        self.ask, self.hear = nn.Linear(hidden_dim, hidden_dim), nn.Linear(hidden_dim, 2 * hidden_dim)
        self.leave = nn.Linear(hidden_dim, hidden_dim)
        nn.init.zeros_(self.leave.weight)
        nn.init.zeros_(self.leave.bias)

    def forward(
        self,
        hidden: Float[Tensor, "*batch hidden_dim"],
        memory: Float[Tensor, "*#batch items hidden_dim"],
        real: Bool[Tensor, "*#batch items"],
    ) -> Float[Tensor, "*batch hidden_dim"]:
        query = self.ask(self.norm(hidden)).unflatten(-1, (HEADS, -1))
        key, value = self.hear(memory).unflatten(-1, (2, HEADS, -1)).unbind(-3)
        # einsum takes a dimension of size 1 as shared: the items of a user are not copied for each of its candidates.
        scores = torch.einsum("...hd,...thd->...ht", query, key) / math.sqrt(query.shape[-1])
        weights = scores.masked_fill(~real[..., None, :], -torch.inf).softmax(dim=-1)
        said: Tensor = self.leave(torch.einsum("...ht,...thd->...hd", weights, value).flatten(-2))
        return said


class Denoiser(nn.Module):
    """Predicts noise, sample or velocity of item vectors at unit variance per dimension.

    One condition per sample: row b of the condition acts on row b alone (a condition broadcast over a batch would
    train every user on every target). Leading dimensions are free: candidates of one user share a timestep and a
    condition of size 1 in their dimension, and two thirds of the arithmetic, which lies in the context, with it.
    With `condition_items` the same holds of the latest items, to which each block then attends first.
    """

    def __init__(
        self, cond_dim: int, hidden_dim: int, num_blocks: int, dropout: float, condition_items: int = 0
    ) -> None:
        super().__init__()
        self.enter = nn.Linear(cond_dim, hidden_dim)
        self.condition = nn.Sequential(nn.Linear(cond_dim, hidden_dim), nn.SiLU(), nn.Linear(hidden_dim, hidden_dim))
        self.time = nn.Sequential(nn.Linear(hidden_dim, hidden_dim), nn.SiLU(), nn.Linear(hidden_dim, hidden_dim))
        self.blocks = nn.ModuleList(AdaptiveBlock(hidden_dim, dropout) for _ in range(num_blocks))
        self.leave = nn.Sequential(nn.LayerNorm(hidden_dim), nn.Linear(hidden_dim, cond_dim))
        self.no_condition = nn.Parameter(torch.zeros(hidden_dim))
        if condition_items:
            self.latest = LatestItems(cond_dim, hidden_dim, condition_items, dropout)
            self.attend = nn.ModuleList(Attention(hidden_dim) for _ in range(num_blocks))
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
        latest: Float[Tensor, "*#batch items cond_dim"] | None = None,
    ) -> Float[Tensor, "*batch cond_dim"]:
        """`latest` are the vectors of the latest items, the newest first, zeros where there are fewer: given if the
        denoiser was made for some, and only then."""
        context = self.context(condition, timesteps, dropped)
        hidden = self.enter(noisy)
        heard = None if latest is None else self.latest(latest, dropped)
        for number, block in enumerate(self.blocks):
            if heard is not None:
                hidden = hidden + self.attend[number](hidden, *heard)
            hidden = block(hidden, context)
        prediction: Tensor = self.leave(hidden)
        return prediction


def new_denoiser(cond_dim: int, config: DiffusionConfig) -> Denoiser:
    """Untrained, of the configured size."""
    return Denoiser(cond_dim, config.hidden_dim, config.num_blocks, config.dropout, config.condition_items)
