"""What `ctd tune` understands, before anything is trained."""

from __future__ import annotations

import fcntl
import pickle
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from ray.tune.experiment import Trial as RayTrial
from ray.tune.schedulers import AsyncHyperBandScheduler
from ray.tune.search.sample import Categorical, Float, Integer

from ctd_scale import training, tuning
from ctd_scale.artifacts import LOCK, ArtifactError, Run
from ctd_scale.config import ConfigError, load_config
from ctd_scale.pipeline import stage_named
from ctd_scale.tuning import METRIC, Asha, _link_inputs, _name, _report, _trial_of, search
from ctd_scale.tuning_space import (
    linked_inputs,
    overrides_of,
    read_range,
    require_own,
    require_ranked,
    trial_stages,
)


def test_ranges_in_words() -> None:
    key, rate = read_range("llm.learning_rate=1e-4..1e-2")
    assert key == "llm.learning_rate"
    assert isinstance(rate, Float)
    drawn = np.array([rate.sample() for _ in range(400)])
    assert drawn.min() >= 1e-4
    assert drawn.max() <= 1e-2
    assert 0.4 < (drawn < 1e-3).mean() < 0.6, "as many below the middle of the logarithm as above"
    _, weight = read_range("diffusion.contrastive_weight=0..1.5")
    assert {weight.sample() < 0.75 for _ in range(50)} == {True, False}
    _, layers = read_range("llm.num_hidden_layers=2..4")
    assert isinstance(layers, Integer)
    assert {layers.sample() for _ in range(100)} == {2, 3, 4}
    _, kind = read_range("llm.item_vectors=learned,joined")
    assert isinstance(kind, Categorical)
    assert {kind.sample() for _ in range(50)} == {"learned", "joined"}


def test_what_is_written_down_is_what_was_trained() -> None:
    settings = {"llm.learning_rate": 0.000123456789, "llm.epochs": 3, "llm.item_vectors": "joined"}
    assert overrides_of(settings) == ["llm.learning_rate=0.0001235", "llm.epochs=3", "llm.item_vectors=joined"]


@pytest.mark.parametrize(
    ("stage", "ranges", "expected"),
    [
        ("llm", ["llm.epochs"], r"--range llm\.epochs: expected stage\.key=low\.\.high"),
        ("llm", ["llm.epochs=9..2"], "the lower first"),
        ("llm", ["llm.epochs=few..many"], "expected two numbers"),
        ("llm", ["llm.rate=1..2"], r"llm\.rate: unknown key"),
        ("llm", ["llm.head_dropout=0.5..1.5"], r"llm\.head_dropout: Input should be less than or equal to 1"),
        ("llm", [], "nothing to search"),
        ("llm", ["graph.epochs=1,2"], r"graph\.epochs: llm does not depend on it; expected a setting in .*llm"),
        ("history", ["history.dropout=0..0.5"], r"history\.num_blocks=0, so nothing is trained.*--set history\.num_b"),
        (
            "history",
            ["history.num_blocks=0..2"],
            r"history\.num_blocks=0, .*leave 0 out of --range history",
        ),
        (
            "history",
            ["history.num_blocks=2,1,0"],
            r"history\.num_blocks=0, .*leave 0 out of --range history",
        ),
        ("llm", ["llm.validation_users=0,9"], r"llm\.validation_users=0, so nobody .*leave 0 out of --range llm\.val"),
        ("sasrec", ["baselines.sasrec.validation_users=0..9"], r"baselines\.sasrec\.validation_users=0, so nobody"),
        (
            "llm",
            ["llm.backbone=a,b"],
            r"llm\.backbone: train_tokenizer, whose models/tokenizer all trials share",
        ),
        (
            "tiger",
            ["llm.num_hidden_layers=1,2"],
            r"assign_codes_tiger, whose codes/tiger all trials share, .*--set",
        ),
        ("diffusion", ["retrieval.engine=exact,faiss"], r"--range retrieval\.engine: build_index, whose index all"),
        (
            "sasrec",
            ["evaluation.mask_seen=true,false"],
            r"evaluation\.mask_seen: trials are compared by it; .*--set",
        ),
        ("diffusion", ["llm.epochs=1,2"], r"diffusion does not depend on it; expected a setting in diffusion$"),
        (
            "tokenizer",
            ["tokenizer.mask_ratio=0..1"],
            "not ranked on validation by itself; what can be tuned: graph, ",
        ),
    ],
)
def test_mistakes_are_named_before_anything_is_trained(
    tmp_path: Path, stage: str, ranges: list[str], expected: str
) -> None:
    run = Run(str(tmp_path), "run")
    with pytest.raises(ConfigError, match=expected):
        search(stage, "debug", [], ranges, run, trials=1, concurrent=1, least_epochs=1)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("stage", "overrides"),
    [
        ("llm", ["llm.validation_users=0"]),
        ("text_only", ["llm.validation_users=0"]),
        ("history", ["history.num_blocks=1", "history.validation_users=0"]),
        ("bpr_mf", ["baselines.bpr_mf.validation_users=0"]),
    ],
)
def test_without_anybody_to_validate_on_nothing_is_searched(stage: str, overrides: list[str]) -> None:
    (made,), key = trial_stages(stage_named(stage)), overrides[-1].removesuffix("=0")
    with pytest.raises(ConfigError, match=rf"{key}=0, so nobody is left .*--set {key}=1000"):
        require_ranked(made, "debug", overrides, {})
    require_ranked(made, "debug", overrides, {key: read_range(f"{key}=5,9")[1]})
    require_ranked(made, "debug", overrides[:-1], {})


