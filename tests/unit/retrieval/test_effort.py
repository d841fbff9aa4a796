"""An index that looks further, or less far."""

from __future__ import annotations

import numpy as np
import pytest

from ctd_scale.retrieval.dense import DenseIndex, ExactIndex, unit_vectors
from ctd_scale.retrieval.effort import has_effort, with_effort
from ctd_scale.retrieval.remote import RemoteIndex
from ctd_scale.retrieval.scann_index import ScannIndex
from ctd_scale.retrieval.segments import PartialIndex, SegmentedIndex


def test_effort_is_that_of_the_leaves_and_no_index_changes_another() -> None:
    pytest.importorskip("scann")
    vectors = unit_vectors(np.random.default_rng(0).standard_normal((900, 16)).astype(np.float32))
    index, exact = ScannIndex.build(vectors, 0.9, leaves=30), ExactIndex(vectors)
    queries = unit_vectors(np.random.default_rng(1).standard_normal((64, 16)).astype(np.float32))
    wanted, _ = exact.search(queries, 10)

    def recall(one: DenseIndex) -> float:
        found = one.search(queries, 10)[0] % len(vectors)  # the five that are there twice count as themselves
        return float(np.mean([len(set(a) & set(b)) for a, b in zip(found.tolist(), wanted.tolist(), strict=True)])) / 10

    before = index.settings.leaves_to_search
    less, more = with_effort(index, 0.01), with_effort(index, 1000)
    assert (less.settings.leaves_to_search, more.settings.leaves_to_search) == (1, 30)  # type: ignore[attr-defined]
    assert index.settings.leaves_to_search == before
    assert recall(less) < recall(index) <= recall(more)
    assert with_effort(index, 1.0) is index
    assert has_effort(index)
    assert not has_effort(exact)
    assert with_effort(exact, 2.0) is exact
    grown = SegmentedIndex.of([index, ExactIndex(vectors[:5])], [len(vectors), 5])
    assert has_effort(grown)
    assert recall(with_effort(grown, 0.01)) < recall(grown)
    assert not has_effort(SegmentedIndex.of([exact], [len(vectors)]))
    partial = PartialIndex(index, np.arange(len(vectors), dtype=np.int32))
    assert has_effort(partial)
    assert recall(with_effort(partial, 0.01)) < recall(partial)
    assert not has_effort(PartialIndex(exact, partial.ids))


def test_what_is_asked_elsewhere_is_asked_with_that_effort() -> None:
    asked: list[float] = []

    def ask(shards: int, queries: np.ndarray, k: int, effort: float) -> list[tuple[np.ndarray, np.ndarray]]:
        asked.append(effort)
        return [(np.zeros((len(queries), 1), np.int32), np.ones((len(queries), 1), np.float32))] * shards

    index = RemoteIndex(ask, [0, 5])
    assert has_effort(index)
    for each in (index, with_effort(index, 0.5), with_effort(PartialIndex(index, np.arange(5, dtype=np.int32)), 2.0)):
        each.search(np.ones((1, 2), np.float32), 1)
    assert asked == [1.0, 0.5, 2.0]
