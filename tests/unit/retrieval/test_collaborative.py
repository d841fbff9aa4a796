"""What the graph says of a history: against LightGCN's own rule, and against inner products over all items."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ctd_scale.batches import Catalogue
from ctd_scale.config import RetrievalConfig
from ctd_scale.graph.csr import BipartiteGraph
from ctd_scale.retrieval.build import build_graph_index, build_index, load_graph_index
from ctd_scale.retrieval.collaborative import graph_sources, lift, read_histories
from ctd_scale.retrieval.segments import is_exact

USERS, ITEMS, DIM = 12, 40, 5
NONE = np.empty(0, np.int32)


def embeddings(seed: int = 0) -> np.ndarray:
    """Of very different lengths, as those of usual and unusual items are."""
    random = np.random.default_rng(seed)
    return (random.standard_normal((ITEMS, DIM)) * random.uniform(0.1, 5, (ITEMS, 1))).astype(np.float32)


def choices(seed: int = 0) -> list[np.ndarray]:
    random = np.random.default_rng((seed, 1))
    return [random.integers(0, ITEMS, count).astype(np.int32) for count in random.integers(1, 20, USERS)]


def test_a_history_is_read_as_the_graph_gives_a_user_its_embedding() -> None:
    histories, items = choices(), embeddings()
    users = np.repeat(np.arange(USERS), [len(each) for each in histories])
    graph = BipartiteGraph.from_edges(users, np.concatenate(histories), USERS, ITEMS)
    degrees = graph.degrees[USERS:]
    read = read_histories(graph_sources(items, degrees), histories)
    for user in range(USERS):
        chosen = graph.positives[graph.positive_offsets[user] : graph.positive_offsets[user + 1]] - USERS
        own = sum(items[item] / np.sqrt(float(graph.degrees[user]) * float(degrees[item])) for item in chosen)
        assert np.allclose(read[user, :-1], own / np.linalg.norm(own), atol=1e-6)
        assert read[user, -1] == 0


@given(st.integers(0, 50))
def test_a_cosine_of_the_lifted_space_is_an_inner_product(seed: int) -> None:
    items = embeddings(seed)
    lifted = lift(items)
    assert np.allclose(np.linalg.norm(lifted, axis=1), 1, atol=1e-6)
    reading = read_histories(graph_sources(items, np.ones(ITEMS, np.int64)), choices(seed))
    longest = np.linalg.norm(items, axis=1).max()
    assert np.allclose(reading @ lifted.T, reading[:, :-1] @ items.T / longest, atol=1e-6)


def test_nothing_to_read_favours_no_direction() -> None:
    items = np.array([[1, 0], [-1, 0], [0, 3]], np.float32)
    read = read_histories(graph_sources(items, np.zeros(3, np.int64)), [NONE, np.array([0, 1], np.int32)])
    assert read.tolist() == [[0, 0, 1], [0, 0, 1]]


@pytest.mark.parametrize("bad", [0.0, np.nan])
def test_embeddings_without_a_direction_are_refused(bad: float) -> None:
    with pytest.raises(ValueError, match="all zero, or hold NaN; rerun train_graph"):
        lift(np.full((3, 2), bad, np.float32))


@pytest.mark.parametrize("exact_limit", [1, 1000])
def test_the_index_finds_the_rest_of_a_community(tmp_path: Path, exact_limit: int) -> None:
    if exact_limit == 1:
        pytest.importorskip("scann")
    random, communities, each = np.random.default_rng(0), 8, 50
    community = np.repeat(np.arange(communities), each)
    items = 3 * np.eye(communities, dtype=np.float32)[community]
    items += 0.1 * random.standard_normal(items.shape).astype(np.float32)
    histories = [np.flatnonzero(community == c)[: each - 10].astype(np.int32) for c in range(communities)]
    config = RetrievalConfig(exact_limit=exact_limit)
    degrees = random.integers(1, 100, len(items))
    facts = build_graph_index(items, degrees, config, tmp_path, 0, histories)
    assert facts["graph_engine"] == ("scann" if exact_limit == 1 else "exact")
    assert facts["graph_recall"] >= config.target_recall
    graph = load_graph_index(tmp_path)
    ids, _ = graph.retriever.search(graph.queries(histories), [NONE] * communities, histories, 10)
    for c, row in enumerate(ids):
        assert sorted(row.tolist()) == np.flatnonzero(community == c)[each - 10 :].tolist()


@pytest.mark.parametrize("exact_limit", [1, 1000])
def test_what_nobody_chose_is_never_proposed(tmp_path: Path, exact_limit: int) -> None:
    """The same neighbours, of the same scores, as without such items, wherever training left these."""
    if exact_limit == 1:
        pytest.importorskip("scann")
    random, config = np.random.default_rng(1), RetrievalConfig(exact_limit=exact_limit)
    items = random.standard_normal((300, 8)).astype(np.float32)
    degrees = random.integers(1, 9, len(items))
    cold = np.sort(random.choice(len(items), 120, replace=False))
    degrees[cold] = 0
    items[cold] = 5 * items[0]  # as near to a user of item 0 as can be
    histories = [random.choice(len(items), 12, replace=False).astype(np.int32) for _ in range(40)]
    build_graph_index(items, degrees, config, tmp_path / "all", 0, histories)
    graph = load_graph_index(tmp_path / "all")
    assert is_exact(graph.retriever.dense) == (exact_limit == 1000)

    kept = np.flatnonzero(degrees)
    place = np.full(len(items), -1, np.int32)
    place[kept] = np.arange(len(kept))
    heard = [np.intersect1d(place[history], np.arange(len(kept))).astype(np.int32) for history in histories]
    build_graph_index(items[kept], degrees[kept], config, tmp_path / "kept", 0, heard)
    alone = load_graph_index(tmp_path / "kept")
    assert np.allclose(graph.queries(histories), alone.queries(heard), atol=1e-6)
    nothing = [NONE] * len(histories)
    ids, scores = graph.retriever.search(graph.queries(histories), nothing, histories, 10)
    expected, expected_scores = alone.retriever.search(alone.queries(heard), nothing, heard, 10)
    assert np.array_equal(ids, kept[expected])
    assert np.allclose(scores, expected_scores, atol=1e-6)
    assert not graph.retriever.vectors[cold][:, :-1].any()
    # Asked for more than the graph knows, it gives what it knows.
    ids, _ = graph.retriever.search(graph.queries(histories[:1]), nothing[:1], nothing[:1], len(items))
    assert sorted(ids[ids >= 0].tolist()) == kept.tolist()


def test_an_index_of_before_is_refused(tmp_path: Path) -> None:
    names = [str(item) for item in range(ITEMS)]
    build_index(embeddings(), Catalogue(names, names, names), RetrievalConfig(), tmp_path, 0)
    with pytest.raises(ValueError, match="built by an older version; rerun build_index"):
        load_graph_index(tmp_path)
