"""Items that are put in, altered and taken out after a run was made, in one process. (Served: test_serving_life.)"""

from __future__ import annotations

import gc
import json
import shutil
import weakref
from pathlib import Path

import numpy as np
import pytest
from changed_run import EVERYTHING, ids_of, items, make_run
from tiny_run import CATEGORIES, COND_DIM, ITEMS, make_tiny_run

from ctd_scale.artifacts import Run
from ctd_scale.batches import Ranking, save_rankings
from ctd_scale.changes import (
    CURRENT,
    delete,
    in_force,
    read_items,
    upsert,
)
from ctd_scale.cli import main
from ctd_scale.interactions.schema import BadInputError
from ctd_scale.live import rebuild_index
from ctd_scale.recommender import Recommender, load_artifacts
from ctd_scale.serving.release import open_release, source_of
from ctd_scale.serving.schema import Directory, Range

pytestmark = pytest.mark.slow


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return make_run(tmp_path)


def ctd(*arguments: str) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["index", *arguments])


def test_what_is_put_in_comes_back_and_moves_nothing_else(run: Run) -> None:
    before = Recommender(run)
    assert upsert(run, items(("new", "Golden River", CATEGORIES[0]), ("odd", "", ""))).number == 1
    after = Recommender(run)
    assert before.version != after.version
    assert sorted(ids_of(after)) == sorted([*before.catalogue.item_ids, "new", "odd"])
    assert [each for each in ids_of(after) if each not in ("new", "odd")] == ids_of(before)
    place = after.catalogue.item_ids.index("new")
    assert after.catalogue.titles[place] == "Golden River"
    assert place in after.rank.retrieve.find("Golden River", 50)
    vectors = after.rank.retrieve.retriever.vectors
    assert vectors.shape == (ITEMS + 2, before.preference.cond_dim)
    assert np.allclose(np.linalg.norm(vectors[ITEMS:], axis=1), 1, atol=1e-5)
    assert place not in after.rank.retrieve.similar(place, 3)[0]


def test_a_new_item_in_a_history_is_read_as_the_nearest_trained_one(run: Run) -> None:
    upsert(run, items(("new", "Golden River", CATEGORIES[0])))
    recommender = Recommender(run)
    vectors = recommender.rank.retrieve.retriever.vectors
    trained = np.flatnonzero(np.bincount(recommender.log.train_edges()[1], minlength=ITEMS))
    like = trained[int((vectors[trained] @ vectors[np.array([ITEMS])][0]).argmax())]
    read, written = (
        recommender.recommend([np.array([3, item], np.int32)], 10, exclude_seen=False)[0] for item in (ITEMS, like)
    )
    assert (read.items, read.scores) == (written.items, written.scores)
    assert ITEMS not in recommender.recommend([np.array([3, ITEMS], np.int32)], EVERYTHING)[0].items


def test_what_is_taken_out_never_comes_back_and_may_be_put_in_again(run: Run) -> None:
    whole = Recommender(run)
    first = ids_of(whole, k=3)
    delete(run, first)
    fewer = Recommender(run)
    assert ids_of(fewer) == ids_of(whole)[3:]
    assert not set(fewer.rank.retrieve.find(whole.catalogue.titles[whole.catalogue.item_ids.index(first[0])], 50)) & {
        whole.catalogue.item_ids.index(item) for item in first
    }
    with pytest.raises(BadInputError, match=f"1 item is not in the catalogue, so none was taken out: '{first[0]}'"):
        delete(run, ["i5", first[0]])
    assert in_force(run) == (1, 1)
    upsert(run, items((first[0], "Quite Another", "drama")))
    again = Recommender(run)
    assert ids_of(again) == [first[0], *ids_of(whole)[3:]]
    assert again.catalogue.titles[whole.catalogue.item_ids.index(first[0])] == "Quite Another"
    assert again.rank.retrieve.find("quite another", 5).tolist() == [whole.catalogue.item_ids.index(first[0])]


