"""What a user can mend is one message; what fails changes nothing."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ctd_scale.artifacts import Artifact, ArtifactError, Run
from ctd_scale.cli import main
from ctd_scale.cli_options import configured
from ctd_scale.config import load_config, section_values
from ctd_scale.pipeline import STAGES, sections_of
from ctd_scale.recommender import require_made_with, require_measured_as_made
from ctd_scale.serving import app


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


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("tune bpr_mf -c debug --trials 0", "--trials"),
        ("tune bpr_mf -c debug --concurrent 0", "--concurrent"),
        ("tune bpr_mf -c debug --least-epochs 0", "--least-epochs"),
        ("bench quality -d debug --seeds 0", "--seeds"),
        ("bench ablation -d debug --seeds 0", "--seeds"),
        ("bench quality -d debug --models ,", "--models is empty; models: popularity"),
        ("bench quality -d debug -d typo --models popularity", "config 'typo' is neither a file nor a shipped config"),
        ("bench ablation -d debug --models ,", "--models is empty; models: single_draw"),
        ("bench quality -d debug --out table.json", "--out table.json: expected a file name that ends in .md"),
        ("bench ablation -d debug --out folder.md", "--out folder.md: expected a file name"),
        ("bench quality -d debug --out other.md", "other.json is not the JSON of a table that `ctd bench` wrote"),
        ("bench quality -d debug --out other.json/table.md", "other.json cannot be written to; give another --out"),
        ("bench serve --run run --k 0", "--k 0: expected 1 to serving.max_k=500"),
        ("bench serve --run run --k 501", "--k 501: expected"),
        ("bench serve --run run --clients 2,a", "--clients 2,a"),
        ("bench serve --run run --json gone/load.json", "--json gone/load.json: expected the name of a file"),
        ("bench latency --run run --json folder.md", "--json folder.md: expected the name of a file"),
        ("run -c debug --storage ", "the storage of runs is empty"),
        ("run -c debug --name ../beside", "--name ../beside: expected a name without a slash"),
        ("data --name .", "--name .: expected a name without a slash"),
        ("data --dataset lastfm --interactions x.csv", "--dataset lastfm is a ready-made set; leave it out"),
        ("run -c debug --set interactions.items=x.csv", "interactions.dataset='ml-100k' is a ready-made set"),
        ("run -c debug --set seed=99999999999999999999", "seed: Input should be less than 9223372036854775808"),
        ("run -c debug --set graph.learning_rate=inf", "graph.learning_rate: Input should be a finite number"),
        ("tune graph -c debug --range graph.l2=0,1 --range graph.l2=2,3", "graph.l2=2,3: a setting has two ranges"),
        ("recommend --run run --user 1 --history 2", "exactly one of --user and --history"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_runs(
    command: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Run(".", "run").write_config(load_config("debug"))
    (tmp_path / "folder.md").mkdir()
    (tmp_path / "other.json").write_text('{"rows": []}')
    before = sorted(tmp_path.rglob("*"))
    assert message in refused(capsys, *command.split(" "))
    assert sorted(tmp_path.rglob("*")) == before


def test_nobody_need_listen_to_what_is_said() -> None:
    script = f"{sys.executable} -c 'import ctd_scale.terminal' >&-"
    assert subprocess.run(["bash", "-c", script], check=False).returncode == 0


def test_an_endpoint_that_does_not_come_up_is_a_message(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(app, "READY_TIMEOUT_S", 0)
    monkeypatch.setattr("ctd_scale.cli.app", lambda **_: app._wait_until_ready("http://127.0.0.1:9"))
    with pytest.raises(SystemExit, match="1"):
        main(["serve"])
    assert capsys.readouterr().err.startswith("error: http://127.0.0.1:9/readyz does not answer: ")


def test_a_full_disk_is_a_message(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def write(**_: Any) -> None:
        Path("/dev/full").write_text("more than fits")

    monkeypatch.setattr("ctd_scale.cli.app", write)
    assert "No space left on device; free some space and give the same command again" in refused(capsys, "run")


def test_a_path_may_hold_any_character(tmp_path: Path) -> None:
    path = f'{tmp_path}/spätze 😀 "quoted" 𠀋/l.parquet'
    assert configured(None, None, None, path, path, path).interactions.interactions == path


def test_a_log_that_is_not_there_leaves_the_config_of_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, config = Run(str(tmp_path), "mine"), load_config("quickstart")
    run.write_config(config)
    log = ["--interactions", f"{tmp_path}/nope.parquet", "--items", f"{tmp_path}/nope.parquet"]
    where = ["--storage", str(tmp_path), "--name", "mine"]
    tune = ["tune", "bpr_mf", "-c", "debug", "--range", "baselines.bpr_mf.epochs=1,2"]
    for command in (["run", "-c", "debug"], ["data"], ["train", "interactions", "-c", "debug"], tune):
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
        message = r"models/llm was made with llm\.max_history=30, .* says 2; .*set llm\.max_history back to 30"
        with pytest.raises(ArtifactError, match=message):
            require_made_with(artifact, config, "llm")
    require_made_with(Artifact("models/llm", Path(), json.loads("{}")), config, "llm")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run that says with what each stage made its artifacts, which are empty."""
    run, config = Run(str(tmp_path_factory.mktemp("runs")), "made"), load_config("debug", ["llm.dtype=bfloat16"])
    run.write_config(config)
    for stage in STAGES:
        with_settings = replace(run, settings=section_values(config, sections_of(stage, config)))
        for name in stage.outputs:
            with with_settings.publish(name, config_hash="", inputs={}):
                pass
    return run


@pytest.mark.parametrize(
    ("override", "artifact"),
    [
        ("interactions.duplicates=last", "interactions"),
        ("graph.epochs=77", "graph"),
        ("tokenizer.steps=77", "models/tokenizer"),
        ("history.dropout=0.07", "models/history"),
        ("llm.epochs=77", "models/llm"),
        ("llm.text_choices=free", "preferences"),
        ("diffusion.epochs=77", "models/diffusion"),
        ("retrieval.neighbors=0", "index"),
        ("retrieval.engine=faiss", "index"),
    ],
)
@pytest.mark.parametrize("command", [["evaluate"], ["bench", "latency"]], ids=lambda command: command[-1])
def test_nothing_is_measured_with_settings_that_it_was_not_made_with(
    made: Run, command: list[str], override: str, artifact: str, capsys: pytest.CaptureFixture[str]
) -> None:
    said = refused(capsys, *command, "--run", made.url, "--set", override)
    key, _, value = override.partition("=")
    assert f"{made.url}/{artifact} was made with {key}=" in said
    assert value in said.partition(f"{key}=")[2]
    assert f"finish `ctd run` with that config, or leave {key}=" in said


@pytest.mark.parametrize(
    "override",
    [
        "llm.dtype=float32",  # whose preferences are there
        "retrieval.text_candidates=7",
        "diffusion.num_draws=7",
        "evaluation.mask_seen=false",
        "graph.checkpoint_every_steps=7",
        "resources.llm.num_workers=2",
    ],
)
def test_what_only_says_how_it_is_asked_may_be_measured(made: Run, override: str) -> None:
    require_measured_as_made(made, made.read_config([override]))


def test_what_no_stage_made_is_measured_with_anything(tmp_path: Path) -> None:
    run = Run(str(tmp_path), "given")
    with run.publish("index", config_hash="", inputs={}):
        pass
    require_measured_as_made(run, load_config("debug", ["retrieval.neighbors=0"]))
