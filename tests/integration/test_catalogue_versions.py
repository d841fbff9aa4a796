"""Versions of a catalogue: one after the other, gone back to, built anew beside further changes, pruned, damaged."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
from changed_run import ids_of, items, make_run
from tiny_run import ITEMS

from ctd_scale import live
from ctd_scale.artifacts import ArtifactError, Run
from ctd_scale.changes import (
    CURRENT,
    alone,
    delete,
    in_force,
    prune,
    read_changes,
    roll_back,
    upsert,
    versions,
)
from ctd_scale.live import rebuild_index
from ctd_scale.recommender import Recommender, load_artifacts

pytestmark = pytest.mark.slow


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return make_run(tmp_path)


def test_rolled_back_is_as_before_and_versions_stay(run: Run) -> None:
    wanted = {0: Recommender(run)}
    upsert(run, items(("a", "Red Empire", "drama")))
    wanted[1] = Recommender(run)
    delete(run, ["i1"])
    wanted[2] = Recommender(run)
    assert len({each.version for each in wanted.values()}) == 3
    for version in (1, 0):
        assert roll_back(run).number == version
        assert Recommender(run).version == wanted[version].version
        assert ids_of(Recommender(run)) == ids_of(wanted[version])
    with pytest.raises(ArtifactError, match="no version before"):
        roll_back(run)
    roll_back(run, 2)
    assert ids_of(Recommender(run)) == ids_of(wanted[2])
    with pytest.raises(ArtifactError, match="changes/000009 does not exist"):
        roll_back(run, 9)
    roll_back(run, 1)
    assert upsert(run, items(("b", "Blue Garden", "crime"))).number == 3
    assert sorted(set(ids_of(Recommender(run))) - set(ids_of(wanted[0]))) == ["a", "b"]
    assert [(each["version"], each["based_on"]) for each in versions(run)] == [(1, 0), (2, 1), (3, 1)]


@pytest.mark.parametrize("exact_limit", [50_000, 16])
def test_built_anew_it_answers_as_before_and_can_be_changed_further(run: Run, exact_limit: int) -> None:
    if exact_limit < ITEMS:
        pytest.importorskip("scann")
    config = run.read_config([f"retrieval.exact_limit={exact_limit}"])
    upsert(run, items(("a", "Red Empire", "drama"), ("i3", "Renamed Night", "western"), ("b", "Blue Garden", "crime")))
    delete(run, ["i1", "b"])
    before = Recommender(run)
    assert rebuild_index(run, load_artifacts(run), config).built == 3
    after = Recommender(run)
    assert after.version != before.version
    assert sorted(ids_of(after)) == sorted(ids_of(before))
    assert [each for each in ids_of(after) if each != "a"] == [each for each in ids_of(before) if each != "a"]
    assert after.catalogue.titles[3] == "Renamed Night"
    assert after.rank.retrieve.find("renamed", 5).tolist() == [3]
    upsert(run, items(("c", "Silver Machine", "drama")))
    delete(run, ["a"])
    further = Recommender(run)
    assert sorted(ids_of(further)) == sorted([*set(ids_of(before)) - {"a"}, "c"])
    roll_back(run, 2)
    assert ids_of(Recommender(run)) == ids_of(before)


def test_what_is_changed_while_the_index_is_built_lies_on_top_of_it(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    upsert(run, items(("a", "Red Empire", "drama")))
    build = live.build_index

    def slowly(*arguments: Any) -> Any:
        done = build(*arguments)
        delete(run, ["i2", "a"])
        upsert(run, items(("b", "Blue Garden", "crime")))
        return done

    monkeypatch.setattr(live, "build_index", slowly)
    changes = rebuild_index(run, load_artifacts(run), run.read_config())
    assert (changes.number, changes.built) == (4, 4)
    assert [(each["version"], each["based_on"]) for each in versions(run)][-1] == (4, 3)
    now = ids_of(Recommender(run))
    assert "b" in now
    assert not {"i2", "a"} & set(now)
    assert not list((run.root / ".staging").iterdir())

    def rolled_back(*arguments: Any) -> Any:
        done = build(*arguments)
        roll_back(run, 0)
        return done

    monkeypatch.setattr(live, "build_index", rolled_back)
    with pytest.raises(ArtifactError, match="rolled back while its index was built anew"):
        rebuild_index(run, load_artifacts(run), run.read_config())
    assert in_force(run) == (0, 4)


def test_old_versions_go_and_what_is_in_force_stays_whole(run: Run) -> None:
    upsert(run, items(("a", "Red Empire", "drama")))
    rebuild_index(run, load_artifacts(run), run.read_config())
    for item in "bcde":
        upsert(run, items((item, "Blue Garden", "crime")))
    wanted = ids_of(Recommender(run))
    begun = run.root / ".staging" / "changes-000007-0123abcd"  # of one that was killed
    begun.mkdir(parents=True)
    assert prune(run, 2) == [1, 3, 4]
    assert [each["version"] for each in versions(run)] == [2, 5, 6]
    assert ids_of(Recommender(run)) == wanted
    with pytest.raises(ArtifactError, match="changes/000004 does not exist"):
        roll_back(run, 4)
    roll_back(run, 5)
    assert prune(run, 0) == [6]
    assert upsert(run, items(("f", "Blue Garden", "crime"))).number == 7
    assert not begun.exists()
    assert {"a", "b", "c", "d", "f"} <= set(ids_of(Recommender(run)))
    assert "e" not in ids_of(Recommender(run))


def test_a_change_that_has_to_wait_says_so(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    with alone(run):
        waiting = threading.Thread(target=delete, args=(run, ["i1"]))
        waiting.start()
        waiting.join(0.5)
        assert waiting.is_alive()
    waiting.join()
    assert "waiting for another process" in capsys.readouterr().out
    assert in_force(run) == (1, 1)


def test_changes_made_at_once_are_all_kept(run: Run) -> None:
    threads = [
        threading.Thread(target=upsert, args=(run, items((f"n{number}", "Red River", "drama")))) for number in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    changes = read_changes(run)
    assert changes.number == 8
    assert sorted(changes.table["item_id"].to_pylist()) == [f"n{number}" for number in range(8)]


def test_a_damaged_version_and_a_damaged_pointer_are_named(run: Run) -> None:
    upsert(run, items(("a", "Red Empire", "drama")))
    file = run.root / "changes/000001/items.parquet"
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    with pytest.raises(ArtifactError, match=r"items\.parquet was changed after it was published"):
        Recommender(run)
    (run.root / CURRENT).write_text("3")
    with pytest.raises(ArtifactError, match=r"changes/current\.json holds '3'"):
        Recommender(run)


def test_what_was_published_stays_where_the_pointer_is_lost(run: Run) -> None:
    for item in ("a", "b"):
        upsert(run, items((item, "Red Empire", "drama")))
    kept = (run.root / "changes/000001/manifest.json").read_text()
    (run.root / CURRENT).unlink()
    assert upsert(run, items(("c", "Red Empire", "drama"))).number == 3
    assert (run.root / "changes/000001/manifest.json").read_text() == kept
    assert set(ids_of(Recommender(run))) & {"a", "b", "c"} == {"c"}
    assert "b" in roll_back(run, 2).table["item_id"].to_pylist()
