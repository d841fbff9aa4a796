"""Two preferences of two seeds, averaged: what an ensemble gains where the second model is no denoiser."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float32
from numpy import ndarray

from ctd_scale.artifacts import ArtifactError, Run
from ctd_scale.batches import Preferences, Split
from ctd_scale.config import RunConfig
from ctd_scale.ranking import Scorer
from ctd_scale.recommender import load_artifacts, load_retrieve
from ctd_scale.retrieval.dense import unit_vectors


def ensemble_scorer(
    item_vectors: Sequence[Float32[ndarray, "items cond_dim"]], preferences: Sequence[Preferences]
) -> Scorer:
    """The sum of the cosines, each in its own model's space; preferences of the same users, in any order."""
    spaces = [unit_vectors(vectors, "item").T for vectors in item_vectors]
    orders = [np.argsort(told.users) for told in preferences]

    def score(users: ndarray, histories: list[ndarray]) -> Float32[ndarray, "batch items"]:
        total = np.zeros((len(users), spaces[0].shape[1]), np.float32)
        for items, told, order in zip(spaces, preferences, orders, strict=True):
            rows = order[np.searchsorted(told.users[order], users)]
            total += unit_vectors(told.vectors[rows], "preference") @ items
        return total

    return score


def load_ensemble(runs: Sequence[Run], config: RunConfig, split: Split) -> Scorer:
    """The same of finished runs. Raises ArtifactError where their interactions are not the same."""
    if len({run.fetch("interactions").digest for run in runs}) > 1:
        raise ArtifactError(f"{', '.join(run.url for run in runs)} were made from different interactions")
    vectors, preferences = [], []
    for run in runs:
        items = load_retrieve(load_artifacts(run), config).retriever.vectors
        assert isinstance(items, ndarray), "a run's own index has not grown"
        vectors.append(items)
        preferences.append(Preferences.load(run.fetch("preferences").path, split))
    return ensemble_scorer(vectors, preferences)
