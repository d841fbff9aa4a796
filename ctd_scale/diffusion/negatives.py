"""What the positive of a row is contrasted with."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

NegativeKind = Literal["uniform", "popularity", "in_batch", "hard"]
POPULARITY_EXPONENT = 0.75
# Of how many uniform draws a hard negative is the nearest to the positive (dynamic negative sampling; Zhang et al.,
# 2013): no list of neighbours is needed, however many items there are.
HARD_POOL = 16


def uniform_negatives(
    targets: Int[Tensor, "batch"], count: int, num_items: int, generator: torch.Generator
) -> Int[Tensor, "batch count"]:
    """Uniform over all items but the row's target."""
    drawn = torch.randint(num_items - 1, (len(targets), count), generator=generator)
    return drawn + (drawn >= targets[:, None]).long()


def popularity_sums(popularity: Int[Tensor, "items"]) -> Float[Tensor, "items"]:
    """Running sums of the items' weights, `interactions^(3/4)`, in float64."""
    return (popularity.double() ** POPULARITY_EXPONENT).cumsum(0)


def chosen_negatives(
    kind: NegativeKind,
    targets: Int[Tensor, "batch"],
    count: int,
    vectors: Float[Tensor, "items cond_dim"],
    sums: Float[Tensor, "items"],
    generator: torch.Generator,
) -> Int[Tensor, "batch count"]:
    """Never the row's own target, for which a uniform one stands in:

    popularity  in proportion to an item's interactions to the power of 3/4, whose running `sums` are given
    in_batch    the targets of other rows
    hard        those nearest to the target of `HARD_POOL` times as many uniform ones
    """
    uniform = uniform_negatives(targets, HARD_POOL * count if kind == "hard" else count, len(vectors), generator)
    if kind == "uniform":
        return uniform
    if kind == "hard":
        near, far = (F.normalize(vectors[rows.to(vectors.device)], dim=-1) for rows in (targets, uniform))
        nearness = torch.einsum("bd,bnd->bn", near, far)
        return uniform.gather(1, nearness.topk(count, dim=1).indices.to(uniform.device))
    if kind == "in_batch":
        drawn = targets[torch.randint(len(targets), uniform.shape, generator=generator)]
    else:
        # By the inverse of the distribution function: multinomial takes no more than 2^24 items.
        places = torch.rand(uniform.shape, generator=generator, dtype=torch.double) * sums[-1]
        drawn = torch.searchsorted(sums, places, right=True).clamp_max(len(vectors) - 1)
    return torch.where(drawn == targets[:, None], uniform, drawn)
