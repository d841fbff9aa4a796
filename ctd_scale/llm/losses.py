"""Losses of the preference: softmax over items of the retrieval score."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor


def softmax_loss(
    preferences: Float[Tensor, "preferences cond_dim"],
    vectors: Float[Tensor, "items cond_dim"],
    targets: Int[Tensor, "preferences"],
    temperature: Float[Tensor, ""],
) -> Float[Tensor, "preferences"]:
    """`-log softmax_j( cos(c, q_j) / temperature )` at the target, over the full catalogue."""
    logits = F.normalize(preferences, dim=1) @ F.normalize(vectors, dim=1).T / temperature
    return F.cross_entropy(logits, targets, reduction="none")


def sampled_softmax_loss(
    preferences: Float[Tensor, "preferences cond_dim"],
    vectors: Float[Tensor, "items cond_dim"],
    targets: Int[Tensor, "preferences"],
    temperature: Float[Tensor, ""],
    negatives: Int[Tensor, "negatives"],
) -> Float[Tensor, "preferences"]:
    """The same with negatives drawn uniformly, shared by the batch, each corrected by the log of its expected count
    (logQ; Bengio & Senecal, 2008), so that the partition sum is estimated without bias. A negative that is the
    target is left out, and so is not counted twice."""
    queries = F.normalize(preferences, dim=1)
    positive = (queries * F.normalize(vectors[targets], dim=1)).sum(dim=1, keepdim=True) / temperature
    negative = queries @ F.normalize(vectors[negatives], dim=1).T / temperature
    negative = negative - math.log(len(negatives) / len(vectors))
    negative = negative.masked_fill(negatives[None, :] == targets[:, None], -torch.inf)
    logits = torch.cat([positive, negative], dim=1)
    return F.cross_entropy(logits, torch.zeros_like(targets), reduction="none")
