"""What a user can mend is one message; what fails changes nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ctd_scale.artifacts import Artifact, ArtifactError, Run
from ctd_scale.cli import main
from ctd_scale.cli_options import configured
from ctd_scale.config import load_config
from ctd_scale.recommender import require_made_with


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit, match="2"):
        main(arguments)
    return capsys.readouterr().err


def test_errors_of_the_system_are_messages(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "log.csv").write_text("user_id,item_id,timestamp\n1,1,1\n")
    (tmp_path / "items.csv").write_text("item_id,title\n1,A\n")
    log = ["--interactions", str(tmp_path / "log.csv"), "--items", str(tmp_path / "items.csv")]
    said = refused(capsys, "data", "--storage", str(tmp_path / "file"), *log)
    assert said.startswith("error: [Errno")
    assert "Traceback" not in said
    assert "65535" in refused(capsys, "serve", "--run", "x", "--port", "70000")
    said = refused(capsys, "data", "--storage", str(tmp_path), "--interactions", "nosuch://b/x.csv", "--items", log[3])
    assert said.startswith("error: ")
    assert "nosuch" in said


def test_a_path_may_hold_any_character(tmp_path: Path) -> None:
    path = f'{tmp_path}/spätze 😀 "quoted" 𠀋/l.parquet'
    assert configured(None, None, None, path, path, path).interactions.interactions == path


def test_a_log_that_is_not_there_leaves_the_config_of_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, config = Run(str(tmp_path), "mine"), load_config("quickstart")
    run.write_config(config)
    log = ["--interactions", f"{tmp_path}/nope.parquet", "--items", f"{tmp_path}/nope.parquet"]
    where = ["--storage", str(tmp_path), "--name", "mine"]
    for command in (["run", "-c", "debug"], ["data"], ["train", "interactions", "-c", "debug"]):
        said = refused(capsys, *command, *where, *log, "--set", "llm.max_history=2")
        assert "nope.parquet': no such file" in said
        assert run.read_config() == config


@pytest.mark.parametrize(
    ("override", "same"),
    [("llm.max_history=2", False), ("llm.dtype=float32", True), ("llm.generate_texts=true", True), ("seed=3", True)],
)
def test_a_model_is_not_read_with_other_settings_than_it_was_made_with(override: str, same: bool) -> None:
    made: dict[str, Any] = {"llm.max_history": 30, "llm.dtype": "bfloat16", "history.dropout": 0.1}
    artifact = Artifact("models/llm", Path("models/llm"), {"settings": made})
    config = load_config("quickstart", ["llm.max_history=30", override])
    if same:
        require_made_with(artifact, config, "llm")
    else:
        message = r"models/llm was made with llm\.max_history=30, .* says 2; .*--set llm\.max_history=30"
        with pytest.raises(ArtifactError, match=message):
            require_made_with(artifact, config, "llm")
    require_made_with(Artifact("models/llm", Path(), json.loads("{}")), config, "llm")
