"""`ctd bench quality` on real data: trains, ranks, compares, and does nothing twice."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ctd_scale.cli import main
from ctd_scale.quality import METRICS

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("ray_session")]

CONFIG = """
[interactions]
dataset = "ml-100k"
min_user_interactions = 400
[baselines.bpr_mf]
epochs = 4
[baselines.bsarec]
embed_dim = 16
num_blocks = 1
epochs = 1
max_history = 10
"""
MODELS = ["popularity", "item_knn", "bpr_mf", "bsarec"]


def test_models_are_trained_ranked_and_compared_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config, out = tmp_path / "few.toml", tmp_path / "quality.md"
    config.write_text(CONFIG)
    options = ["--storage", str(tmp_path / "runs"), "--seeds", "1", "--out", str(out), "--data", str(config)]
    # Typer ends with an exit, as a command does.
    with pytest.raises(SystemExit):
        main(["bench", "quality", *options, "--models", ",".join(MODELS), "--reference", "item_knn"])
    first = capsys.readouterr().out
    assert "unchanged" not in first
    rows = json.loads(out.with_suffix(".json").read_text())
    assert {(row["model"], row["split"]) for row in rows} == {
        (name, split) for name in MODELS for split in ("validation", "test")
    }
    for row in rows:
        assert set(METRICS) <= row["mean"].keys()
        low, high = row["interval"]
        assert low <= row["difference"] <= high
        assert (row["training_seconds"] is not None) == (row["model"] in ("bpr_mf", "bsarec"))
        if row["model"] == "item_knn":
            assert (low, row["difference"], high) == (0, 0, 0)
    with pytest.raises(SystemExit):
        main(["bench", "quality", *options, "--models", ",".join(MODELS), "--reference", "item_knn"])
    again = capsys.readouterr().out
    assert "▶" not in again
    # What was compared can be asked, as the chain can.
    run = str(tmp_path / "runs" / "few-0")
    for name in MODELS:
        with pytest.raises(SystemExit):
            main(["recommend", "--run", run, "--model", name, "--user", "405", "--k", "5", "--json"])
        answer = json.loads(capsys.readouterr().out.splitlines()[-1])
        assert answer["version"].startswith(f"{name}-")
        assert len({item["item_id"] for item in answer["items"]}) == 5
    with pytest.raises(SystemExit):
        main(["recommend", "--run", run, "--model", "bpr_mf", "--history", "50,172"])
    assert "give a user" in capsys.readouterr().err
    figures = [{key: row[key] for key in ("model", "split", "mean", "interval")} for row in rows]
    for row, old in zip(json.loads(out.with_suffix(".json").read_text()), figures, strict=True):
        assert {key: row[key] for key in old} == old
