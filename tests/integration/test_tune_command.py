"""`ctd tune` on a planted truth: finds the settings that learn it, ends the others early, goes on where it was."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ctd_scale.artifacts import Run
from ctd_scale.cli import main
from ctd_scale.config import load_config

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("ray_session")]

ENDED_AFTER = 2  # of the good rate's four validations
LEAST = 2  # validations before a trial may be ended
# Of these two rates the seed draws the good one first, beside which the other has to end early.
RANGE = "baselines.sasrec.learning_rate=1e-6,0.01"
CONFIG = """
seed = 2
[interactions]
dataset = "files"
min_user_interactions = 5
min_item_interactions = 1
[baselines.sasrec]
embed_dim = 16
num_blocks = 1
dropout = 0.1
max_history = 8
epochs = 20
validate_every = 5
batch_size = 32
[resources.baselines]
threads_per_worker = 1
max_failures = 0
"""


def circles(folder: Path) -> Path:
    """Users go round one of two circles of ten items: what comes next is certain."""
    users = np.repeat(np.arange(60), 8)
    places = np.tile(np.arange(8), 60)
    items = 2 * ((users // 2 + places) % 10) + users % 2
    table = {"user_id": [f"u{user}" for user in users], "item_id": [f"i{item}" for item in items], "position": places}
    pq.write_table(pa.table(table), folder / "interactions.parquet")
    names = {"item_id": [f"i{item}" for item in range(20)], "title": [f"item {item}" for item in range(20)]}
    pq.write_table(pa.table(names), folder / "items.parquet")
    file = folder / "circles.toml"
    file.write_text(CONFIG)
    return file


def end_after(said: str, asked: list[str]) -> None:
    """Start this as somebody would, and end it once it has said so."""
    script = "from ctd_scale.cli import main; main()"
    lines = []
    with subprocess.Popen(
        [sys.executable, "-c", script, *asked], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            lines.append(line)
            if said in line:
                process.terminate()
    assert any(said in line for line in lines), "".join(lines)
    assert process.returncode == 130, "".join(lines)
    assert lines[-1].startswith("interrupted; "), "".join(lines)


def test_the_settings_that_learn_are_found_and_can_be_used(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    in_this_process: Callable[[Path], AbstractContextManager[Any]],
) -> None:
    monkeypatch.chdir(circles(tmp_path).parent)
    options = ["--config", "circles.toml", "--storage", "runs"]
    options += ["--interactions", "interactions.parquet", "--items", "items.parquet"]
    asked = ["tune", "sasrec", *options, "--range", RANGE, "--trials", "2", "--least-epochs", str(LEAST)]
    end_after(f"trial 1: NDCG@10 1.0000 after validation {ENDED_AFTER}", asked)
    (said,) = (tmp_path / "runs" / "circles" / "tune").glob("train_sasrec-*/runs/*/validated.json")
    before = json.loads(said.read_text())
    assert ENDED_AFTER <= len(before) <= 4
    # As where the kill comes between a checkpoint and the record of what it had validated.
    said.write_text(json.dumps(dict(list(before.items())[:1])))

    with pytest.raises(SystemExit) as ended:
        main(asked)
    first = capsys.readouterr()
    assert ended.value.code == 0, first.err
    folder = tmp_path / "runs" / "circles" / "tune" / "sasrec"
    written = json.loads((folder / "trials.json").read_text())
    asked_so = f"ctd tune sasrec --config circles.toml --range {RANGE} --set 'interactions.interactions="
    assert written["command"].startswith(asked_so)
    trials = written["trials"]
    assert len(trials) == 2
    assert not any(trial["error"] for trial in trials)
    best, other = trials
    assert best["settings"] == {"baselines.sasrec.learning_rate": "0.01"}
    assert best["ndcg"] > 0.9
    assert best["ndcg"] == max(best["validated"])
    assert len(best["validated"]) == 4
    assert not best["stopped_early"]
    assert other["ndcg"] < 0.5
    assert other["stopped_early"]
    assert len(other["validated"]) == LEAST
    assert best["validated"][: len(before)] == pytest.approx(list(before.values()), abs=1e-6)
    assert first.out.count("after validation") == 4 + LEAST, "each validation is said once"
    assert not list(folder.parent.glob("*/runs")), "models of trials are not kept"

    # The same settings, trained by themselves, reach what the trial said.
    chosen = folder / "best.toml"
    assert load_config(chosen).baselines.sasrec.learning_rate == 0.01
    with in_this_process(tmp_path / "worker"), pytest.raises(SystemExit):
        main(["train", "sasrec", "--config", str(chosen), "--storage", str(tmp_path / "runs"), "--name", "circles"])
    made = Run.open(tmp_path / "runs" / "circles").fetch("baselines/sasrec")
    assert made.manifest["facts"]["validation_ndcg@10"] == best["ndcg"]
    capsys.readouterr()

    # Asked again, nothing is trained again.
    with pytest.raises(SystemExit):
        main(asked)
    assert "after validation" not in capsys.readouterr().out
    again = json.loads((folder / "trials.json").read_text())["trials"]
    assert [(trial["settings"], trial["ndcg"]) for trial in again] == [
        (trial["settings"], trial["ndcg"]) for trial in trials
    ]
