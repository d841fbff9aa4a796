"""Vectors of real titles, by latent semantic analysis, and of as many more as wanted, made of their words."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from scipy.sparse import csr_matrix

from ctd_scale.batches import Catalogue
from ctd_scale.retrieval.dense import unit_vectors
from ctd_scale.retrieval.text import words

DIM = 64


def catalogue_of(data_dir: str, items: int) -> Catalogue:
    table = pq.read_table(Path(data_dir) / "catalog_reddit_1m" / "items.parquet").slice(0, items)
    return Catalogue(*(table[name].to_pylist() for name in ("item_id", "title", "category")))


def title_vectors(catalogue: Catalogue, file: Path, items: int) -> None:
    """Write unit vectors [items, DIM] of the catalogue's titles or, beyond them, of titles made of its words."""
    random = np.random.default_rng(0)
    numbers: dict[str, int] = {}
    of_items = [
        [numbers.setdefault(word, len(numbers)) for word in words(f"{category} {title}")]
        for title, category in zip(catalogue.titles, catalogue.categories, strict=True)
    ]
    lengths = np.array([len(each) for each in of_items])
    flat = np.concatenate([np.array(each, np.int32) for each in of_items])
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    often = np.bincount(flat, minlength=len(numbers))
    # A word that is rare says more; one that is nowhere else says nothing.
    weights = np.where(often > 1, np.log(len(catalogue) / often), 0).astype(np.float32)

    def counted(tokens: np.ndarray) -> csr_matrix:
        return csr_matrix((weights[tokens], tokens, offsets), (len(catalogue), len(numbers)))

    of_words = latent_words(counted(flat), random)
    _, kind = np.unique(catalogue.categories, return_inverse=True)
    kinds = np.repeat(kind, lengths)
    by_kind = np.argsort(kinds, kind="stable")
    vectors = np.lib.format.open_memmap(file, "w+", np.float32, (items, DIM))
    for start in range(0, items, len(catalogue)):
        made = flat
        if start:
            made = np.empty_like(flat)
            made[by_kind] = flat[np.lexsort((random.random(len(flat)), kinds))]
        sums = np.asarray(counted(made) @ of_words)
        sums += 1e-3 * sums.std() * random.standard_normal(sums.shape, np.float32)  # no two alike, none of zeros
        vectors[start : start + len(catalogue)] = unit_vectors(sums)[: items - start]
    vectors.flush()


def latent_words(counts: csr_matrix, random: np.random.Generator) -> np.ndarray:
    """Words' vectors [words, DIM]: the first right singular vectors by their inverse root, found by random projection
    and three power iterations (Halko et al., 2011)."""
    found = counts @ random.standard_normal((counts.shape[1], DIM + 16), np.float32)
    for _ in range(3):
        found = counts @ (counts.T @ np.linalg.qr(found)[0])
    projected = (counts.T @ np.linalg.qr(found)[0]).T
    _, scale, axes = np.linalg.svd(projected, full_matrices=False)
    return np.asarray((axes[:DIM] / np.sqrt(scale[:DIM, None])).T, np.float32)
