"""What the words of a title and category say of an item, as one vector: fixed features of the item vectors."""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float, Float32
from numpy import ndarray
from scipy.sparse import csr_matrix, diags_array
from torch import Tensor

from ctd_scale.llm.prompts import Prompts

TEXT_DIM = 512
POWER_ITERATIONS = 3
FITTED_ITEMS = 100_000  # so many at most say what the axes are


def describe_items(prompts: Prompts, dim: int = TEXT_DIM) -> Float[Tensor, "items text_dim"]:
    """Latent semantic analysis (Deerwester et al., 1990) of each item's answer (its category and title): which tokens
    it has, each weighed by how rare it is,

        a_iw = idf(w) / sqrt( sum_w idf(w)^2 ),  idf(w) = log( (items + 1) / (items that have w + 1) ),

    along the first right singular vectors of a, at most `dim`; without the mean over all items, at unit length. The
    tokens that all answers share weigh nothing, and one that a single item has says nothing of another. An item without
    a token of its own gets zeros.
    """
    weighed = _weighed(prompts)
    count, tokens = weighed.shape
    if not tokens:
        return torch.zeros(count, 1)
    random = np.random.default_rng(0)
    some = np.sort(random.choice(count, min(count, FITTED_ITEMS), replace=False))
    described = np.asarray(weighed @ _axes(weighed[some], min(dim, *weighed.shape), random))
    known = np.diff(weighed.indptr) > 0
    if known.any():
        described[known] -= described[known].mean(axis=0)
    lengths = np.linalg.norm(described, axis=1, keepdims=True)
    return torch.from_numpy(np.divide(described, lengths, out=np.zeros_like(described), where=lengths > 1e-6))


def _weighed(prompts: Prompts) -> csr_matrix:
    """a, [items, tokens that at least two items have and not all]."""
    count, offsets = len(prompts.answer_offsets) - 1, np.asarray(prompts.answer_offsets)
    ids = np.asarray(prompts.answers)
    said = csr_matrix((np.ones(len(ids), np.float32), ids, offsets), (count, int(ids.max()) + 1), copy=True)
    said.sum_duplicates()
    said.data[:] = 1
    having = np.bincount(said.indices, minlength=said.shape[1])
    kept = (having > 1) & (having < count)
    rarity = np.log((count + 1) / (having[kept] + 1)).astype(np.float32)
    weighed = said[:, kept].multiply(rarity).tocsr()
    lengths = np.sqrt(np.asarray(weighed.multiply(weighed).sum(axis=1)).ravel())
    return csr_matrix(diags_array(1 / np.maximum(lengths, 1e-12)) @ weighed).astype(np.float32)


def _axes(weighed: csr_matrix, dim: int, random: np.random.Generator) -> Float32[ndarray, "tokens dim"]:
    """The first right singular vectors, by random projection and power iterations (Halko et al., 2011)."""
    found = weighed @ random.standard_normal((weighed.shape[1], min(dim + 16, *weighed.shape)), np.float32)
    for _ in range(POWER_ITERATIONS):
        found = weighed @ (weighed.T @ np.linalg.qr(found)[0])
    axes = np.linalg.svd((weighed.T @ np.linalg.qr(found)[0]).T, full_matrices=False)[2]
    return np.ascontiguousarray(axes[:dim].T, np.float32)
