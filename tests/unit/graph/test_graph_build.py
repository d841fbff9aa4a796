"""The graph built out of core against the one built at once."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ctd_scale.batches import Catalogue, InteractionLog
from ctd_scale.graph.build import build_graph
from ctd_scale.graph.csr import ARRAYS, BipartiteGraph

ITEMS = 9
HISTORIES = st.lists(st.lists(st.integers(0, ITEMS - 1), max_size=12), min_size=1, max_size=12)


def log_of(histories: list[list[int]], times: np.ndarray | None = None) -> InteractionLog:
    names = [str(item) for item in range(ITEMS)]
    return InteractionLog(
        np.cumsum([0, *map(len, histories)]),
        np.array([item for history in histories for item in history], np.int32),
        [str(user) for user in range(len(histories))],
        Catalogue(names, names, names),
        times,
    )


def timed_log_of(histories: list[list[int]]) -> InteractionLog:
    """Clocks of all users run side by side, and some interactions happen at once."""
    times = np.concatenate([np.arange(len(history)) * 3 // 2 + user for user, history in enumerate(histories)])
    return log_of(histories, times.astype(np.int64))


def assert_equal(built: BipartiteGraph, expected: BipartiteGraph) -> None:
    assert (built.num_users, built.num_items) == (expected.num_users, expected.num_items)
    for name in ARRAYS:
        assert getattr(built, name).dtype == getattr(expected, name).dtype, name
        assert np.array_equal(getattr(built, name), getattr(expected, name)), name


@given(HISTORIES, st.integers(1, 30))
def test_any_chunk_gives_the_graph_that_is_built_at_once(histories: list[list[int]], chunk: int) -> None:
    log = log_of([*histories, [0]])  # one edge at least
    expected = BipartiteGraph.from_edges(*log.train_edges(), log.num_users, log.num_items)
    with tempfile.TemporaryDirectory() as folder:
        assert_equal(build_graph(log, Path(folder), chunk=chunk), expected)
        assert {file.stem for file in Path(folder).iterdir()} == {*ARRAYS[:5], "sizes"}


@given(HISTORIES, st.integers(1, 30))
def test_with_times_rows_are_sorted_by_them(histories: list[list[int]], chunk: int) -> None:
    log = timed_log_of([*histories, [0]])
    assert log.times is not None
    sequences = [
        log.times[start : start + length] for start, length in zip(log.offsets, log.train_lengths(), strict=False)
    ]
    expected = BipartiteGraph.from_edges(*log.train_edges(), log.num_users, log.num_items, np.concatenate(sequences))
    with tempfile.TemporaryDirectory() as folder:
        built = build_graph(log, Path(folder), timed=True, chunk=chunk)
        assert_equal(built, expected)
        assert built.timed
    for node in range(built.num_nodes):
        assert (np.diff(built.times[built.offsets[node] : built.offsets[node + 1]]) >= 0).all()


@given(HISTORIES, st.integers(1, 30), st.integers(1, 5), st.booleans())
def test_a_hub_hears_from_as_many_as_its_cap(histories: list[list[int]], chunk: int, cap: int, timed: bool) -> None:
    log = timed_log_of([*histories, [0]])
    with tempfile.TemporaryDirectory() as one, tempfile.TemporaryDirectory() as other:
        whole = build_graph(log, Path(one), timed=timed)
        cut = build_graph(log, Path(other), timed=timed, hub_cap=cap, chunk=chunk)
    assert np.array_equal(cut.degrees, whole.degrees)
    assert np.array_equal(cut.positives, whole.positives)
    for node in range(whole.num_nodes):
        everyone = whole.neighbors[whole.offsets[node] : whole.offsets[node + 1]].tolist()
        kept = slice(cut.offsets[node], cut.offsets[node + 1])
        assert len(cut.neighbors[kept]) == min(cap, len(everyone))
        assert len(set(cut.neighbors[kept].tolist())) == len(cut.neighbors[kept])
        if timed:
            times = dict(zip(everyone, whole.times[whole.offsets[node] : whole.offsets[node + 1]], strict=True))
            assert [times[neighbor] for neighbor in cut.neighbors[kept].tolist()] == cut.times[kept].tolist()
        else:
            places = [everyone.index(neighbor) for neighbor in cut.neighbors[kept].tolist()]
            gaps = np.diff(places)
            assert gaps.max(initial=0) - gaps.min(initial=len(everyone)) <= 1  # evenly spaced


def test_a_log_without_training_items_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no interactions"):
        build_graph(log_of([[], []]), tmp_path)


def test_times_that_are_not_known_are_asked_for(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"name a column of timestamps \(interactions.order_column\)"):
        build_graph(log_of([[0, 1, 2]]), tmp_path, timed=True)
