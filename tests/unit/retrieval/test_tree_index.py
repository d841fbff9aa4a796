"""Approximate engines against the exact one."""

from __future__ import annotations

import builtins
import importlib.util
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from ctd_scale.retrieval.dense import ExactIndex, unit_vectors
from ctd_scale.retrieval.scann_index import ScannIndex
from ctd_scale.retrieval.tree_index import load_shards, save_shards, united

TARGET_RECALL = 0.95
needs_scann = pytest.mark.skipif(
    importlib.util.find_spec("scann") is None, reason="ScaNN has wheels for x86-64 Linux only"
)


def random_vectors(rows: int, dim: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((rows, dim)).astype(np.float32)


def clustered_vectors(rows: int, dim: int, clusters: int) -> np.ndarray:
    rng = np.random.default_rng(1)
    centres = rng.standard_normal((clusters, dim))
    noisy = centres[rng.integers(clusters, size=rows)] + 0.6 * rng.standard_normal((rows, dim))
    return unit_vectors(noisy.astype(np.float32))


@pytest.fixture(scope="module")
def catalogue() -> np.ndarray:
    return clustered_vectors(20_000, 64, clusters=200)


@pytest.fixture(scope="module")
def scann(catalogue: np.ndarray) -> ScannIndex:
    pytest.importorskip("scann")
    return ScannIndex.build(catalogue, TARGET_RECALL, seed=0)


@pytest.fixture(scope="module")
def queries(catalogue: np.ndarray) -> np.ndarray:
    noise = unit_vectors(random_vectors(400, 64, seed=5))
    return unit_vectors(catalogue[::50] + noise)


@pytest.mark.parametrize("k", [1, 10, 100, 1000])
def test_scann_reaches_its_target_on_queries_it_has_not_seen(
    scann: ScannIndex, catalogue: np.ndarray, queries: np.ndarray, k: int
) -> None:
    exact, _ = ExactIndex(catalogue).search(queries, k)
    found, _ = scann.search(queries, k)
    recall = np.mean([len(np.intersect1d(a, b)) / k for a, b in zip(exact, found, strict=True)])
    assert min(scann.recall, scann.settings.recall_at_100) >= TARGET_RECALL
    # Other queries than those of the calibration: allow for the noise of 256 of them.
    assert recall >= TARGET_RECALL - 0.015


def test_scann_does_not_search_everything(scann: ScannIndex) -> None:
    assert scann.settings.leaves_to_search < scann.settings.leaves / 2
    assert scann.settings.reorder < scann.settings.items / 20


def test_scann_answers_exact_cosines_descending(scann: ScannIndex, catalogue: np.ndarray, queries: np.ndarray) -> None:
    ids, cosines = scann.search(queries, 10)
    exact = np.einsum("qc,qkc->qk", queries, catalogue[ids])
    assert np.allclose(cosines, exact, atol=1e-5)
    assert (np.diff(cosines, axis=1) <= 0).all()


def test_scann_finds_a_planted_item(scann: ScannIndex, catalogue: np.ndarray) -> None:
    ids, cosines = scann.search(catalogue[[123, 4567]] * np.float32(3), 1)
    assert ids[:, 0].tolist() == [123, 4567]
    assert np.allclose(cosines, 1, atol=1e-5)


def test_scann_saved_moved_and_loaded_answers_alike(scann: ScannIndex, queries: np.ndarray, tmp_path: Path) -> None:
    scann.save(tmp_path / "here")
    shutil.move(tmp_path / "here", tmp_path / "there")
    loaded = ScannIndex.load(tmp_path / "there")
    assert loaded.settings == scann.settings
    for k in (1, 10, 300):
        for ours, theirs in zip(scann.search(queries, k), loaded.search(queries, k), strict=True):
            assert np.array_equal(ours, theirs)


def test_scann_refuses_a_folder_with_a_pickle(scann: ScannIndex, tmp_path: Path) -> None:
    scann.save(tmp_path)
    (tmp_path / "scann_docids.pkl").write_bytes(b"")
    with pytest.raises(ValueError, match="unpickle"):
        ScannIndex.load(tmp_path)


@needs_scann
def test_scann_refuses_a_folder_that_is_no_index(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"settings\.json is missing"):
        ScannIndex.load(tmp_path)


@needs_scann
@pytest.mark.parametrize(("rows", "dim"), [(16, 1), (17, 3), (300, 7)])
def test_scann_with_k_beyond_the_items_answers_every_item_once(rows: int, dim: int) -> None:
    index = ScannIndex.build(random_vectors(rows, dim), target_recall=0.9)
    ids, cosines = index.search(random_vectors(4, dim, seed=1), rows + 5)
    assert np.array_equal(np.sort(ids[:, :rows], axis=1), np.tile(np.arange(rows), (4, 1)))
    assert (ids[:, rows:] == -1).all()
    assert np.isneginf(cosines[:, rows:]).all()
    assert not np.isnan(cosines).any()
    assert index.search(np.empty((0, dim), dtype=np.float32), 3)[0].shape == (0, 3)


@needs_scann
def test_scann_turns_its_own_padding_into_ours(scann: ScannIndex, queries: np.ndarray) -> None:
    k = 5000  # fewer leaves than items: ScaNN cannot fill the list
    ids, cosines = scann.search(queries[:5], k)
    assert ids.shape == (5, k)
    assert not np.isnan(cosines).any()
    assert np.array_equal(ids == -1, np.isneginf(cosines))
    for row in ids:
        real = row[row >= 0]
        assert len(np.unique(real)) == len(real)


@needs_scann
def test_scann_is_calibrated_on_the_queries_given(catalogue: np.ndarray, scann: ScannIndex) -> None:
    easy = ScannIndex.build(catalogue, TARGET_RECALL, queries=catalogue[:64])
    assert easy.recall >= TARGET_RECALL
    assert easy.settings.leaves_to_search <= scann.settings.leaves_to_search


def test_scann_needs_enough_items_to_train() -> None:
    with pytest.raises(ValueError, match="at least 16 items, got 15"):
        ScannIndex.build(random_vectors(15, 4), target_recall=0.9)


def test_a_machine_without_scann_is_told_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    genuine = builtins.__import__

    def without_scann(name, *args, **kwargs):
        if name.startswith("scann"):
            raise ImportError("no wheel")
        return genuine(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_scann)
    with pytest.raises(RuntimeError, match=r"retrieval\.exact_limit"):
        ScannIndex.build(random_vectors(20, 4), target_recall=0.9)


@pytest.mark.parametrize("k", [10, 100])
@pytest.mark.parametrize("count", [2, 5])
def test_shards_together_reach_the_target(catalogue: np.ndarray, queries: np.ndarray, count: int, k: int) -> None:
    pytest.importorskip("scann")
    shards = ScannIndex.build_shards(catalogue, count, TARGET_RECALL, queries=queries[::2])
    assert [shard.settings.items for shard in shards] == [20_000 // count] * count
    # What is stored is the recall of the merged list.
    (measured,) = {(shard.recall, shard.settings.recall_at_100) for shard in shards}
    assert min(measured) >= TARGET_RECALL
    unseen = queries[1::2]
    exact, _ = ExactIndex(catalogue).search(unseen, k)
    found, cosines = united(shards).search(unseen, k)
    recall = np.mean([len(np.intersect1d(a, b)) / k for a, b in zip(exact, found, strict=True)])
    assert recall >= TARGET_RECALL - 0.02
    assert np.allclose(cosines, np.einsum("qc,qkc->qk", unseen, catalogue[found]), atol=1e-5)
    assert all(shard.settings.leaves_to_search < shard.settings.leaves / 2 for shard in shards)


def test_shards_that_look_at_everything_are_exact(tmp_path: Path) -> None:
    pytest.importorskip("scann")
    vectors, queries = random_vectors(1003, 16), random_vectors(20, 16, seed=1)
    shards = ScannIndex.build_shards(vectors, 3, target_recall=0.9)
    full = [
        replace(each, settings=replace(each.settings, leaves_to_search=each.settings.leaves, reorder=335))
        for each in shards
    ]
    save_shards(full, tmp_path)
    for k in (1, 10, 400, 1003, 1100):
        expected_ids, expected = ExactIndex(vectors).search(queries, k)
        for index in (united(full), united(load_shards(ScannIndex, tmp_path))):
            ids, cosines = index.search(queries, k)
            assert np.array_equal(ids, expected_ids)
            assert np.allclose(cosines, expected, atol=1e-6)


def test_every_shard_needs_enough_items_to_train() -> None:
    with pytest.raises(ValueError, match=r"at least 16 items for each of retrieval\.shards=4, got 63"):
        ScannIndex.build_shards(random_vectors(63, 4), 4, target_recall=0.9)