def test_an_item_put_in_and_taken_out_leaves_nothing(run: Run) -> None:
    before = Recommender(run)
    upsert(run, items(("new", "Golden River", CATEGORIES[0])))
    delete(run, ["new"])
    after = Recommender(run)
    assert ids_of(after) == ids_of(before)
    directory = Directory(after.log)
    history = directory.history(history=["new", "i5"])  # clients may name it for long
    assert len(after.recommend([history], 5)[0].items) == 5
    assert directory.item("new") in directory.excluded(items=["new"])
    upsert(run, items(("new", "Golden River", CATEGORIES[0])))
    assert "new" in ids_of(Recommender(run))


def test_titles_are_found_however_many_better_ones_were_taken_out(run: Run) -> None:
    upsert(run, items(*((f"star{number}", "Star Star", "") for number in range(6)), ("last", "Star Gazers Night", "")))
    whole = Recommender(run)
    best = [whole.catalogue.item_ids[place] for place in whole.rank.retrieve.find("star", 7)]
    assert best[-1] == "last"
    delete(run, best[:6])
    left = Recommender(run)
    assert [left.catalogue.item_ids[place] for place in left.rank.retrieve.find("star", 2)] == ["last"]


def test_numbers_of_items_change_with_them(run: Run, tmp_path: Path) -> None:
    assert Recommender(run).catalogue.attributes.keys() == {"price"}, "the tiny run has prices"
    (tmp_path / "new.csv").write_text("item_id,title,price\na,Alpha,7.5\ni3,Renamed,2\nb,Beta,\n")
    run.write_config(run.read_config(['interactions.attribute_columns=["price"]']))
    upsert(run, read_items(str(tmp_path / "new.csv"), run.read_config().interactions))
    upsert(run, items(("c", "Gamma", "")))
    after = Recommender(run).catalogue
    price = dict(zip(after.item_ids, after.attributes["price"], strict=True))
    assert (price["a"], price["i3"]) == (7.5, 2)
    assert np.isnan([price["b"], price["c"]]).all()
    delete(run, ["a"])
    directory = Directory(Recommender(run).log)
    assert directory.item("i3") not in directory.excluded(ranges={"price": Range(min=1, max=2.5)})


def test_a_release_keeps_what_is_the_same_and_takes_up_other_settings(run: Run) -> None:
    config = run.read_config()
    first = open_release(source_of(run, config))
    upsert(run, items(("a", "Red Empire", "drama")))
    changed = open_release(source_of(run, config), first)
    assert changed.base is first.base
    assert changed.version != first.version
    assert len(changed.catalogue) == ITEMS + 1
    fewer = run.read_config(["diffusion.error_candidates=1", "diffusion.num_draws=1"])
    other = open_release(source_of(run, fewer), changed)
    preference, nothing = np.ones((1, COND_DIM), np.float32), np.zeros(0, np.int32)
    pools = [
        release.rank.retrieve.pool(preference, [""], [nothing], draws=None, histories=None)
        for release in (changed, other)
    ]
    assert [pool.ids.shape[1] for pool in pools] == [ITEMS + 1, 1]
    assert other.base is first.base, "the index does not depend on them"
    assert other.known is first.known


def test_a_run_of_the_same_index_is_searched_by_it_and_one_of_another_is_not(run: Run, tmp_path: Path) -> None:
    config = run.read_config()
    first = open_release(source_of(run, config))
    copied = Run(str(tmp_path), "copied")
    shutil.copytree(run.root, copied.root)
    inputs = copied.fetch("ranking").manifest["inputs"]
    with copied.publish("ranking", config_hash="tiny", inputs=inputs) as target:
        save_rankings({name: Ranking(1.0, draws=0.0, error=0.0) for name in ("full", "full_text")}, target)
    upsert(copied, items(("a", "Red Empire", "drama")))
    second = open_release(source_of(copied, config), first)
    assert second.base is first.base
    assert (len(first.catalogue), len(second.catalogue)) == (ITEMS, ITEMS + 1)
    preference, nothing, text = np.ones((1, COND_DIM), np.float32), np.zeros(0, np.int32), [""]
    (answer,) = second.rank(preference, [np.zeros(1, np.int32)], text, [nothing], 10)
    chain = Recommender(copied)
    (wanted,) = chain.rank(preference, [np.zeros(1, np.int32)], text, [nothing], 10)
    assert (answer.items, answer.scores) == (wanted.items, wanted.scores)
    # An index that was built anew is that of one run.
    for each in (run, copied):
        rebuild_index(each, load_artifacts(each), config)
    while (built := source_of(run, config)).built < source_of(copied, config).built:
        rebuild_index(run, load_artifacts(run), config)
    third = open_release(built, second)
    fourth = open_release(source_of(copied, config), third)
    assert third.source.built == fourth.source.built
    assert third.base is not fourth.base
    assert (len(third.base.catalogue), len(fourth.base.catalogue)) == (ITEMS, ITEMS + 1)
    other = make_tiny_run(tmp_path / "other", seed=1)
    assert open_release(source_of(other, config), fourth).base is not fourth.base