@pytest.mark.parametrize(
    ("stage", "key", "shared_with_a_reader", "shared_without"),
    [
        ("llm", "llm.temperature", True, False),
        ("llm", "llm.preference_dim", True, False),
        ("llm", "llm.learning_rate", False, False),
        ("llm", "history.dropout", True, False),
        ("history", "llm.temperature", False, False),
        ("collm", "llm.max_history", False, False),
        ("tiger", "llm.max_history", False, False),
        ("p5_random", "llm.num_hidden_layers", False, False),
        ("diffusion", "diffusion.guidance", False, False),
    ],
)
def test_a_trial_sets_what_nothing_that_trials_share_depends_on(
    stage: str, key: str, shared_with_a_reader: bool, shared_without: bool
) -> None:
    stages, space = trial_stages(stage_named(stage)), {key: None}
    for blocks, shared in ((1, shared_with_a_reader), (0, shared_without)):
        settings = load_config("debug", [f"history.num_blocks={blocks}"])
        if shared:
            with pytest.raises(ConfigError, match=f"--range {key}: train_history, whose models/history all trials"):
                require_own(stage, stages, settings, space)
        else:
            require_own(stage, stages, settings, space)


def test_a_search_that_another_process_makes_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, stage = Run(str(tmp_path), "run"), stage_named("sasrec")
    with run.publish("interactions", config_hash="", inputs={}):
        pass
    ranges = ["baselines.sasrec.epochs=1,2"]
    name = _name([stage], run, load_config("debug"), [*ranges, 1, 1])
    folder = run.root / "tune" / name
    folder.mkdir(parents=True)
    monkeypatch.setattr(tuning, "_make_inputs", lambda *_: None)
    monkeypatch.setattr(training, "start_ray", lambda: pytest.fail("it went on"))
    with (folder / LOCK).open("w") as lock:  # as another process has it
        lock.write("pid 7")
        lock.flush()
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(ArtifactError, match=rf"{name} is being made by another process \(pid 7\)"):
            search("sasrec", "debug", [], ranges, run, trials=1, concurrent=1, least_epochs=1)


def test_a_trial_reads_what_its_search_began_with(tmp_path: Path) -> None:
    base, own = Run(str(tmp_path), "base"), Run(str(tmp_path), "trial")

    def publish(text: str) -> None:
        with base.publish("graph", config_hash="", inputs={}) as folder:
            (folder / "made").write_text(text)

    publish("first")
    inputs = {"graph": base.fetch("graph").digest}
    _link_inputs(inputs, base, own)
    publish("again")
    _link_inputs(inputs, base, own)
    assert (own.root / "graph" / "made").read_text() == "first", "what was linked is still there"
    late = Run(str(tmp_path), "late")
    with pytest.raises(ArtifactError, match=r"base/graph was made anew since the search began .*begins another search"):
        _link_inputs(inputs, base, late)
    publish("first")
    _link_inputs(inputs, base, late)


