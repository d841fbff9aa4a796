"""Which log a plan is made of."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from ctd_scale.artifacts import Run
from ctd_scale.config import RunConfig, load_config, section_values
from ctd_scale.interactions.sources import input_digests
from ctd_scale.plan import _has_log


def config_for(log: Path, *overrides: str) -> RunConfig:
    paths = [f'interactions.interactions="{log}"', f'interactions.items="{log.parent / "items.csv"}"']
    return load_config("debug", ["interactions.dataset=files", *paths, *overrides])


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
