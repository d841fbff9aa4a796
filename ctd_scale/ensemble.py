"""Preferences as they are, of one seed or of several averaged: what a second model gains that is no denoiser."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float32
from numpy import ndarray

from ctd_scale.artifacts import ArtifactError, Run
from ctd_scale.batches import Preferences, Split
from ctd_scale.llm.weights import load_vectors
from ctd_scale.ranking import Scorer
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


def load_ensemble(runs: Sequence[Run], split: Split) -> Scorer:
    """The same of runs whose preferences are published; one run is an ensemble, too.

    Raises ArtifactError where their interactions are not the same, or preferences are of another LLM.
    """
    if len({run.fetch("interactions").digest for run in runs}) > 1:
        raise ArtifactError(f"{', '.join(run.url for run in runs)} were made from different interactions")
    vectors, preferences = [], []
    for run in runs:
        llm, told = run.fetch("models/llm"), run.fetch("preferences")
        run.require_made_from(told, llm)
        vectors.append(load_vectors(llm.path))
        preferences.append(Preferences.load(told.path, split))
    return ensemble_scorer(vectors, preferences)
