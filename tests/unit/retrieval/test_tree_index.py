"""Approximate engines against the exact one."""

from __future__ import annotations

import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from ctd_scale.retrieval.dense import ExactIndex, unit_vectors
from ctd_scale.retrieval.faiss_index import FaissIndex
from ctd_scale.retrieval.scann_index import ScannIndex
from ctd_scale.retrieval.tree_index import TreeIndex, load_shards, save_shards, united

TARGET_RECALL = 0.95


def random_vectors(rows: int, dim: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((rows, dim)).astype(np.float32)


def clustered_vectors(rows: int, dim: int, clusters: int) -> np.ndarray:
    rng = np.random.default_rng(1)
    centres = rng.standard_normal((clusters, dim))
    noisy = centres[rng.integers(clusters, size=rows)] + 0.6 * rng.standard_normal((rows, dim))
    return unit_vectors(noisy.astype(np.float32))


def recall(found: np.ndarray, exact: np.ndarray) -> float:
    return float(np.mean([len(np.intersect1d(a, b)) / len(b) for a, b in zip(found, exact, strict=True)]))


@pytest.fixture(scope="module", params=[ScannIndex, FaissIndex], ids=lambda engine: engine.name)
def engine(request: pytest.FixtureRequest) -> type[TreeIndex]:
    if request.param is ScannIndex:
        pytest.importorskip("scann", reason="ScaNN has wheels for x86-64 Linux only")
    else:
        pytest.importorskip("faiss", reason="faiss-cpu is not installed; it comes with the extra `dev`")
    return request.param


@pytest.fixture(scope="module")
def catalogue() -> np.ndarray:
    return clustered_vectors(20_000, 64, clusters=200)


@pytest.fixture(scope="module")
def index(engine: type[TreeIndex], catalogue: np.ndarray) -> TreeIndex:
    return engine.build(catalogue, TARGET_RECALL, seed=0)


@pytest.fixture(scope="module")
def queries(catalogue: np.ndarray) -> np.ndarray:
    noise = unit_vectors(random_vectors(400, 64, seed=5))
    return unit_vectors(catalogue[::50] + noise)


@pytest.mark.parametrize("k", [1, 10, 100, 1000])
def test_the_target_is_reached_on_queries_not_seen(
    index: TreeIndex, catalogue: np.ndarray, queries: np.ndarray, k: int
) -> None:
    exact, _ = ExactIndex(catalogue).search(queries, k)
    found, _ = index.search(queries, k)
    assert min(index.recall, index.settings.recall_at_100) >= TARGET_RECALL
    # Other queries than those of the calibration: allow for the noise of 256 of them.
    assert recall(found, exact) >= TARGET_RECALL - 0.015


def test_not_everything_is_searched(index: TreeIndex) -> None:
    assert index.settings.leaves_to_search < index.settings.leaves / 2
    assert index.settings.reorder < index.settings.items / 20


def test_cosines_are_exact_and_descending(index: TreeIndex, catalogue: np.ndarray, queries: np.ndarray) -> None:
    ids, cosines = index.search(queries, 10)
    exact = np.einsum("qc,qkc->qk", queries, catalogue[ids])
    assert np.allclose(cosines, exact, atol=1e-5)
    assert (np.diff(cosines, axis=1) <= 0).all()


def test_a_planted_item_is_found(index: TreeIndex, catalogue: np.ndarray) -> None:
    ids, cosines = index.search(catalogue[[123, 4567]] * np.float32(3), 1)
    assert ids[:, 0].tolist() == [123, 4567]
    assert np.allclose(cosines, 1, atol=1e-5)


def test_saved_moved_and_loaded_answers_alike(index: TreeIndex, queries: np.ndarray, tmp_path: Path) -> None:
    index.save(tmp_path / "here")
    shutil.move(tmp_path / "here", tmp_path / "there")
    loaded = type(index).load(tmp_path / "there")
    assert loaded.settings == index.settings
    for k in (1, 10, 300):
        for ours, theirs in zip(index.search(queries, k), loaded.search(queries, k), strict=True):
            assert np.array_equal(ours, theirs)


def test_scann_refuses_a_folder_with_a_pickle(tmp_path: Path) -> None:
    pytest.importorskip("scann")
    ScannIndex.build(random_vectors(100, 4), target_recall=0.9).save(tmp_path)
    (tmp_path / "scann_docids.pkl").write_bytes(b"")
    with pytest.raises(ValueError, match="unpickle"):
        ScannIndex.load(tmp_path)


def test_a_folder_that_is_no_index_is_refused(engine: type[TreeIndex], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"no {engine.name} index: settings\.json is missing"):
        engine.load(tmp_path)


@pytest.mark.parametrize(("rows", "dim"), [(16, 1), (17, 3), (300, 7)])
def test_with_k_beyond_the_items_every_item_is_answered_once(engine: type[TreeIndex], rows: int, dim: int) -> None:
    index = engine.build(random_vectors(rows, dim), target_recall=0.9)
    ids, cosines = index.search(random_vectors(4, dim, seed=1), rows + 5)
    assert np.array_equal(np.sort(ids[:, :rows], axis=1), np.tile(np.arange(rows), (4, 1)))
    assert (ids[:, rows:] == -1).all()
    assert np.isneginf(cosines[:, rows:]).all()
    assert not np.isnan(cosines).any()
    assert index.search(np.empty((0, dim), dtype=np.float32), 3)[0].shape == (0, 3)


def test_what_an_engine_pads_with_becomes_ours(engine: type[TreeIndex]) -> None:
    built = engine.build(random_vectors(2000, 16), target_recall=0.8, leaves=200)
    index = replace(built, settings=replace(built.settings, leaves_to_search=1))
    ids, cosines = index.search(random_vectors(5, 16, seed=1), 100)
    assert ids.shape == (5, 100)
    assert (ids == -1).any(), "too few leaves are opened for so long a list"
    assert not np.isnan(cosines).any()
    assert np.array_equal(ids == -1, np.isneginf(cosines))
    for row in ids:
        real = row[row >= 0]
        assert len(np.unique(real)) == len(real)


def test_an_engine_is_calibrated_on_the_queries_given(
    engine: type[TreeIndex], catalogue: np.ndarray, index: TreeIndex
) -> None:
    easy = engine.build(catalogue, TARGET_RECALL, queries=catalogue[:64])
    assert easy.recall >= TARGET_RECALL
    assert easy.settings.leaves_to_search <= index.settings.leaves_to_search


def test_faiss_built_again_answers_bit_for_bit(catalogue: np.ndarray, queries: np.ndarray) -> None:
    pytest.importorskip("faiss")
    first, again = (FaissIndex.build(catalogue, TARGET_RECALL) for _ in range(2))
    assert first.settings == again.settings
    for ours, theirs in zip(first.search(queries, 10), again.search(queries, 10), strict=True):
        assert np.array_equal(ours, theirs)


def test_faiss_leaves_the_number_of_threads_as_it_was(catalogue: np.ndarray, queries: np.ndarray) -> None:
    faiss = pytest.importorskip("faiss")
    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(3)
    try:
        FaissIndex.build(catalogue[:200], TARGET_RECALL).search(queries, 10)
        assert faiss.omp_get_max_threads() == 3
    finally:
        faiss.omp_set_num_threads(before)


@pytest.mark.parametrize("name", ["ScaNN", "faiss"])
def test_an_engine_needs_enough_items_to_train(name: str) -> None:
    engine = {"ScaNN": ScannIndex, "faiss": FaissIndex}[name]
    with pytest.raises(ValueError, match=f"{name} needs at least 16 items, got 15"):
        engine.build(random_vectors(15, 4), target_recall=0.9)
    with pytest.raises(ValueError, match=r"at least 16 items for each of retrieval\.shards=4, got 63"):
        engine.build_shards(random_vectors(63, 4), 4, target_recall=0.9)


def test_who_lacks_an_engine_is_told_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "scann.scann_ops.py", None)
    monkeypatch.setitem(sys.modules, "scann", None)
    with pytest.raises(RuntimeError, match=r"ScaNN cannot be imported .*Install scann .*retrieval\.engine"):
        ScannIndex.build(random_vectors(20, 4), target_recall=0.9)
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(RuntimeError, match=r"faiss cannot be imported .*Install faiss-cpu .*retrieval\.exact_limit"):
        FaissIndex.build(random_vectors(20, 4), target_recall=0.9)


