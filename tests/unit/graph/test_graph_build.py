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
from ctd_scale.graph.csr import BipartiteGraph

ITEMS = 9
HISTORIES = st.lists(st.lists(st.integers(0, ITEMS - 1), max_size=12), min_size=1, max_size=12)


def log_of(histories: list[list[int]]) -> InteractionLog:
    names = [str(item) for item in range(ITEMS)]
    return InteractionLog(
        np.cumsum([0, *map(len, histories)]),
        np.array([item for history in histories for item in history], np.int32),
        [str(user) for user in range(len(histories))],
        Catalogue(names, names, names),
    )


@given(HISTORIES, st.integers(1, 30))
def test_any_chunk_gives_the_graph_that_is_built_at_once(histories: list[list[int]], chunk: int) -> None:
    log = log_of([*histories, [0]])  # one edge at least
    expected = BipartiteGraph.from_edges(*log.train_edges(), log.num_users, log.num_items)
    with tempfile.TemporaryDirectory() as folder:
        built = build_graph(log, Path(folder), chunk)
        assert (built.num_users, built.num_items) == (expected.num_users, expected.num_items)
        assert built.neighbors.dtype == np.int32
        assert np.array_equal(built.offsets, expected.offsets)
        assert np.array_equal(built.neighbors, expected.neighbors)
        assert {file.name for file in Path(folder).iterdir()} == {"offsets.npy", "neighbors.npy", "sizes.json"}


def test_a_log_without_training_items_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no interactions"):
        build_graph(log_of([[], []]), tmp_path)
