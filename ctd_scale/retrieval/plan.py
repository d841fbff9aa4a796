"""What building the index will need: a smaller one of its kind is built, the rest is proportion."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

import numpy as np

from ctd_scale.batches import SPLITS, Catalogue, InteractionLog
from ctd_scale.config import RetrievalConfig
from ctd_scale.estimates import Estimate
from ctd_scale.retrieval.build import build_graph_index, build_index
from ctd_scale.retrieval.neighbors import WINDOW, count_neighbors

SAMPLED_ITEMS, SAMPLED_INTERACTIONS = 20_000, 300_000
# Of `count_neighbors`: each interaction, and each neighbour that is kept; on disk the latter's id and weight.
INTERACTION_BYTES, NEIGHBOR_BYTES, STORED_BYTES = 32, 24, 8


def plan_index(log: InteractionLog, cond_dim: int, embed_dim: int, config: RetrievalConfig, seed: int) -> Estimate:
    """Random vectors, titles and sequences; ScaNN where the whole catalogue will have it."""
    items = log.num_items
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
    counting = len(SPLITS) * seconds_to_count(log, config.neighbors, seed)
    kept = min(items * config.neighbors, 2 * WINDOW * len(log.items))
    return Estimate(
        "build_index",
        elapsed * share + counting,
        max(2.0 * size * share, float(INTERACTION_BYTES * len(log.items) + NEIGHBOR_BYTES * kept)),
        size * share + float(len(SPLITS) * STORED_BYTES * kept),
        f"{facts['engine']}; {elapsed:.1f} s for {sampled:,} items, {counting:.0f} s to count neighbours",
    )


def seconds_to_count(log: InteractionLog, neighbors: int, seed: int) -> float:
    """Of counting all neighbours once, by the time that it takes for some users who chose as many items as these on
    average, and items as usual."""
    if not neighbors:
        return 0.0
    length = max(1, round(len(log.items) / max(1, log.num_users)))
    users = max(1, min(len(log.items), SAMPLED_INTERACTIONS) // length)
    items = max(1, min(log.num_items, log.num_items * users * length // max(1, len(log.items))))
    random, names = np.random.default_rng(seed), [""] * items
    sequences = InteractionLog(
        np.arange(users + 1, dtype=np.int64) * length,
        random.integers(0, items, users * length).astype(np.int32),
        [""] * users,
        Catalogue(names, names, names),
    )
    count_neighbors(sequences, sequences.known_lengths("test"), neighbors)  # what is compiled is compiled
    started = time.perf_counter()
    count_neighbors(sequences, sequences.known_lengths("test"), neighbors)
    return (time.perf_counter() - started) * len(log.items) / (users * length)
