"""Vectors of items that nobody has chosen yet, from their words.

A ridge regression from what an item's words weigh (BM25) to the direction that training gave its vector,

    min_W sum_i |x_i W - (q_i - m)|^2 + lambda |W|^2,

over the items i that training has seen; m is their mean. An item without a known word gets m. Solved by conjugate
gradients, all dimensions at once; lambda is the one whose projections of items kept aside point best.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float32
from numpy import ndarray
from scipy.sparse import csr_matrix

from ctd_scale.retrieval.dense import unit_vectors
from ctd_scale.retrieval.text import TextIndex

# More items than these do not make the words' vectors better, only slower to find.
FITTED_ITEMS = 200_000
KEPT_ASIDE = 0.1
RIDGES = (0.3, 1.0, 3.0, 10.0, 30.0)
MAX_ITERATIONS, TOLERANCE = 50, 1e-4
WORDS, MEAN = "words.npy", "mean.npy"


@dataclass(frozen=True)
class TextProjection:
    """`words` in the order of a text index; `cosine` is that of projected and trained vectors of items kept aside."""

    words: Float32[ndarray, "words cond_dim"]
    mean: Float32[ndarray, "cond_dim"]
    cosine: float = 0.0

    def __call__(self, described: csr_matrix) -> Float32[ndarray, "items cond_dim"]:
        """Unit vectors of items that `TextIndex.describe` described."""
        return unit_vectors(np.asarray(described @ self.words + self.mean, np.float32), "projected item")

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        np.save(folder / WORDS, self.words)
        np.save(folder / MEAN, self.mean)

    @classmethod
    def load(cls, folder: Path) -> TextProjection:
        """What `save` wrote, memory-mapped."""
        return cls(np.load(folder / WORDS, mmap_mode="r"), np.load(folder / MEAN))


def fit_projection(
    text: TextIndex, vectors: Float32[ndarray, "items cond_dim"], trained: Bool[ndarray, "items"], seed: int
) -> TextProjection:
    """The projection of a catalogue's trained items; `vectors` are unit length. Raises ValueError: none is trained."""
    rng = np.random.default_rng(seed)
    items = rng.permutation(np.flatnonzero(trained))[:FITTED_ITEMS]
    if not len(items):
        raise ValueError("no item has a training interaction; rerun prepare_interactions")
    counts = text.counts.tocsr()[items]
    aside = max(1, round(KEPT_ASIDE * len(items)))
    targets = np.asarray(vectors[np.sort(items)], np.float32)[np.argsort(np.argsort(items))]
    cosine, ridge = max(
        (_cosine(_fit(counts[aside:], targets[aside:], ridge), counts[:aside], targets[:aside]), ridge)
        for ridge in RIDGES
    )
    fitted = _fit(counts, targets, ridge)
    return TextProjection(fitted.words, fitted.mean, cosine)


def _fit(counts: csr_matrix, targets: Float32[ndarray, "items cond_dim"], ridge: float) -> TextProjection:
    if not counts.shape[0]:  # one trained item alone, and it is kept aside
        return TextProjection(np.zeros((counts.shape[1], targets.shape[1]), np.float32), np.ones(targets.shape[1], "f"))
    mean = targets.mean(axis=0)
    if not np.linalg.norm(mean) > 1e-6:  # directions that cancel out: any will do for an item of which nothing is known
        mean = targets[0] * np.float32(1e-3)
    return TextProjection(_conjugate_gradients(counts, targets - mean, ridge), mean)


def _cosine(projection: TextProjection, counts: csr_matrix, targets: Float32[ndarray, "items cond_dim"]) -> float:
    return float((projection(counts) * targets).sum(axis=1).mean())


def _conjugate_gradients(
    counts: csr_matrix, targets: Float32[ndarray, "items cond_dim"], ridge: float
) -> Float32[ndarray, "words cond_dim"]:
    """W of `(X'X + ridge) W = X'Y`, a system for each column of Y, side by side (Hestenes and Stiefel, 1952)."""
    transposed = counts.T.tocsr()
    residual = np.asarray(transposed @ targets, np.float32)
    solution = np.zeros_like(residual)
    direction, length = residual.copy(), (residual**2).sum(axis=0)
    enough = TOLERANCE**2 * length
    for _ in range(MAX_ITERATIONS):
        turned = transposed @ (counts @ direction) + ridge * direction
        step = length / np.maximum((direction * turned).sum(axis=0), np.finfo(np.float32).tiny)
        solution += step * direction
        residual -= step * turned
        before, length = length, (residual**2).sum(axis=0)
        if (length <= enough).all():
            break
        direction = residual + (length / np.maximum(before, np.finfo(np.float32).tiny)) * direction
    return solution
