"""The index artifact: what is written, and that what is read back answers."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ctd_scale.batches import Catalogue
from ctd_scale.config import RetrievalConfig
from ctd_scale.retrieval.build import build_index, load_index, load_part
from ctd_scale.retrieval.dense import ExactIndex
from ctd_scale.retrieval.faiss_index import FaissIndex
from ctd_scale.retrieval.remote import RemoteIndex
from ctd_scale.retrieval.scann_index import ScannIndex
from ctd_scale.retrieval.segments import Found, SegmentedIndex

ITEMS, DIM = 400, 8
NONE = np.empty(0, dtype=np.int32)


def catalogue(items: int = ITEMS) -> Catalogue:
    ids = [str(item) for item in range(items)]
    return Catalogue(ids, [f"Title{item}" for item in ids], ["even" if int(i) % 2 == 0 else "odd" for i in ids])


def item_vectors() -> np.ndarray:
    return np.random.default_rng(0).standard_normal((ITEMS, DIM)).astype(np.float32) * 3


@pytest.mark.parametrize(
    ("config", "engine"),
    [
        (RetrievalConfig(exact_limit=ITEMS), "exact"),
        (RetrievalConfig(exact_limit=ITEMS - 1), "scann"),
        (RetrievalConfig(engine="exact", exact_limit=1), "exact"),
        (RetrievalConfig(engine="scann"), "scann"),
        (RetrievalConfig(engine="faiss"), "faiss"),
    ],
)
def test_an_index_built_moved_and_loaded_answers(tmp_path: Path, config: RetrievalConfig, engine: str) -> None:
    if engine != "exact":
        pytest.importorskip(engine)
    facts = build_index(item_vectors(), catalogue(), config, tmp_path / "built", seed=0)
    assert {name: facts[name] for name in ("engine", "items", "dim")} == {
        "engine": engine,
        "items": ITEMS,
        "dim": DIM,
    }
    assert facts["recall"] >= config.target_recall
    assert facts["seconds"] >= 0
    for name in ("scann", "faiss"):
        assert (tmp_path / "built" / name).is_dir() == (engine == name)

    shutil.move(tmp_path / "built", tmp_path / "moved")
    hybrid = load_index(tmp_path / "moved", ITEMS, pi=0.5)
    assert isinstance(hybrid.dense, {"exact": ExactIndex, "scann": ScannIndex, "faiss": FaissIndex}[engine])
    assert np.allclose(np.linalg.norm(hybrid.vectors, axis=1), 1, atol=1e-6)
    matches = hybrid.matches(["", "The user might like odd products, such as Title9"], limit=3)
    ids, scores = hybrid.search(item_vectors()[[5, 9]], matches, [NONE, NONE], k=3)
    assert ids[:, 0].tolist() == [5, 9]
    assert np.allclose(scores[:, 0], [1, 1.5], atol=1e-6)


def test_without_scann_faiss_is_taken_and_without_either_one_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("faiss")
    for name in ("scann", "scann.scann_ops.py"):
        monkeypatch.setitem(sys.modules, name, None)
    config = RetrievalConfig(exact_limit=1)
    facts = build_index(item_vectors(), catalogue(), config, tmp_path / "faiss", seed=0)
    assert facts["engine"] == "faiss"
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(RuntimeError, match=r"neither ScaNN nor faiss .* 400 items are above retrieval\.exact_limit=1;"):
        build_index(item_vectors(), catalogue(), config, tmp_path / "none", seed=0)


@pytest.mark.parametrize(("engine", "other"), [("scann", "faiss"), ("faiss", "scann"), ("exact", "faiss")])
def test_loading_imports_no_other_engine(tmp_path: Path, engine: Any, other: str) -> None:
    if engine != "exact":
        pytest.importorskip(engine)
    build_index(item_vectors(), catalogue(), RetrievalConfig(engine=engine), tmp_path, seed=0)
    code = (
        "import sys; from pathlib import Path; from ctd_scale.retrieval.build import load_index; "
        f"load_index(Path(sys.argv[1]), {ITEMS}, 0.1); print(*sorted({{'scann', 'faiss'}} & set(sys.modules)))"
    )
    printed = subprocess.run([sys.executable, "-c", code, tmp_path], check=True, capture_output=True, text=True).stdout
    assert printed.split() == ([] if engine == "exact" else [engine])
    assert other not in printed


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

    # In two other processes it would be the same, one of which has two of its shards.
    parts = [load_part(tmp_path, "items", number, of=2) for number in range(2)]
    assert [list(part) for part in parts] == [[0, 2], [1]]

    def ask(shards: int, queries: np.ndarray, k: int, effort: float) -> list[Found]:
        return [parts[shard % 2][shard].search(queries, k) for shard in range(shards)]

    remote = load_index(tmp_path, ITEMS, pi=0.5, ask=ask)
    assert isinstance(remote.dense, RemoteIndex)
    for k in (1, 10, 150, ITEMS, ITEMS + 5):
        here, there = (each.dense.search(item_vectors(), k) for each in (hybrid, remote))
        assert all(np.array_equal(mine, its) for mine, its in zip(here, there, strict=True))

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
