"""Losses of the tokenizer."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor


def reconstruction_loss(
    reconstruction: Float[Tensor, "batch embed_dim"], target: Float[Tensor, "batch embed_dim"]
) -> Float[Tensor, ""]:
    """`||q - q^||^2` against the unmasked input, mean over elements."""
    return F.mse_loss(reconstruction, target)


def decorrelation_loss(tokens: Float[Tensor, "batch ways token_dim"]) -> Float[Tensor, ""]:
    """Mean squared cosine between the ways of a sample: 0 when every way says something else, 1 when all agree."""
    ways = tokens.shape[1]
    if ways == 1:
        return tokens.new_zeros(())
    unit = F.normalize(tokens, dim=2)
    cosines = unit @ unit.transpose(1, 2)
    others = ~torch.eye(ways, dtype=torch.bool, device=tokens.device)
    return cosines[:, others].square().mean()


def variance_loss(tokens: Float[Tensor, "batch ways token_dim"], floor: float = 1.0) -> Float[Tensor, ""]:
    """Hinge on the standard deviation over the batch (VICReg, Bardes et al., 2022, eq. 1): no way may collapse."""
    std = (tokens.var(dim=0) + 1e-4).sqrt()
    return F.relu(floor - std).mean()
