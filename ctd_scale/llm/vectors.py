"""Where item vectors start before they are learned."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float

from ctd_scale.config import LLMConfig

# Standard deviation of the item vectors at the start. A cosine does not see it, but Adam moves every number by about
# the learning rate a step: the smaller the vectors, the sooner they turn.
VECTOR_SCALE = 0.1


def initial_vectors(
    embeddings: Float[torch.Tensor, "items embed_dim"], config: LLMConfig, scale: float = VECTOR_SCALE
) -> Float[torch.Tensor, "items cond_dim"]:
    """At the collaborative embeddings, or random where the size differs."""
    if config.item_vectors == "collaborative":
        return F.normalize(embeddings, dim=1)
    if embeddings.shape[1] == config.preference_dim:
        centred = embeddings - embeddings.mean(dim=0)
        return scale * centred / centred.std()
    return scale * torch.randn(len(embeddings), config.preference_dim)
