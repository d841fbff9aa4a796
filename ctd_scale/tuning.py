"""`ctd tune`: search the settings of one stage on validation, with Ray Tune.

What the stage reads is made once, in the run itself. Every trial trains the stage in a run of its own, whose inputs are
links to these, and says validation NDCG@10 after every epoch that was ranked; ASHA (Li et al., 2020) ends those that
lag behind the others at the same epoch. A trial's files are removed when it ends: the settings are what is looked for.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import tomli_w
from ray import tune
from ray.tune.experiment import Trial as RayTrial
from ray.tune.integration.ray_train import TuneReportCallback
from ray.tune.schedulers import AsyncHyperBandScheduler
from ray.tune.search import BasicVariantGenerator
from rich.table import Table

from ctd_scale import training
from ctd_scale.artifacts import ArtifactError, Run, link_artifact, write_text
from ctd_scale.config import ConfigError, RunConfig, load_config, resolve_config, section_hash
from ctd_scale.environment import machine, versions
from ctd_scale.evaluate import rank_baseline
from ctd_scale.pipeline import ALL_STAGES, Stage, backbone_digests, run_stage, run_with_inputs, sections_of, stage_named
from ctd_scale.terminal import TrainingError, console
from ctd_scale.tuning_space import linked_inputs, overrides_of, read_range, require_own, require_ranked, trial_stages

METRIC = "ndcg"
# Trials of the denoiser are ranked by preference, draws and error together, which is what it is for.
DENSITY = "fused_both"


@dataclass(frozen=True)
class Trial:
    """One choice of settings: NDCG@10 after each validation, the best of them, and how it ended."""

    settings: dict[str, Any]
    validated: list[float]
    ndcg: float
    seconds: float
    stopped_early: bool
    error: str


def search(
    stage_name: str,
    config: str,
    overrides: Sequence[str],
    ranges: Sequence[str],
    run: Run,
    *,
    trials: int,
    concurrent: int,
    least_epochs: int,
) -> list[Trial]:
    """Train so many trials, `concurrent` at a time, none ended before `least_epochs` validations; best first.

    Goes on where it was interrupted. Raises ConfigError: a stage that is not ranked on validation, a key or range that
    does not exist or that a trial cannot set for itself, nobody to rank it by, a storage that is not a folder;
    ArtifactError where another process makes the same search; TrainingError where every trial failed.
    """
    stages = trial_stages(stage_named(stage_name))
    if not run.is_local:
        raise ConfigError(
            f"{run.url}: trials link the run's files, so --storage must be a folder (shared by all nodes)"
        )
    if not ranges:
        raise ConfigError("nothing to search: give --range stage.key=low..high or stage.key=a,b,c, once or more")
    space = dict(map(read_range, ranges))
    if len(space) < len(ranges):
        raise ConfigError(f"--range {' '.join(ranges)}: a setting has two ranges; give one with both ends")
    settings = load_config(config, overrides)
    for _ in range(20):  # a key that does not exist, or a value out of bounds, is an error now and not in an hour
        load_config(config, [*overrides, *overrides_of({key: each.sample() for key, each in space.items()})])
    require_own(stage_name, stages, settings, space)
    require_ranked(stages[0], config, overrides, space)
    _make_inputs(stages, run, settings)
    name = _name(stages, run, settings, [*sorted(ranges), trials, least_epochs])
    folder = run.root / "tune" / name
    with Run(str(folder.parent), name).alone():
        training.start_ray()
        os.environ["RAY_CHDIR_TO_TRIAL_DIR"] = "0"  # paths in settings begin where we are
        os.environ["TUNE_DISABLE_SIGINT_HANDLER"] = "1"  # with it Ctrl-C would end the search as if it were complete
        arguments = {
            "stages": [stage.name for stage in stages],
            "config": str(resolve_config(config).absolute()),
            "overrides": list(overrides),
            "storage": str(run.root.parent),
            "name": run.name,
            "trials": str(folder / "runs"),
            "inputs": _digests(stages, run),
        }
        trainable = tune.with_resources(tune.with_parameters(_trial, arguments=arguments), {"CPU": 0.1})
        if tune.Tuner.can_restore(str(folder)):
            tuner = tune.Tuner.restore(str(folder), trainable, restart_errored=True)
        else:
            tuner = tune.Tuner(
                trainable,
                param_space=space,
                tune_config=tune.TuneConfig(
                    metric=METRIC,
                    mode="max",
                    num_samples=trials,
                    search_alg=BasicVariantGenerator(random_state=settings.seed, max_concurrent=concurrent),
                    scheduler=Asha("validations", max_t=1_000_000, grace_period=least_epochs, reduction_factor=3),
                ),
                run_config=tune.RunConfig(
                    name=name, storage_path=str(folder.parent), callbacks=[_Teller(folder / "runs")], verbose=0
                ),
            )
        done = [_trial_of(result) for result in tuner.fit()]
        shutil.rmtree(folder / "runs", ignore_errors=True)
    if all(trial.error for trial in done):
        raise TrainingError(f"every trial failed; the first one: {done[0].error}")
    return sorted(done, key=lambda trial: -trial.ndcg if not trial.error else math.inf)


def write_best(trials: Sequence[Trial], config: str, overrides: Sequence[str], command: str, folder: Path) -> None:
    """`best.toml`, to be given as --config, and `trials.json` with all that was measured."""
    folder.mkdir(parents=True, exist_ok=True)
    best = trials[0]
    chosen = load_config(config, [*overrides, *overrides_of(best.settings)])
    values = chosen.model_dump(mode="json", exclude_unset=True)
    said = f"# Validation NDCG@10 {best.ndcg:.4f}, the best of {len(trials)} trials: {command}\n"
    write_text(folder / "best.toml", said + tomli_w.dumps(values))
    record = {"command": command, "machine": machine(), "versions": versions(), "trials": list(map(asdict, trials))}
    write_text(folder / "trials.json", json.dumps(record, indent=1) + "\n")


def show_trials(trials: Sequence[Trial]) -> None:
    """A table, best first."""
    table = Table()
    for head in ("NDCG@10", "settings", "validations", "s", ""):
        table.add_column(head)
    for trial in trials:
        end = trial.error.splitlines()[-1][:60] if trial.error else "ended early" if trial.stopped_early else ""
        said = " ".join(overrides_of(trial.settings))
        table.add_row(f"{trial.ndcg:.4f}", said, str(len(trial.validated)), f"{trial.seconds:.0f}", end)
    console.print(table)


def _digests(stages: Sequence[Stage], run: Run) -> dict[str, str]:
    """Of what these stages read and do not make themselves."""
    return {name: run.fetch(name, verify=False).digest for name in linked_inputs(stages)}


def _make_inputs(stages: Sequence[Stage], run: Run, config: RunConfig) -> None:
    needed = set(linked_inputs(stages))
    run_with_inputs([maker for maker in ALL_STAGES if needed & set(maker.outputs)], run, config)


def _name(stages: Sequence[Stage], run: Run, config: RunConfig, asked: list[Any]) -> str:
    """Another search, which has another name, begins where anything is another that a trial depends on: what is asked,
    what its stages read, their settings, and how they are ranked."""
    made = [(stage.name, stage.revision) for stage in stages]
    sections = sorted({"evaluation", *(name for stage in stages for name in sections_of(stage, config))})
    read = [*_digests(stages, run).values(), *backbone_digests(sections, config).values()]
    payload = json.dumps([made, section_hash(config, sections), read, asked])
    return f"{stages[0].name}-{hashlib.sha256(payload.encode()).hexdigest()[:8]}"


def _trial(settings: dict[str, Any], arguments: dict[str, Any]) -> None:
    """One trial, in a process of its own."""
    chosen = overrides_of(settings)
    config = load_config(arguments["config"], [*arguments["overrides"], *chosen])
    base = Run(arguments["storage"], arguments["name"])
    own = Run(arguments["trials"], tune.get_context().get_trial_id())  # settings may be drawn twice
    stages = [stage_named(name) for name in arguments["stages"]]
    _link_inputs(arguments["inputs"], base, own)
    own.write_config(config)
    record = own.root / "validated.json"
    with training.reporting_to(_EveryValidation(record)):
        for stage in stages:
            run_stage(stage, own, config)
    tune.report(_report(_validation_ndcg(stages[-1], own, config), _read(record).values(), finished=True))


def _link_inputs(inputs: Mapping[str, str], base: Run, own: Run) -> None:
    """Raises ArtifactError where the run has others by now than those that the search began with, by their digests."""
    for name, digest in inputs.items():
        if not own.exists(name):
            link_artifact(name, base, own)
        found = own.fetch(name, verify=False).digest
        if found != digest:
            shutil.rmtree(own.root / name)
            raise ArtifactError(
                f"{base.url}/{name} was made anew since the search began (digest {digest[:12]}..., found "
                f"{found[:12]}...); give the command again: it begins another search, with what is there by now"
            )


def _read(record: Path) -> dict[str, float]:
    """NDCG@10 by the step or epoch after which it was measured."""
    return dict(json.loads(record.read_text())) if record.exists() else {}


def _report(ndcg: float, validated: Iterable[float], *, finished: bool) -> dict[str, Any]:
    """What Ray Tune is told. ASHA compares trials after the same number of validations."""
    so_far = list(validated)
    return {METRIC: ndcg, "validated": so_far, "validations": len(so_far), "finished": finished}


def _validation_ndcg(stage: Stage, run: Run, config: RunConfig) -> float:
    """What the stage said when it ended; the graph, which says nothing, is ranked by its embeddings alone."""
    if stage.name == "train_graph":
        ranks = rank_baseline("lightgcn", run, config, "validation", config.evaluation.mask_seen)
        return float(ranks.gains().mean())
    found = run.fetch(stage.outputs[0], verify=False).manifest["facts"]["validation_ndcg@10"]
    return float(found[DENSITY] if isinstance(found, dict) else found)


def _trial_of(result: Any) -> Trial:
    last, error = result.metrics or {}, "" if result.error is None else str(result.error)
    if METRIC not in last:  # it failed before it was ranked
        return Trial(dict(result.config), [], 0.0, 0.0, False, error)
    return Trial(
        settings=dict(result.config),
        validated=[round(ndcg, 6) for ndcg in last["validated"]],
        ndcg=round(max([*last["validated"], last[METRIC]]), 6),
        seconds=round(float(last["time_total_s"]), 1),
        stopped_early=not last["finished"] and not error,
        error=error,
    )


class Asha(AsyncHyperBandScheduler):  # type: ignore[misc]  # untyped
    """ASHA that goes on where it was: Ray gives a search that it restores a fresh scheduler, and adds the trials to it
    that had ended. Trials that had not say all again (`_EveryValidation`)."""

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        super().on_trial_add(tune_controller, trial)
        if trial.status == RayTrial.TERMINATED:
            bracket = self._trial_info.pop(trial.trial_id)
            for count, ndcg in enumerate((trial.last_result or {}).get("validated", ()), start=1):
                bracket.on_result(trial, count, self._metric_op * ndcg)


class _EveryValidation(TuneReportCallback):  # type: ignore[misc]  # untyped
    """Passes on each validation that a training reports, once; first of all those it had reported when the search was
    interrupted, as ASHA should not wait for the training to begin. A training says with each all before it: one whose
    checkpoint was stored in the moment of the kill is heard of when it goes on."""

    def __init__(self, record: Path) -> None:
        super().__init__()
        self.record, self.known = record, _read(record)
        before = list(self.known.values())
        for number, ndcg in enumerate(before, start=1):
            tune.report(_report(ndcg, before[:number], finished=False))

    def after_report(self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Any) -> None:
        for when, ndcg in metrics[0].get("validated", {}).items():
            if when not in self.known:
                self.known[when] = ndcg
                write_text(self.record, json.dumps(self.known))
                told = _report(ndcg, self.known.values(), finished=False)
                super().after_report(run_context, [told], None)


class _Teller(tune.Callback):  # type: ignore[misc]  # untyped
    """Says how the trials go, and removes the files of each that ends."""

    def __init__(self, runs: Path) -> None:
        self.runs = runs

    def on_trial_result(self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **_: Any) -> None:
        if result["finished"] and result["validated"]:
            return  # what a validation has said before
        number, count = trials.index(trial) + 1, result["validations"]
        when = f"after validation {count}" if count else "when trained"
        console.print(
            f"  trial {number}: NDCG@10 {result[METRIC]:.4f} {when}  [dim]{' '.join(overrides_of(trial.config))}[/]",
            highlight=False,
            soft_wrap=True,
        )

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        shutil.rmtree(self.runs / trial.trial_id, ignore_errors=True)
