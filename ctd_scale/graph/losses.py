"""Losses of collaborative training."""

from __future__ import annotations

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor


def bpr_loss(positive_scores: Float[Tensor, "batch"], negative_scores: Float[Tensor, "batch"]) -> Float[Tensor, ""]:
    """Bayesian personalised ranking, `-log sigmoid(s+ - s-)` (Rendle et al., 2009), mean over the batch."""
    return F.softplus(negative_scores - positive_scores).mean()


def l2_loss(*rows: Float[Tensor, "batch embed_dim"]) -> Float[Tensor, ""]:
    """Half the squared norm of the layer-0 rows, mean over the batch (LightGCN, He et al., 2020, eq. 15)."""
    terms = [row.square().sum(dim=1).mean() for row in rows]
    total = terms[0]
    for term in terms[1:]:
        total = total + term
    return 0.5 * total
