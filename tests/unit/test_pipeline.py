"""When a stage may be skipped."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest

from ctd_scale import artifacts
from ctd_scale.artifacts import LOCK, SCHEMA_VERSION, Run
from ctd_scale.baselines.names import DISCRETE, VARIANTS
from ctd_scale.config import ConfigError, load_config
from ctd_scale.pipeline import is_current, run_by_itself, run_with_inputs, stage_hash, stage_named
from ctd_scale.quality import rank_stage

KEY = "key"


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """A run whose graph stage has finished."""
    run = Run(str(tmp_path), "run")
    for name in stage_named("train_graph").outputs:
        with run.publish(name, config_hash=KEY, inputs={}) as folder:
            (folder / "file.txt").write_text("content")
    return run


def test_a_finished_stage_is_current_for_its_key_alone(run: Run) -> None:
    stage = stage_named("train_graph")
    assert is_current(stage, run, KEY)
    assert not is_current(stage, run, "another")
    assert not is_current(stage_named("train_llm"), run, KEY)


@pytest.mark.parametrize("damage", ["a file", "no manifest", "half a manifest", "another version's manifest"])
def test_what_cannot_be_read_is_made_again(run: Run, damage: str) -> None:
    folder = run.root / "embeddings"
    manifest = json.loads((folder / "manifest.json").read_text())
    if damage == "a file":
        (folder / "file.txt").write_text("other")
    elif damage == "no manifest":
        (folder / "manifest.json").unlink()
    elif damage == "half a manifest":
        (folder / "manifest.json").write_text("{")
    else:
        (folder / "manifest.json").write_text(json.dumps({**manifest, "schema_version": SCHEMA_VERSION - 1}))
    assert not is_current(stage_named("train_graph"), run, KEY)


def test_what_several_stages_read_is_made_once_and_first(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []
    monkeypatch.setattr("ctd_scale.pipeline.run_stage", lambda stage, *_: made.append(stage.name))
    stages = [stage_named(name) for name in ("sasrec", "collm")]
    run_with_inputs(stages, run, load_config("debug"))
    assert made == ["prepare_interactions", "train_sasrec", "train_graph", "train_collm"]


@pytest.mark.parametrize("ran", [True, False])
def test_the_config_of_a_run_changes_where_something_is_made(
    run: Run, monkeypatch: pytest.MonkeyPatch, ran: bool
) -> None:
    before, now = load_config("debug"), load_config("debug", ["llm.max_history=3"])
    monkeypatch.setattr("ctd_scale.pipeline.run_stage", lambda *_: False)
    run_with_inputs([stage_named("sasrec")], run, before)
    assert run.read_config() == before, "there was none"
    monkeypatch.setattr("ctd_scale.pipeline.run_stage", lambda *_: ran)
    run_with_inputs([stage_named("sasrec")], run, now)
    assert run.read_config() == (now if ran else before)


OTHERS = ["llm.max_history=3", "evaluation.calibration_users=7", "serving.max_k=7", "baselines.bsarec.epochs=7"]
OF_SASREC = ["baselines.sasrec.epochs=7", "evaluation.mask_seen=false"]


@pytest.mark.parametrize(("ran", "taken"), [(True, OF_SASREC), (False, [])])
def test_the_config_of_a_run_takes_over_what_shapes_the_stage_that_ran(
    run: Run, monkeypatch: pytest.MonkeyPatch, ran: bool, taken: list[str]
) -> None:
    def make(*_: object) -> bool:
        assert run.root / LOCK in artifacts._held
        return ran

    monkeypatch.setattr("ctd_scale.pipeline.run_stage", make)
    stage, before, now = stage_named("sasrec"), load_config("debug"), load_config("debug", [*OTHERS, *OF_SASREC])
    run_by_itself(stage, run, before)
    assert run.read_config() == before, "there was none"
    run_by_itself(stage, run, now)
    assert run.read_config() == load_config("debug", taken)


def test_a_config_that_would_contradict_itself_is_refused_before_anything_is_made(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ctd_scale.pipeline.run_stage", lambda *_: pytest.fail("was made"))
    before = load_config("debug")
    run.write_config(before)
    dim = before.graph.embed_dim + 1
    now = ["llm.item_vectors=collaborative", f"llm.preference_dim={dim}", f"graph.embed_dim={dim}"]
    message = (
        rf"run\.toml with what now shapes train_llm(.|\n)*llm\.preference_dim={dim} but graph\.embed_dim={dim - 1}"
    )
    with pytest.raises(ConfigError, match=message):
        run_by_itself(stage_named("llm"), run, load_config("debug", now))
    assert run.read_config() == before


@pytest.mark.parametrize("name", [*DISCRETE, *VARIANTS])
def test_another_backbone_trains_and_ranks_the_llm_rivals_again(name: str, run: Run) -> None:
    for artifact in ("interactions", f"codes/{name}", f"baselines/{name}"):
        with run.publish(artifact, config_hash="", inputs={}) as folder:
            (folder / "file.txt").write_text("content")
    few, many = load_config("debug"), load_config("debug", ["llm.num_hidden_layers=2"])
    for stage in (stage_named(name), rank_stage(name)):
        assert stage_hash(stage, run, few) != stage_hash(stage, run, many)


def test_another_backbone_has_tokens_of_its_own(run: Run) -> None:
    stage, (given, other) = stage_named("train_tokenizer"), (Path(run.storage) / name for name in ("given", "other"))
    for folder in (given, other):
        folder.mkdir()
        (folder / "config.json").write_text(f'{{"of": "{folder.name}"}}')
    keys = [
        stage_hash(stage, run, load_config("debug", overrides))
        for overrides in ([], [f"llm.backbone={given}"], [f"llm.backbone={other}"], ["llm.max_history=3"])
    ]
    assert len(set(keys[:3])) == 3
    assert keys[3] == keys[0], "it reads nothing else of the LLM's settings"


@pytest.mark.parametrize(
    ("file", "anew"),
    [("model-00001-of-00002.safetensors", True), ("config.json", True), ("tokenizer.json", True), ("README.md", False)],
)
def test_what_lies_in_the_folder_of_a_backbone_is_read_again(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str, anew: bool
) -> None:
    readers = [*map(stage_named, ("tokenizer", "history", "llm", "export_preferences", "assign_codes_tiger", "collm"))]
    others = [*map(stage_named, ("graph", "diffusion", "sasrec", "assign_codes_p5_random"))]
    readers.append(rank_stage("tiger"))
    for artifact in {name for stage in (*readers, *others) for name in stage.inputs}:
        with run.publish(artifact, config_hash="", inputs={}):
            pass
    backbone = tmp_path / "backbone"
    backbone.mkdir()
    for name in ("config.json", "model-00001-of-00002.safetensors", "tokenizer.json", "README.md"):
        (backbone / name).write_text("before")
    read: list[Path] = []
    monkeypatch.setattr("ctd_scale.llm.backbone_files.file_digest", lambda path: read.append(path) or path.read_text())
    config = load_config("debug", [f"llm.backbone={backbone}"])

    def keys() -> dict[str, str]:
        return {stage.name: stage_hash(stage, run, config) for stage in (*readers, *others)}

    before = keys()
    assert keys() == before
    assert len(read) == 3, "weights are read once, however many stages ask"
    (backbone / file).write_text("behind")  # as many bytes
    os.utime(backbone / file, ns=(0, 7))
    changed = {name for name, key in keys().items() if key != before[name]}
    assert changed == ({stage.name for stage in readers} if anew else set())


def test_a_backbone_that_is_not_there_is_named_before_anything_is_made(run: Run) -> None:
    config = load_config("debug", ["llm.backbone=nowhere"])
    with pytest.raises(ConfigError, match=r"llm\.backbone='nowhere' is neither 'smollm2-135m' nor a folder"):
        stage_hash(stage_named("tokenizer"), run, config)
    with run.publish("interactions", config_hash="", inputs={}):
        pass
    stage_hash(stage_named("sasrec"), run, config)


def test_what_a_former_revision_of_a_stage_made_is_made_again(run: Run) -> None:
    with run.publish("interactions", config_hash="", inputs={}) as folder:
        (folder / "file.txt").write_text("content")
    stage, config = rank_stage("item_knn"), load_config("debug")
    keys = [stage_hash(replace(stage, revision=revision), run, config) for revision in (0, 1, 2)]
    assert len(set(keys)) == 3
    assert stage_hash(stage, run, config) == keys[1], "its ranks know the validation interactions since then"


def test_a_baseline_is_trained_again_only_for_what_it_reads(run: Run) -> None:
    with run.publish("interactions", config_hash="", inputs={}) as folder:
        (folder / "file.txt").write_text("content")
    keys = [
        stage_hash(stage_named("sasrec"), run, load_config("debug", overrides))
        for overrides in ([], ["evaluation.text_factors=[0.0, 3.0]"], ["evaluation.mask_seen=false"])
    ]
    assert keys[0] == keys[1] != keys[2]


@pytest.mark.parametrize(
    ("override", "learned"),
    [
        ("diffusion.num_draws=7", False),
        ("diffusion.error_evaluations=32", False),
        ("diffusion.contrastive_weight=0", True),
        ("diffusion.sampling_steps=3", False),
        ("diffusion.guidance=2.0", False),
        ("diffusion.sampler=distilled", True),
    ],
)
def test_a_denoiser_that_is_asked_otherwise_learns_nothing_anew(run: Run, override: str, learned: bool) -> None:
    stages = {stage_named(name): changed for name, changed in (("train_diffusion", learned), ("evaluate", True))}
    for artifact in {name for stage in stages for name in stage.inputs}:
        with run.publish(artifact, config_hash="", inputs={}) as folder:
            (folder / "file.txt").write_text("content")
    config, other = load_config("debug"), load_config("debug", [override])
    for stage, changed in stages.items():
        assert (stage_hash(stage, run, config) != stage_hash(stage, run, other)) is changed, stage.name


def test_a_student_learns_anew_what_its_teacher_does_otherwise(run: Run) -> None:
    stage = stage_named("train_diffusion")
    for artifact in stage.inputs:
        with run.publish(artifact, config_hash="", inputs={}):
            pass
    taught = ["diffusion.sampler=distilled"]
    key = stage_hash(stage, run, load_config("debug", taught))
    assert stage_hash(stage, run, load_config("debug", [*taught, "diffusion.sampling_steps=3"])) != key
    assert stage_hash(stage, run, load_config("debug", [*taught, "diffusion.num_draws=3"])) == key


@pytest.mark.parametrize(
    ("stage", "override", "anew"),
    [
        ("train_llm", "llm.generate_texts=false", False),
        ("train_llm", "llm.text_choices=category", False),
        ("export_preferences", "llm.generate_texts=false", True),
        ("train_llm", "llm.zero_stage=3", False),
        ("train_llm", "llm.gradient_checkpointing=true", False),
        ("train_llm", "llm.checkpoint_every_steps=7", False),
        ("train_llm", "llm.batch_tokens=7", True),
        ("train_graph", "graph.streaming=ray_data", False),
        ("train_graph", "graph.checkpoint_every_steps=7", False),
        ("train_graph", "graph.batch_size=7", True),
        ("train_diffusion", "diffusion.checkpoint_every_steps=7", False),
        ("train_tokenizer", "tokenizer.checkpoint_every_steps=7", False),
        ("assign_codes_tiger", "llm.num_hidden_layers=7", True),
        ("assign_codes_tiger", "llm.max_history=7", False),
        ("assign_codes_p5_collaborative", "llm.num_hidden_layers=7", False),
        ("assign_codes_p5_collaborative", "seed=7", True),
        ("train_tiger", "llm.max_history=7", True),
        ("train_tiger", "llm.max_new_tokens=7", False),
        ("train_tiger", "baselines.tiger.inference_batch=7", False),
        ("train_tiger", "baselines.tiger.beams=7", True),
        ("evaluate", "evaluation.chunk_users=7", False),
        ("evaluate", "evaluation.mask_seen=false", True),
    ],
)
def test_how_a_stage_works_makes_nothing_anew(run: Run, stage: str, override: str, anew: bool) -> None:
    made = stage_named(stage)
    for artifact in made.inputs:
        with run.publish(artifact, config_hash="", inputs={}):
            pass
    keys = [stage_hash(made, run, load_config("debug", overrides)) for overrides in ([], [override])]
    assert (keys[0] != keys[1]) is anew
