"""A small catalogue, its retrieval step, and pools of candidates in it: everything follows from a seed."""

from __future__ import annotations

import numpy as np
from scipy.sparse import csr_matrix

from ctd_scale.batches import Catalogue, Ranking
from ctd_scale.candidates import Pool, RetrieveStep
from ctd_scale.config import load_config
from ctd_scale.retrieval.collaborative import CollaborativeRetriever, lift
from ctd_scale.retrieval.dense import ExactIndex, unit_vectors
from ctd_scale.retrieval.hybrid import HybridRetriever
from ctd_scale.retrieval.neighbors import ItemNeighbors
from ctd_scale.retrieval.text import TextIndex

ITEMS, DIM, USERS, DRAWS = 60, 6, 4, 3
RANKINGS = [
    Ranking(1.0, 0.0, 0.0),
    Ranking(0.0, 1.0, 0.0),
    Ranking(0.0, 0.0, 1.0),
    Ranking(0.0, 0.0, 0.0, graph=1.0),
    Ranking(0.0, 0.0, 0.0, neighbors=1.0),
    Ranking(1.0, 0.5, 0.75, pi=0.2, graph=0.6, neighbors=0.4),
]
NAMES = [f"Word{item} Thing" for item in range(ITEMS)]


def unit(random: np.random.Generator, *shape: int) -> np.ndarray:
    drawn = random.standard_normal(shape).astype(np.float32)
    return unit_vectors(drawn.reshape(-1, shape[-1])).reshape(shape)


def step(seed: int = 0, candidates: int = 9, text: bool = True) -> RetrieveStep:
    vectors = unit(np.random.default_rng((seed, 1)), ITEMS, DIM)
    index = TextIndex.build(Catalogue([str(item) for item in range(ITEMS)], NAMES, [""] * ITEMS)) if text else None
    config = load_config(overrides=[f"diffusion.error_candidates={candidates}", "retrieval.text_candidates=5"])
    return RetrieveStep(HybridRetriever(vectors, ExactIndex(vectors), index, pi=0.0), graph(seed), config)


def graph(seed: int) -> CollaborativeRetriever:
    embeddings = np.random.default_rng((seed, 4)).standard_normal((ITEMS, DIM - 1)).astype(np.float32)
    lifted = lift(embeddings)
    retriever = HybridRetriever(lifted, ExactIndex(lifted), None, pi=0.0)
    random = np.random.default_rng((seed, 6))
    weights = random.random((ITEMS, ITEMS)) * (random.random((ITEMS, ITEMS)) < 0.2)
    return CollaborativeRetriever(embeddings, retriever, ItemNeighbors(csr_matrix(weights.astype(np.float32))))


def histories(seed: int) -> list[np.ndarray]:
    random = np.random.default_rng((seed, 5))
    return [random.integers(0, ITEMS, count).astype(np.int32) for count in (1, 2, 5, 30)]


def pool_of(retrieve: RetrieveStep, seed: int, texts: list[str], rows: slice = slice(None)) -> Pool:
    preferences, draws, excluded = users(seed)
    return retrieve.pool(
        preferences[rows], texts[rows], excluded[rows], draws=draws[rows], histories=histories(seed)[rows]
    )


def users(seed: int) -> tuple[np.ndarray, np.ndarray, list[np.ndarray]]:
    """Preferences, draws and excluded items; the first user may see everything."""
    random = np.random.default_rng((seed, 2))
    excluded = [random.choice(ITEMS, int(count), replace=False) for count in (0, 1, 10, 40)]
    return unit(random, USERS, DIM), unit(random, USERS, DRAWS, DIM), [ids.astype(np.int32) for ids in excluded]


def errors_of(pool: Pool, seed: int) -> np.ndarray:
    """Whatever a denoiser might say; a function of the item."""
    table = np.random.default_rng((seed, 3)).random((len(pool.ids), ITEMS)).astype(np.float32)
    return np.take_along_axis(table, np.maximum(pool.ids, 0), axis=1)
