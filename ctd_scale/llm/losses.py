"""Losses of the preference: softmax over items of the retrieval score. Sums over positions, not means."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

# Logits that exist at a time: `positions x items` would be gigabytes. On a CPU they should stay in its cache, where
# the softmax is 1.6 times as fast; a GPU wants large products (64 MB in float32).
MAX_LOGITS = {"cpu": 1 << 19, "cuda": 1 << 24}
LEAST_ROWS = 32  # fewer make the products slow


def logits_at_a_time(vectors: Tensor) -> int:
    """How many logits over these items should exist at a time, where they lie."""
    return max(MAX_LOGITS[vectors.device.type], LEAST_ROWS * len(vectors))


class ChunkedCrossEntropy(torch.autograd.Function):
    """`sum_i ( log sum_j exp(q_i . v_j) - q_i . v_target(i) )`, some rows at a time.

    The gradients are made together with the logits, which are then forgotten, so nothing is computed twice: the three
    products of the plain form, in memory of one chunk (as in Liger Kernel's fused linear cross-entropy).
    """

    @staticmethod
    def forward(ctx: Any, queries: Tensor, vectors: Tensor, targets: Tensor, max_logits: int) -> Tensor:
        wanted = any(ctx.needs_input_grad[:2])
        chunk = max(1, max_logits // len(vectors))
        total = queries.new_zeros(())
        query_gradients = torch.empty_like(queries) if wanted else None
        vector_gradients = torch.zeros_like(vectors) if wanted else None
        for start in range(0, len(queries), chunk):
            rows = slice(start, start + chunk)
            logits, target = queries[rows] @ vectors.T, targets[rows, None]
            normaliser = logits.logsumexp(dim=1, keepdim=True)
            total += (normaliser - logits.gather(1, target)).sum()
            if query_gradients is not None and vector_gradients is not None:
                shares = logits.sub_(normaliser).exp_()
                shares.scatter_add_(1, target, -torch.ones_like(normaliser))
                query_gradients[rows] = shares @ vectors
                vector_gradients.addmm_(shares.T, queries[rows])
        ctx.save_for_backward(query_gradients, vector_gradients)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None, None]:
        (gradient,), (queries, vectors) = gradients, ctx.saved_tensors
        return gradient * queries, gradient * vectors, None, None


def softmax_loss(
    preferences: Float[Tensor, "preferences cond_dim"],
    vectors: Float[Tensor, "items cond_dim"],
    targets: Int[Tensor, "preferences"],
    temperature: Float[Tensor, ""],
    max_logits: int | None = None,
) -> Float[Tensor, ""]:
    """`-log softmax_j( cos(c, q_j) / temperature )` at the target, over the full catalogue.

    Memory: `max_logits` logits (default: what suits the device), and gradients of the size of the inputs; never
    `preferences x items`.
    """
    with torch.autocast(preferences.device.type, enabled=False):  # float32, whatever the caller computes in
        queries = F.normalize(preferences.float(), dim=1) / temperature
        directions = F.normalize(vectors.float(), dim=1)
        loss: Tensor = ChunkedCrossEntropy.apply(
            queries, directions, targets, max_logits or logits_at_a_time(directions)
        )
    return loss


def sampled_softmax_loss(
    preferences: Float[Tensor, "preferences cond_dim"],
    vectors_of: Callable[[Tensor], Tensor],
    num_items: int,
    targets: Int[Tensor, "preferences"],
    temperature: Float[Tensor, ""],
    negatives: Int[Tensor, "negatives"],
) -> Float[Tensor, ""]:
    """The same with negatives drawn uniformly, shared by the batch, each corrected by the log of its expected count
    (logQ; Bengio & Senecal, 2008), so that the partition sum is estimated without bias. A negative that is the
    target is left out, and so is not counted twice. `vectors_of` gives the vectors of some items alone."""
    queries = F.normalize(preferences.float(), dim=1) / temperature
    positive = (queries * F.normalize(vectors_of(targets).float(), dim=1)).sum(dim=1, keepdim=True)
    negative = queries @ F.normalize(vectors_of(negatives).float(), dim=1).T
    negative = negative - math.log(len(negatives) / num_items)
    negative = negative.masked_fill(negatives[None, :] == targets[:, None], -torch.inf)
    logits = torch.cat([positive, negative], dim=1)
    return F.cross_entropy(logits, torch.zeros_like(targets), reduction="sum")
