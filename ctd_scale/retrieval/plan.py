"""What building the index will need: a smaller one of its kind is built, the rest is proportion."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

import numpy as np

from ctd_scale.batches import SPLITS, Catalogue
from ctd_scale.config import RetrievalConfig
from ctd_scale.estimates import Estimate
from ctd_scale.retrieval.build import build_graph_index, build_index

SAMPLED_ITEMS = 20_000


def plan_index(items: int, cond_dim: int, embed_dim: int, config: RetrievalConfig, seed: int) -> Estimate:
    """Random vectors and titles; ScaNN where the whole catalogue will have it."""
    sampled = min(items, SAMPLED_ITEMS)
    random = np.random.default_rng(seed)
    words = [f"{first}ing {second}" for first, second in random.integers(0, 2000, (sampled, 2))]
    vectors, embeddings = (random.standard_normal((sampled, dim), np.float32) for dim in (cond_dim, embed_dim))
    limit = config.exact_limit if items <= config.exact_limit else 1
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        trial = config.model_copy(update={"exact_limit": limit})
        facts = build_index(vectors, Catalogue(words, words, words), trial, Path(folder), seed)
        for split in SPLITS:
            build_graph_index(embeddings, np.ones(sampled, np.int64), trial, Path(folder), seed, [], split)
        elapsed = time.perf_counter() - started
        size = sum(file.stat().st_size for file in Path(folder).rglob("*") if file.is_file())
    share = items / sampled
    return Estimate(
        "build_index",
        elapsed * share,
        2.0 * size * share,
        size * share,
        f"{facts['engine']}; {elapsed:.1f} s for {sampled:,} items",
    )