# -- shards --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [2, 5])
def test_shards_together_reach_the_target(
    engine: type[TreeIndex], catalogue: np.ndarray, queries: np.ndarray, count: int
) -> None:
    shards = engine.build_shards(catalogue, count, TARGET_RECALL, queries=queries[::2])
    assert [shard.settings.items for shard in shards] == [20_000 // count] * count
    # What is stored is the recall of the merged list.
    (measured,) = {(shard.recall, shard.settings.recall_at_100) for shard in shards}
    assert min(measured) >= TARGET_RECALL
    assert all(shard.settings.leaves_to_search < shard.settings.leaves / 2 for shard in shards)
    unseen = queries[1::2]
    for k in (10, 100):
        found, cosines = united(shards).search(unseen, k)
        assert recall(found, ExactIndex(catalogue).search(unseen, k)[0]) >= TARGET_RECALL - 0.02
        assert np.allclose(cosines, np.einsum("qc,qkc->qk", unseen, catalogue[found]), atol=1e-5)


def test_shards_that_look_at_everything_are_exact(engine: type[TreeIndex], tmp_path: Path) -> None:
    vectors, queries = random_vectors(1003, 16), random_vectors(20, 16, seed=1)
    shards = engine.build_shards(vectors, 3, target_recall=0.9)
    assert [shard.settings.items for shard in shards] == [335, 334, 334]
    full = [
        replace(each, settings=replace(each.settings, leaves_to_search=each.settings.leaves, reorder=335))
        for each in shards
    ]
    save_shards(full, tmp_path)
    for k in (1, 10, 400, 1003, 1100):
        expected_ids, expected = ExactIndex(vectors).search(queries, k)
        for index in (united(full), united(load_shards(engine, tmp_path))):
            ids, cosines = index.search(queries, k)
            assert np.array_equal(ids, expected_ids)
            assert np.allclose(cosines, expected, atol=1e-6)