def told(scheduler: AsyncHyperBandScheduler, trial: SimpleNamespace, *validated: float) -> str:
    """What ASHA says at last to a trial that validates so, one after the other."""
    said = ""
    for count in range(1, len(validated) + 1):
        result = {**_report(validated[count - 1], validated[:count], finished=False), "time_total_s": 1.0}
        said = scheduler.on_trial_result(None, trial, result)
        trial.last_result = result
    return said


def a_trial(name: str) -> SimpleNamespace:
    return SimpleNamespace(trial_id=name, status=RayTrial.RUNNING, last_result=None)


def test_a_search_that_goes_on_compares_with_the_trials_before() -> None:
    def fresh(kind: type[AsyncHyperBandScheduler]) -> AsyncHyperBandScheduler:
        made = kind("validations", max_t=1_000, grace_period=2, reduction_factor=3)
        assert made.set_search_properties(METRIC, "max")
        return pickle.loads(pickle.dumps(made))

    through, goes_on, forgets = fresh(Asha), fresh(Asha), fresh(AsyncHyperBandScheduler)
    curves = {"good": [0.1, 0.5, 0.6, 0.6, 0.6, 0.7, 0.7], "bad": [0.4, 0.2], "fair": [0.3, 0.4, 0.5, 0.5]}
    trials = {name: a_trial(name) for name in [*curves, "failed at once"]}
    for name, trial in trials.items():
        through.on_trial_add(None, trial)
        told(through, trial, *curves.get(name, []))
        if trial.last_result is not None:
            through.on_trial_complete(None, trial, trial.last_result)
        trial.status = RayTrial.TERMINATED
        for scheduler in (goes_on, forgets):
            scheduler.on_trial_add(None, trial)
    assert [bracket._rungs for bracket in goes_on._brackets] == [bracket._rungs for bracket in through._brackets]
    for scheduler, expected in ((through, "STOP"), (goes_on, "STOP"), (forgets, "CONTINUE")):
        late = a_trial("late")
        scheduler.on_trial_add(None, late)
        assert told(scheduler, late, 0.1) == "CONTINUE"
        assert told(scheduler, late, 0.1, 0.3) == expected


def test_a_storage_that_cannot_be_linked_is_refused() -> None:
    with pytest.raises(ConfigError, match="--storage must be a folder"):
        search(
            "llm", "debug", [], ["llm.epochs=1..2"], Run("memory://runs", "run"), trials=1, concurrent=1, least_epochs=1
        )


def test_a_trial_that_failed_at_once_says_why() -> None:
    """Such a trial has neither metrics nor rows of them, or rows without what a training says."""
    for metrics in (None, {}, {"time_total_s": 1.0}):
        failed = SimpleNamespace(config={"llm.epochs": 2}, metrics=metrics, error=RuntimeError("no such file"))
        found = _trial_of(failed)
        assert (found.settings, found.validated, found.error) == ({"llm.epochs": 2}, [], "no such file")
        assert not found.stopped_early


def test_another_search_begins_where_a_trial_would_end_otherwise(tmp_path: Path) -> None:
    run, stages = Run(str(tmp_path), "run"), trial_stages(stage_named("train_diffusion"))
    for name in linked_inputs(stages):
        with run.publish(name, config_hash="", inputs={}) as folder:
            (folder / "made").write_text("first")

    def name(*overrides: str) -> str:
        return _name(stages, run, load_config("debug", overrides), ["ranges"])

    before = name()
    assert name() == before
    assert name("serving.max_k=7") == before
    others = {
        name(each) for each in ("diffusion.epochs=7", "evaluation.mask_seen=false", "evaluation.calibration_users=7")
    }
    with run.publish("index", config_hash="", inputs={}) as folder:
        (folder / "made").write_text("again")
    assert len({before, name(), *others}) == 5
