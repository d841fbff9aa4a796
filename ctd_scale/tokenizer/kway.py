"""Additive K-way continuous tokenizer with masking (DeftRec, section 3).

K residual encoders turn one collaborative embedding into K tokens; the decoder sees only their sum.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn


class ResidualMLP(nn.Module):
    """`W_out (h + f(h))`, h = W_in q."""

    def __init__(self, input_dim: int, hidden_dim: int, output_dim: int) -> None:
        super().__init__()
        self.enter = nn.Linear(input_dim, hidden_dim)
        self.block = nn.Sequential(
            nn.LayerNorm(hidden_dim), nn.Linear(hidden_dim, hidden_dim), nn.GELU(), nn.Linear(hidden_dim, hidden_dim)
        )
        self.leave = nn.Linear(hidden_dim, output_dim)

    def forward(self, inputs: Float[Tensor, "batch input_dim"]) -> Float[Tensor, "batch output_dim"]:
        hidden = self.enter(inputs)
        leave: Tensor = self.leave(hidden + self.block(hidden))
        return leave


class KWayTokenizer(nn.Module):
    """`z_k = f_k(q~)`, `q^ = g(sum_k z_k)`; embeddings are standardised inside by the training set's mean and std."""

    mean: Tensor
    std: Tensor

    def __init__(self, embed_dim: int, token_dim: int, num_ways: int, hidden_dim: int) -> None:
        super().__init__()
        self.encoders = nn.ModuleList(ResidualMLP(embed_dim, hidden_dim, token_dim) for _ in range(num_ways))
        self.decoder = ResidualMLP(token_dim, hidden_dim, embed_dim)
        self.mask_vector = nn.Parameter(torch.zeros(embed_dim))
        self.register_buffer("mean", torch.zeros(embed_dim))
        self.register_buffer("std", torch.ones(()))

    def fit_scale(self, embeddings: Float[Tensor, "rows embed_dim"]) -> None:
        """One std for all dimensions: angles between centred embeddings stay what they are."""
        self.mean.copy_(embeddings.mean(dim=0))
        self.std.copy_((embeddings - self.mean).square().mean().sqrt().clamp_min(1e-8))

    def scale(self, embeddings: Float[Tensor, "batch embed_dim"]) -> Float[Tensor, "batch embed_dim"]:
        return (embeddings - self.mean) / self.std

    def encode(
        self, embeddings: Float[Tensor, "batch embed_dim"], masked: Bool[Tensor, "batch embed_dim"] | None = None
    ) -> Float[Tensor, "batch ways token_dim"]:
        """Tokens of raw embeddings. `masked` elements are replaced by the learned mask vector (training only)."""
        inputs = self.scale(embeddings)
        if masked is not None:
            inputs = torch.where(masked, self.mask_vector, inputs)
        return torch.stack([encoder(inputs) for encoder in self.encoders], dim=1)

    def decode(self, tokens: Float[Tensor, "batch ways token_dim"]) -> Float[Tensor, "batch embed_dim"]:
        """Reconstruction in the standardised space, from the sum of the tokens alone."""
        reconstruction: Tensor = self.decoder(tokens.sum(dim=1))
        return reconstruction


def draw_mask(
    shape: tuple[int, int], mask_ratio: float, generator: torch.Generator, device: torch.device
) -> Bool[Tensor, "batch embed_dim"]:
    """True where masked: drawn per sample and per element, never in place on the data."""
    return (torch.rand(shape, generator=generator) < mask_ratio).to(device)
