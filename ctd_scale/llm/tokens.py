"""What stands beside the titles of a history: continuous tokens, a projected embedding, or nothing."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ctd_scale.artifacts import Artifact, Run
from ctd_scale.batches import NodeArrays
from ctd_scale.config import LLMConfig


def token_source(run: Run, config: LLMConfig) -> Artifact:
    """The artifact that `load_item_tokens` reads, which was made from the run's interactions."""
    source = run.fetch("tokens" if config.item_tokens == "kway" else "embeddings")
    run.require_made_from(source, run.fetch("embeddings" if config.item_tokens == "kway" else "interactions"))
    return source


def load_item_tokens(folder: Path, config: LLMConfig, token_dim: int) -> NodeArrays:
    """[users|items, ways, width] of each side: K ways of the LLM's hidden size `token_dim`, one way of the embedding's
    size (the model projects it), or no way at all."""
    arrays = NodeArrays.load(folder)
    if config.item_tokens == "kway":
        return arrays
    if config.item_tokens == "projected":
        return NodeArrays(arrays.users[:, None], arrays.items[:, None])
    sizes = (len(arrays.users), len(arrays.items))
    return NodeArrays(*(np.zeros((size, 0, token_dim), np.float32) for size in sizes))