def test_changes_hold_over_models_that_are_trained_anew(run: Run, tmp_path: Path) -> None:
    upsert(run, items(("a", "Red Empire", "drama")))
    delete(run, ["i1"])
    rebuild_index(run, load_artifacts(run), run.read_config())
    other = make_run(tmp_path, seed=1)
    assert other.root == run.root
    found = Recommender(other)
    assert sorted(ids_of(found)) == sorted(set(found.catalogue.item_ids) - {"i1"})
    assert "a" in found.catalogue.item_ids


@pytest.mark.parametrize("missing", ["title", "category", "price"])
def test_what_a_file_does_not_say_is_not_lost(
    run: Run, tmp_path: Path, missing: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run.write_config(run.read_config(['interactions.attribute_columns=["price"]']))
    values = {"item_id": "i3", "title": "Renamed", "category": "drama", "price": "2"}
    kept = {name: value for name, value in values.items() if name != missing}
    (tmp_path / "new.csv").write_text(",".join(kept) + "\n" + ",".join(kept.values()) + "\n")
    with pytest.raises(SystemExit, match="2"):
        main(["index", "upsert", "--run", str(run.root), "--items", str(tmp_path / "new.csv")])
    assert f"new.csv has no column '{missing}'" in capsys.readouterr().err
    assert in_force(run) == (0, 0)


def test_a_bad_row_stops_the_whole_change(run: Run, tmp_path: Path) -> None:
    (tmp_path / "new.csv").write_text("item_id,title\na,Alpha\n,Beta\na,Gamma\n")
    with pytest.raises(BadInputError, match=r"2 of 3 rows are bad\n.*new.csv:2 missing item_id\n.*:3 duplicate"):
        read_items(str(tmp_path / "new.csv"), run.read_config().interactions)


def test_by_command(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "new.csv").write_text("item_id,title,category\na,Red Empire,drama\nb,Blue Garden,crime\n")
    where = ["--run", str(run.root)]
    ctd("upsert", *where, "--items", str(tmp_path / "new.csv"))
    ctd("delete", *where, "--item", "i1", "--item", "b")
    ctd("rebuild", *where)
    ctd("rollback", *where)
    ctd("versions", *where)
    ctd("prune", *where, "--keep", "2")
    out = capsys.readouterr().out
    assert "version 1: put in or altered 2 items; 2 put in or altered, 0 taken out since the run was made" in out
    assert "version 2: took out 2 items; 1 put in or altered, 2 taken out since the run was made" in out
    assert "*    2  from    1  took out 2 items" in out
    assert "     3  from    2  built the index anew" in out
    assert "removed 1 versions: 1" in out
    assert json.loads((run.root / CURRENT).read_text()) == {"version": 2, "latest": 3}
    with pytest.raises(SystemExit, match="2"):
        main(["index", "delete", *where])
    assert "nothing to take out" in capsys.readouterr().err


def test_the_garbage_collector_leaves_what_is_served_alone_and_it_is_freed_when_replaced(run: Run) -> None:
    config = run.read_config()
    first = open_release(source_of(run, config))
    try:
        assert not any(each is first.catalogue.titles for each in gc.get_objects())
        let_go = weakref.ref(first)
        upsert(run, items(("a", "Red Empire", "drama")))
        second = open_release(source_of(run, config), first)
        assert not any(each is second.catalogue.titles for each in gc.get_objects())
        del first
        assert let_go() is None
    finally:
        gc.unfreeze()
