"""LLM rivals on our backbone, data and budget: the LLM stage with another token beside the title.

`text_only` reads titles alone. `collm` (CoLLM, Zhang et al., 2023) adds one token projected from the collaborative
embedding, trained in two steps: the LLM on text, then the projection with the LLM frozen. `llara` (LLaRA, Liao et al.,
2024) adds the same token to a share of the titles that grows from none to all.

As published, neither ranks a whole catalogue: here all of them share our retrieval head, its item vectors included,
which both steps of CoLLM train. Ours begins a preference with the vectors of the latest items, theirs do not. A token
that is not read leaves an empty place.
"""

from __future__ import annotations

import numpy as np
from numpy import ndarray

from ctd_scale.artifacts import Run
from ctd_scale.baselines.names import VARIANTS
from ctd_scale.batches import InteractionLog
from ctd_scale.config import RunConfig
from ctd_scale.llm.backbone import hidden_size
from ctd_scale.llm.inference import PreferenceModel
from ctd_scale.llm.tokens import load_item_tokens, token_source
from ctd_scale.llm.train import train_llm
from ctd_scale.llm.weights import BACKBONE, load_vectors
from ctd_scale.ranking import Scorer


def variant(config: RunConfig, name: str) -> RunConfig:
    """The run's settings with those of the rival's tokens."""
    return config.model_copy(update={"llm": config.llm.model_copy(update=VARIANTS[name])})


def train_variant(name: str, run: Run, config: RunConfig, config_hash: str) -> None:
    """interactions, embeddings -> baselines/NAME."""
    train_llm(run, variant(config, name), config_hash, target=f"baselines/{name}", stage=name)


def variant_scorer(name: str, run: Run, config: RunConfig) -> Scorer:
    """`cos(c, q_j)` between the preference after the history and every item's vector."""
    settings, folder = variant(config, name).llm, run.fetch(f"baselines/{name}").path
    tokens = load_item_tokens(token_source(run, settings).path, settings, hidden_size(folder / BACKBONE))
    catalogue = InteractionLog.load(run.fetch("interactions").path).catalogue
    model, vectors = PreferenceModel(folder, tokens, catalogue, settings), _unit(load_vectors(folder))
    return lambda users, histories: _unit(model(histories)) @ vectors.T


def _unit(rows: ndarray) -> ndarray:
    return rows / np.linalg.norm(rows, axis=1, keepdims=True).clip(1e-12)
