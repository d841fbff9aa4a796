"""`ctd recommend-all`: every user gets what `recommend` answers, and a second start makes what is missing."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from tiny_run import ITEMS, LOST_USER, make_tiny_run

from ctd_scale import recommend_all as module
from ctd_scale.artifacts import Run
from ctd_scale.baseline_recommender import BaselineRecommender
from ctd_scale.changes import delete, roll_back
from ctd_scale.parts import part_name
from ctd_scale.recommend_all import MANIFEST, Order, recommend_all
from ctd_scale.recommender import Recommender

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return make_tiny_run(tmp_path_factory.mktemp("runs"))


def wanted(run: Run, k: int, *, explain: bool = False) -> list[tuple[str, list[str], list[float], str]]:
    """What `recommend` answers to each user of the log: id, items, scores, text."""
    recommender, rows = Recommender(run), []
    log, ids = recommender.log, recommender.catalogue.item_ids
    for user, user_id in enumerate(log.user_ids):
        if user_id == LOST_USER:
            rows.append((user_id, list[str](), list[float](), ""))
            continue
        (answer,) = recommender.recommend([log.full_history(user)], k, explain=explain)
        rows.append((user_id, [ids[item] for item in answer.items], answer.scores, answer.text))
    return rows


def require_same(rows: list[dict[str, Any]], expected: list[tuple[str, list[str], list[float], str]]) -> None:
    for row, (user_id, items, scores, text) in zip(rows, expected, strict=True):
        assert (row["user_id"], row["item_ids"], row["text"]) == (user_id, items, text)
        assert np.allclose(row["scores"], scores, atol=1e-5)


def test_every_user_gets_what_recommend_answers(run: Run, ray_session: None, tmp_path: Path) -> None:
    users = recommend_all(run, str(tmp_path), Order(k=5, explain=True))
    rows = pq.read_table(tmp_path / part_name(0)).to_pylist()
    require_same(rows, wanted(run, 5, explain=True))
    assert len(rows) == users == json.loads((tmp_path / MANIFEST).read_text())["users"]
    assert sorted(path.name for path in tmp_path.iterdir()) == [MANIFEST, "order.json", part_name(0)]


def test_a_baseline_does_it_too(run: Run, ray_session: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # actors are somewhere else
    named = Run(os.path.relpath(run.root.parent), run.name)
    recommend_all(named, ".", Order(k=5, model="item_knn"))
    rows = pq.read_table(tmp_path / part_name(0)).to_pylist()
    baseline = BaselineRecommender(run, "item_knn")
    assert json.loads((tmp_path / MANIFEST).read_text())["version"] == baseline.version
    log, ids = baseline.log, baseline.catalogue.item_ids
    for user in (0, 7, 30):
        (answer,) = baseline.recommend([log.full_history(user)], 5, users=[user])
        assert rows[user]["item_ids"] == [ids[item] for item in answer.items]
        assert not set(rows[user]["item_ids"]) & {ids[item] for item in log.full_history(user)}
    with pytest.raises(ValueError, match="--explain needs the chain; item_knn says nothing"):
        recommend_all(run, str(tmp_path), Order(model="item_knn", explain=True))
    with pytest.raises(ValueError, match="no baseline 'item_kn'; baselines: popularity"):
        recommend_all(run, str(tmp_path), Order(model="item_kn"))


def test_a_second_start_makes_what_is_missing(
    run: Run, tmp_path: Path, ray_session: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, order = tmp_path / "parts", Order(k=3)
    monkeypatch.setattr(module, "PART_USERS", 25)
    users = recommend_all(run, str(out), order)
    parts = json.loads((out / MANIFEST).read_text())["parts"]
    assert parts == [part_name(part) for part in range(-(-users // 25))]
    rows = [row for part in parts for row in pq.read_table(out / part).to_pylist()]
    require_same(rows, wanted(run, 3))

    # As a kill leaves it: no manifest, one part missing, one half-written beside its name.
    (out / MANIFEST).unlink()
    (out / parts[1]).rename(out / f".{parts[1]}")
    kept = {part: (out / part).stat().st_mtime_ns for part in parts if part != parts[1]}
    assert recommend_all(run, str(out), order) == users
    assert {part: (out / part).stat().st_mtime_ns for part in kept} == kept
    assert [row for part in parts for row in pq.read_table(out / part).to_pylist()] == rows
    assert sorted(path.name for path in out.iterdir()) == sorted([MANIFEST, "order.json", *parts])


@pytest.mark.parametrize("model", ["", "item_knn"])
def test_what_is_changed_meanwhile_is_left_out(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: str
) -> None:
    shutil.copytree(run.root, tmp_path / "tiny")
    own, out, found = Run(str(tmp_path), "tiny"), tmp_path / "out", []

    def recommender() -> BaselineRecommender | Recommender:
        return BaselineRecommender(own, model) if model else Recommender(own)

    before = recommender()

    def changed_first(maker: Any, arguments: dict[str, Any], *_: Any, **options: Any) -> None:
        delete(own, ["i0", "i1"])
        found.extend(maker(**arguments).table(0).to_pylist())

    monkeypatch.setattr(module, "write_parts", changed_first)
    recommend_all(own, str(out), Order(k=ITEMS, exclude_seen=False, model=model))
    assert json.loads((out / MANIFEST).read_text())["version"] == before.version != recommender().version
    assert {"i0", "i1"} <= set(found[0]["item_ids"])
    with pytest.raises(ValueError, match=f"is version {before.version} by now, and not other"):
        module.RecommendPart(own.storage, own.name, {"model": model}, 10, "other", 0)


def test_a_baseline_does_not_recommend_what_was_taken_out(run: Run, tmp_path: Path) -> None:
    shutil.copytree(run.root, tmp_path / "tiny")
    own, history = Run(str(tmp_path), "tiny"), [np.array([3, 5], np.int32)]
    before = BaselineRecommender(own, "popularity")
    (whole,) = before.recommend(history, ITEMS)
    gone = whole.items[:2]
    delete(own, [before.catalogue.item_ids[item] for item in gone])
    after = BaselineRecommender(own, "popularity")
    (rest,) = after.recommend(history, ITEMS)
    assert rest.items == whole.items[2:]
    assert before.version != after.version
    assert BaselineRecommender(own, "popularity", changes=0).version == before.version
    roll_back(own)
    assert BaselineRecommender(own, "popularity").recommend(history, ITEMS) == [whole]


def test_another_order_or_version_is_refused(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "write_parts", lambda *_, **__: None)
    recommend_all(run, str(tmp_path), Order(k=3))
    with pytest.raises(ValueError, match=r"holds other recommendations \(k=3, now 4\); choose another --out"):
        recommend_all(run, str(tmp_path), Order(k=4))
    shutil.rmtree(tmp_path)
    with pytest.raises(ValueError, match="--k 0: expected at least 1"):
        recommend_all(run, str(tmp_path), Order(k=0))
