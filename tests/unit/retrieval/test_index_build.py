"""The index artifact: what is written, and that what is read back answers."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from ctd_scale.batches import Catalogue
from ctd_scale.config import RetrievalConfig
from ctd_scale.retrieval.build import build_index, load_index
from ctd_scale.retrieval.dense import ExactIndex
from ctd_scale.retrieval.scann_index import ScannIndex
from ctd_scale.retrieval.segments import SegmentedIndex

ITEMS, DIM = 400, 8
NONE = np.empty(0, dtype=np.int32)


def catalogue(items: int = ITEMS) -> Catalogue:
    ids = [str(item) for item in range(items)]
    return Catalogue(ids, [f"Title{item}" for item in ids], ["even" if int(i) % 2 == 0 else "odd" for i in ids])


def item_vectors() -> np.ndarray:
    return np.random.default_rng(0).standard_normal((ITEMS, DIM)).astype(np.float32) * 3


@pytest.mark.parametrize(("exact_limit", "engine"), [(ITEMS, "exact"), (ITEMS - 1, "scann")])
def test_an_index_built_moved_and_loaded_answers(tmp_path: Path, exact_limit: int, engine: str) -> None:
    if engine == "scann":
        pytest.importorskip("scann")
    config = RetrievalConfig(exact_limit=exact_limit)
    facts = build_index(item_vectors(), catalogue(), config, tmp_path / "built", seed=0)
    assert {name: facts[name] for name in ("engine", "items", "dim")} == {
        "engine": engine,
        "items": ITEMS,
        "dim": DIM,
    }
    assert facts["recall"] >= config.target_recall
    assert facts["seconds"] >= 0
    assert (tmp_path / "built" / "scann").is_dir() == (engine == "scann")

    shutil.move(tmp_path / "built", tmp_path / "moved")
    hybrid = load_index(tmp_path / "moved", ITEMS, pi=0.5)
    assert isinstance(hybrid.dense, ScannIndex if engine == "scann" else ExactIndex)
    assert np.allclose(np.linalg.norm(hybrid.vectors, axis=1), 1, atol=1e-6)
    matches = hybrid.matches(["", "The user might like odd products, such as Title9"], limit=3)
    ids, scores = hybrid.search(item_vectors()[[5, 9]], matches, [NONE, NONE], k=3)
    assert ids[:, 0].tolist() == [5, 9]
    assert np.allclose(scores[:, 0], [1, 1.5], atol=1e-6)


def test_an_index_of_shards_is_loaded_as_one(tmp_path: Path) -> None:
    pytest.importorskip("scann")
    config = RetrievalConfig(exact_limit=1, shards=3)
    facts = build_index(item_vectors(), catalogue(), config, tmp_path, seed=0)
    assert facts["recall"] >= config.target_recall
    assert sorted(each.name for each in (tmp_path / "scann").iterdir()) == ["0", "1", "2"]
    hybrid = load_index(tmp_path, ITEMS, pi=0.5)
    assert isinstance(hybrid.dense, SegmentedIndex)
    assert list(hybrid.dense.offsets) == [0, 134, 267, 400]
    ids, scores = hybrid.search(item_vectors()[[5, 200, 399]], [NONE] * 3, [NONE] * 3, k=3)
    assert ids[:, 0].tolist() == [5, 200, 399]
    assert np.allclose(scores[:, 0], 1, atol=1e-6)

    shutil.rmtree(tmp_path / "scann" / "1")
    with pytest.raises(ValueError, match="holds 267 of 400 items; rerun build_index"):
        load_index(tmp_path, ITEMS, pi=0.5)


def test_a_catalogue_too_small_for_scann_is_searched_exactly(tmp_path: Path) -> None:
    config = RetrievalConfig(exact_limit=1)
    facts = build_index(item_vectors()[:16], catalogue(16), config, tmp_path, seed=0)
    assert (facts["engine"], facts["recall"]) == ("exact", 1.0)


def test_vectors_of_another_catalogue_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="400 rows but the catalogue has 399 items"):
        build_index(item_vectors(), catalogue(ITEMS - 1), RetrievalConfig(), tmp_path, seed=0)
    build_index(item_vectors(), catalogue(), RetrievalConfig(), tmp_path, seed=0)
    with pytest.raises(ValueError, match="400 items but the catalogue has 399"):
        load_index(tmp_path, ITEMS - 1, pi=0.1)


def test_an_item_without_a_direction_is_named(tmp_path: Path) -> None:
    vectors = item_vectors()
    vectors[42] = 0
    with pytest.raises(ValueError, match="item 42 is a zero vector"):
        build_index(vectors, catalogue(), RetrievalConfig(), tmp_path, seed=0)
