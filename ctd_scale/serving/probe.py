"""Whether the index still finds what is nearest to what users want: now and then a preference that was just answered is
searched exactly too."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float32
from numpy import ndarray

from ctd_scale.retrieval.dense import exact_search, unit_vectors
from ctd_scale.retrieval.hybrid import HybridRetriever
from ctd_scale.retrieval.segments import is_exact

PROBED = 10
PROBED_ITEMS = 1 << 13  # at a time
REST = 9.0  # for so many times as long as they took nothing is probed
# Runs a function where requests are computed.
Compute = Callable[..., Awaitable[Any]]
serving_log = logging.getLogger("ctd_scale.serving")


@dataclass(frozen=True)
class Searched:
    """What a request was searched for, and where."""

    version: str
    retriever: HybridRetriever
    preference: Float32[ndarray, "cond_dim"]


@dataclass(frozen=True)
class Probe:
    """recall@10 of one search by the index of a version."""

    version: str
    recall: float


async def keep_probing(
    every_s: float, take: Callable[[], Searched | None], compute: Compute, report: Callable[[Probe], None]
) -> None:
    """Report a probe every so often: of what `take` gives, if it gives anything and its engine can miss an item."""
    while True:
        await asyncio.sleep(every_s)
        searched = take()
        if searched is None or is_exact(searched.retriever.dense):
            continue
        try:
            recall = await probed_recall(searched.retriever, searched.preference, compute)
        except Exception:
            serving_log.exception("the index of version %s was not probed", searched.version)
        else:
            report(Probe(searched.version, recall))


async def probed_recall(
    retriever: HybridRetriever,
    preference: Float32[ndarray, "cond_dim"],
    compute: Compute,
    chunk_items: int = PROBED_ITEMS,
) -> float:
    """Share of the ten nearest that the dense engine finds; of equal items either counts.

    Each call of `compute` scores at most `chunk_items` items, and after it comes a rest: a request that comes meanwhile
    waits for one of them at most, and those that come one after the other do not pile up.
    """
    query = unit_vectors(np.asarray(preference)[None], "preference")
    _, found = await compute(retriever.dense.search, query, PROBED)
    best = np.empty((1, 0), np.float32)
    for start in range(0, len(retriever.vectors), chunk_items):
        began = time.perf_counter()
        _, cosines = await compute(_scored, retriever, start, start + chunk_items, query)
        await asyncio.sleep(REST * (time.perf_counter() - began))
        best = np.sort(np.concatenate([best, cosines], axis=1))[:, -PROBED:]
    nearest = best[best > -np.inf]
    return float((found >= nearest.min() - 1e-6).sum() / len(nearest))


def _scored(
    retriever: HybridRetriever, start: int, stop: int, query: Float32[ndarray, "one cond_dim"]
) -> tuple[ndarray, ndarray]:
    """Here and not before the call: vectors may be read from a disk."""
    return exact_search(retriever.vectors[start:stop], query, PROBED)
