"""The recall that the endpoint reports: against planted misses."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from ctd_scale.retrieval.dense import DenseIndex, ExactIndex, unit_vectors
from ctd_scale.retrieval.hybrid import HybridRetriever
from ctd_scale.retrieval.segments import SegmentedIndex
from ctd_scale.serving.probe import Probe, Searched, keep_probing, probed_recall

ITEMS = 100


def unit(rows: int, seed: int = 0) -> np.ndarray:
    return unit_vectors(np.random.default_rng(seed).standard_normal((rows, 8)).astype(np.float32))


class Blind:
    """Does not see some items."""

    def __init__(self, vectors: np.ndarray, unseen: np.ndarray) -> None:
        self.seen = np.setdiff1d(np.arange(len(vectors)), unseen)
        self.exact = ExactIndex(vectors[self.seen])

    def search(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        ids, cosines = self.exact.search(queries, k)
        return np.where(ids >= 0, self.seen[ids], -1).astype(np.int32), cosines


async def compute(function: Callable[..., Any], *arguments: Any) -> Any:
    return function(*arguments)


def recall(vectors: np.ndarray, dense: DenseIndex, preference: np.ndarray, chunk_items: int = 30) -> float:
    return asyncio.run(probed_recall(HybridRetriever(vectors, dense, None, 0.0), preference, compute, chunk_items))


@pytest.mark.parametrize("chunk_items", [3, 7, 1000])
@pytest.mark.parametrize("missed", [0, 1, 4, 10])
def test_each_of_the_ten_nearest_that_is_missed_costs_a_tenth(missed: int, chunk_items: int) -> None:
    vectors, preference = unit(ITEMS), unit(1, seed=1)[0] * np.float32(5)
    nearest = np.argsort(-(vectors @ preference))
    unseen = np.concatenate([nearest[:10][::-1][:missed], nearest[20:30]])  # what is farther does not count
    found = recall(vectors, Blind(vectors, unseen), preference, chunk_items)
    assert found == pytest.approx(1 - missed / 10)


@pytest.mark.parametrize(("missed", "expected"), [(5, 1.0), (8, 0.7)])
def test_of_equal_items_either_counts(missed: int, expected: float) -> None:
    vectors = np.repeat(unit(5), 15, axis=0)
    assert recall(vectors, Blind(vectors, np.arange(missed)), vectors[0]) == pytest.approx(expected)


def test_a_catalogue_of_fewer_than_ten_is_found_whole() -> None:
    vectors = unit(4)
    assert recall(vectors, ExactIndex(vectors), unit(1, seed=1)[0]) == 1.0
    assert recall(vectors, Blind(vectors, np.array([2])), unit(1, seed=1)[0]) == pytest.approx(3 / 4)


def test_requests_are_computed_between_the_chunks() -> None:
    vectors, asked = unit(ITEMS), []

    async def noted(function: Callable[..., Any], *arguments: Any) -> Any:
        asked.append(function.__name__)
        return function(*arguments)

    retriever = HybridRetriever(vectors, ExactIndex(vectors), None, 0.0)
    asyncio.run(probed_recall(retriever, vectors[0], noted, chunk_items=30))
    assert asked == ["search", *["_scored"] * 4]


class Broken:
    def search(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        raise OSError("the index is away")


def test_what_was_answered_is_probed_where_an_item_can_be_missed(caplog: pytest.LogCaptureFixture) -> None:
    vectors, preference = unit(ITEMS), unit(1, seed=1)[0]
    missing = Blind(vectors, np.argsort(-(vectors @ preference))[:2])

    def searched(version: str, dense: DenseIndex) -> Searched:
        return Searched(version, HybridRetriever(vectors, dense, None, 0.0), preference)

    grown = SegmentedIndex.of([missing, ExactIndex(vectors[:0])], [ITEMS, 0])
    waiting = [
        searched("exact", ExactIndex(vectors)),
        None,
        searched("broken", Broken()),
        searched("approximate", missing),
        searched("grown", grown),
    ]
    reported: list[Probe] = []

    async def probing() -> None:
        taken = iter(waiting)
        task = asyncio.create_task(keep_probing(0.001, lambda: next(taken, None), compute, reported.append))
        while len(reported) < 2:
            await asyncio.sleep(0.001)
        task.cancel()

    asyncio.run(asyncio.wait_for(probing(), timeout=30))
    assert [probe.version for probe in reported] == ["approximate", "grown"]
    assert [probe.recall for probe in reported] == pytest.approx([0.8, 0.8])
    assert [record.getMessage() for record in caplog.records] == ["the index of version broken was not probed"]
