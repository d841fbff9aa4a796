"""Which log a plan is made of, and what ranking it will need."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from ctd_scale import plan
from ctd_scale.artifacts import Run
from ctd_scale.batches import Catalogue, InteractionLog
from ctd_scale.config import RunConfig, load_config, section_values
from ctd_scale.interactions.schema import BadInputError
from ctd_scale.interactions.sketch import sketch_log
from ctd_scale.interactions.sources import input_digests
from ctd_scale.plan import _has_log, _plan_ranking
from ctd_scale.ranking import BLOCK_SCORES


def config_for(log: Path, *overrides: str) -> RunConfig:
    paths = [f'interactions.interactions="{log}"', f'interactions.items="{log.parent / "items.csv"}"']
    core = "interactions.min_user_interactions=1"
    return load_config("debug", ["interactions.dataset=files", core, *paths, *overrides])


def write_log(folder: Path, users: int, length: int) -> Path:
    """Every user has the first so many items."""
    rows = [f"{user},{item},{item}" for user in range(users) for item in range(length)]
    (folder / "items.csv").write_text("item_id,title\n" + "".join(f"{item},A\n" for item in range(length)))
    (folder / "log.csv").write_text("\n".join(["user_id,item_id,timestamp", *rows]))
    return folder / "log.csv"


def test_the_log_of_a_run_is_planned_where_it_is_the_one_that_is_meant(tmp_path: Path) -> None:
    run, log = Run(str(tmp_path), "run"), tmp_path / "log.csv"
    log.write_text("user_id,item_id,timestamp\n1,1,1\n")
    (tmp_path / "items.csv").write_text("item_id,title\n1,A\n")
    config = config_for(log)
    assert not _has_log(run, config)
    made = replace(run, settings=section_values(config, ["interactions"]))
    with made.publish("interactions", config_hash="", inputs=input_digests(config.interactions)):
        pass
    assert _has_log(run, config)
    assert not _has_log(run, config_for(log, "interactions.min_user_interactions=2"))
    (tmp_path / "other.csv").write_text(log.read_text())
    assert not _has_log(run, config_for(tmp_path / "other.csv"))
    log.write_text("user_id,item_id,timestamp\n1,1,2\n")
    assert not _has_log(run, config), "it was changed since"
    with run.publish("interactions", config_hash="", inputs={}):
        pass
    assert _has_log(run, config), "it was not made by the stage"


def test_of_some_users_alone_items_are_withheld_in_a_plan(tmp_path: Path) -> None:
    log = write_log(tmp_path, users=20, length=5)
    assert len(sketch_log(config_for(log).interactions).split_users()) == 20
    some = sketch_log(config_for(log, "interactions.withheld_users=7").interactions)
    assert len(some.split_users()) == 7
    assert some.train_lengths().sum() == 13 * 5 + 7 * 3


def test_a_log_of_which_nothing_can_be_withheld_is_refused_by_a_plan(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan, "seconds_per_user", lambda *_: 1.0)
    config = config_for(write_log(tmp_path, users=3, length=2))
    with pytest.raises(BadInputError, match=r"none of 3 users has 3 interactions \(the most is 2\)"):
        sketch_log(config.interactions)
    timed = config_for(tmp_path / "log.csv", "interactions.split=global_time")
    planned = _plan_ranking(sketch_log(timed.interactions), timed, 16)
    assert all(each.memory >= 0 and np.isfinite(each.seconds) for each in planned), "who has a target is not known yet"


def test_ranking_holds_a_bounded_number_of_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "seconds_per_call", lambda *_, **__: 1.0)
    monkeypatch.setattr(plan, "seconds_per_user", lambda *_: 1.0)
    monkeypatch.setattr(plan, "seconds_to_count", lambda *_: 1.0)
    config, users = load_config("debug", ["evaluation.calibration_users=100"]), 300

    def memory(items: int) -> tuple[float, float]:
        names = [""] * items
        sequences = np.tile(np.arange(3, dtype=np.int32), users)
        log = InteractionLog(np.arange(users + 1) * 3, sequences, [""] * users, Catalogue(names, names, names))
        calibrating, evaluating = _plan_ranking(log, config, 16)
        return calibrating.memory, evaluating.memory

    few, many = memory(1000), memory(1_000_000)
    assert few[0] == many[0] == 4 * 100 * 16 * (8 + 4 * 40), "the candidates of all who choose the weights"
    assert many[1] - few[1] == pytest.approx(3 * 4 * (BLOCK_SCORES - 256 * 1000))
    assert memory(2_000_000) == many
