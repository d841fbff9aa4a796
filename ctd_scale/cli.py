"""`ctd`: the command line. Every option that is not about where things lie is a config key (`--set`)."""

from __future__ import annotations

import errno
import json
import os
import shlex
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from ctd_scale import environment
from ctd_scale.artifacts import Run
from ctd_scale.cli_bench import bench
from ctd_scale.cli_index import index
from ctd_scale.cli_options import (
    ConfigOption,
    DataDirOption,
    DatasetOption,
    InteractionsOption,
    ItemsOption,
    NameOption,
    RunOption,
    SetOption,
    StorageOption,
    configured,
    overriding,
)
from ctd_scale.config import RunConfig
from ctd_scale.terminal import INTERRUPTED, INTERRUPTION, ServingError, TrainingError, console, interruptible

app = typer.Typer(
    help="Generative recommendation with continuous-token diffusion.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)

app.add_typer(bench, name="bench")
app.add_typer(index, name="index")

STAGE_ALIASES = {
    "interactions": "prepare_interactions",
    "preferences": "export_preferences",
    "index": "build_index",
    "ranking": "calibrate_ranking",
}


@app.command("run")
def run_command(
    config: ConfigOption,
    storage: StorageOption = "runs",
    name: NameOption = "",
    dataset: DatasetOption = None,
    data_dir: DataDirOption = None,
    interactions: InteractionsOption = None,
    items: ItemsOption = None,
    overrides: SetOption = None,
) -> None:
    """Run or resume the whole chain; stages whose inputs did not change are skipped."""
    settings = configured(config, overrides, dataset, data_dir, interactions, items)
    run = Run(storage, name or Path(config).stem)
    _run_all(run, settings)


@app.command()
def quickstart(
    storage: StorageOption = "runs",
    name: NameOption = "",
    config: ConfigOption = "quickstart",
    data_dir: DataDirOption = None,
    overrides: SetOption = None,
) -> None:
    """The whole chain on MovieLens-100k, and what it recommends to three users."""
    settings = configured(config, overrides, None, data_dir, None, None)
    run = Run(storage, name or "quickstart")
    _run_all(run, settings)
    show_examples(run, users=3)


@app.command()
def train(
    stage: Annotated[str, typer.Argument(help="graph, tokenizer, llm, diffusion, sasrec, tiger, ... or a job's name")],
    config: ConfigOption,
    storage: StorageOption = "runs",
    name: NameOption = "",
    dataset: DatasetOption = None,
    data_dir: DataDirOption = None,
    interactions: InteractionsOption = None,
    items: ItemsOption = None,
    overrides: SetOption = None,
) -> None:
    """Run or resume one stage; what it reads must be published. The run's config takes over what shapes the stage."""
    from ctd_scale.pipeline import run_by_itself, stage_named

    settings = configured(config, overrides, dataset, data_dir, interactions, items)
    run = Run(storage, name or Path(config).stem)
    run_by_itself(stage_named(STAGE_ALIASES.get(stage, stage)), run, settings)


@app.command()
def tune(
    stage: Annotated[str, typer.Argument(help="graph, llm, diffusion, bpr_mf, sasrec, bsarec, text_only, tiger, ...")],
    config: ConfigOption,
    ranges: Annotated[
        list[str] | None, typer.Option("--range", help="stage.key=low..high or stage.key=a,b,c; repeatable")
    ] = None,
    trials: Annotated[int, typer.Option(min=1, help="how many settings are tried")] = 16,
    concurrent: Annotated[
        int,
        typer.Option(
            min=1,
            help="how many at a time; each takes the stage's workers. A search that goes on keeps the number that it "
            "began with",
        ),
    ] = 1,
    least_epochs: Annotated[int, typer.Option(min=1, help="validations before a trial may be ended early")] = 4,
    storage: StorageOption = "runs",
    name: NameOption = "",
    dataset: DatasetOption = None,
    data_dir: DataDirOption = None,
    interactions: InteractionsOption = None,
    items: ItemsOption = None,
    overrides: SetOption = None,
) -> None:
    """Search a stage's settings on validation (Ray Tune, ASHA); the best become a config file."""
    from ctd_scale.tuning import search, show_trials, write_best

    chosen = overriding(overrides, dataset, data_dir, interactions, items)
    run = Run(storage, name or Path(config).stem)
    found = search(
        stage, config, chosen, ranges or (), run, trials=trials, concurrent=concurrent, least_epochs=least_epochs
    )
    show_trials(found)
    said = "".join(
        f" {flag} {shlex.quote(value)}"
        for flag, given in (("--range", ranges), ("--set", chosen))
        for value in given or ()
    )
    command = f"ctd tune {stage} --config {config}{said} --trials {trials} --least-epochs {least_epochs}"
    folder = run.root / "tune" / stage
    write_best(found, config, chosen, command, folder)
    console.print(f"written: {folder}/best.toml, {folder}/trials.json", highlight=False, soft_wrap=True)


@app.command()
def plan(
    config: ConfigOption,
    storage: StorageOption = "runs",
    name: NameOption = "",
    stage: Annotated[str, typer.Option(help="all, or graph alone")] = "all",
    dataset: DatasetOption = None,
    data_dir: DataDirOption = None,
    interactions: InteractionsOption = None,
    items: ItemsOption = None,
    overrides: SetOption = None,
) -> None:
    """Say what memory, disk and time each stage will need on this machine; nothing is trained or kept."""
    from ctd_scale.plan import plan_run, print_plan

    if stage not in ("all", "graph"):
        raise ValueError(f"--stage {stage}: expected all or graph")
    settings = configured(config, overrides, dataset, data_dir, interactions, items)
    run = Run(storage, name or Path(config).stem)
    print_plan(run, plan_run(run, settings, stage))


@app.command("evaluate")
def evaluate_command(run: RunOption, overrides: SetOption = None) -> None:
    """Rank the withheld items of a run again and print the table; with other settings than before the fusion weights,
    which are served, are fitted anew."""
    from ctd_scale.evaluate import print_report, read_reports
    from ctd_scale.pipeline import run_stage, stage_named
    from ctd_scale.recommender import require_measured_as_made

    opened = Run.open(run)
    settings = opened.read_config(overrides or ())
    require_measured_as_made(opened, settings)
    if run_stage(stage_named("calibrate_ranking"), opened, settings):
        console.print("  what is served of this run has these weights from now on", style="yellow", highlight=False)
    run_stage(stage_named("evaluate"), opened, settings)
    for report in read_reports(opened):
        print_report(report)


@app.command()
def recommend(
    run: RunOption,
    user: Annotated[str | None, typer.Option(help="a user id of the log")] = None,
    history: Annotated[str | None, typer.Option(help="item ids, oldest first, separated by commas")] = None,
    k: Annotated[int, typer.Option(help="how many items")] = 10,
    as_json: Annotated[bool, typer.Option("--json", help="print the endpoint's answer")] = False,
    explain: Annotated[bool, typer.Option(help="let the LLM say what the user wants")] = False,
    exclude_seen: Annotated[bool, typer.Option(help="leave out what is in the history")] = True,
    category: Annotated[list[str] | None, typer.Option(help="only items of this category; repeatable")] = None,
    exclude_category: Annotated[list[str] | None, typer.Option(help="no items of this category; repeatable")] = None,
    exclude_item: Annotated[
        list[str] | None, typer.Option(help="an item id that may not come back; repeatable")
    ] = None,
    only_item: Annotated[list[str] | None, typer.Option(help="only this item id may come back; repeatable")] = None,
    within: Annotated[
        list[str] | None, typer.Option("--range", help="only items whose number lies within: price=5:20; repeatable")
    ] = None,
    model: Annotated[str, typer.Option(help="a baseline of the run instead of the chain, such as sasrec")] = "",
) -> None:
    """Recommend for a known user, or after a history."""
    from ctd_scale.baseline_recommender import BaselineRecommender
    from ctd_scale.recommender import Recommender
    from ctd_scale.serving.schema import Directory, read_ranges, response_object

    if k < 1:
        raise ValueError(f"--k {k}: expected at least 1")
    if (user is None) == (history is None):
        raise ValueError("give exactly one of --user and --history")
    if model and explain:
        raise ValueError(f"--explain needs the chain; {model} says nothing")
    recommender = BaselineRecommender(Run.open(run), model) if model else Recommender(Run.open(run))
    items = history.split(",") if history is not None else None
    directory = Directory(recommender.log)
    resolved = directory.history(user_id=user, history=items)
    excluded = [
        directory.excluded(
            items=exclude_item or (),
            categories=category or None,
            exclude_categories=exclude_category or (),
            only_items=only_item or None,
            ranges=read_ranges(within or ()),
        )
    ]
    if isinstance(recommender, BaselineRecommender):
        known = None if user is None else [recommender.log.user_ids.index(user)]
        (answer,) = recommender.recommend([resolved], k, users=known, exclude_seen=exclude_seen, excluded=excluded)
    else:
        (answer,) = recommender.recommend([resolved], k, exclude_seen=exclude_seen, explain=explain, excluded=excluded)
    response = response_object(recommender.version, answer, recommender.catalogue)
    if as_json:
        print(json.dumps(response, ensure_ascii=False))
        return
    if response["text"]:
        console.print(response["text"], style="italic", highlight=False, markup=False)
    if not response["items"]:
        console.print("nothing is left to recommend: all items are excluded", style="yellow", highlight=False)
    for place, item in enumerate(response["items"], start=1):
        console.print(
            f"{place:3}. {item['title']}  [{item['item_id']}]  {item['score']:.4f}", highlight=False, markup=False
        )


@app.command("recommend-all")
def recommend_all_command(
    run: RunOption,
    out: Annotated[str, typer.Option(help="folder or URL for the Parquet files; default: RUN/recommendations")] = "",
    k: Annotated[int, typer.Option(help="how many items")] = 10,
    explain: Annotated[bool, typer.Option(help="let the LLM say what each user wants; takes much longer")] = False,
    exclude_seen: Annotated[bool, typer.Option(help="leave out what is in the history")] = True,
    model: Annotated[str, typer.Option(help="a baseline of the run instead of the chain, such as sasrec")] = "",
) -> None:
    """Recommend to every user of the log, into Parquet; goes on where it was interrupted."""
    from ctd_scale.recommend_all import Order, recommend_all

    opened = Run.open(run)
    target = out or f"{opened.url}/recommendations{f'-{model}' if model else ''}"
    users = recommend_all(opened, target, Order(k, exclude_seen, explain, model))
    console.print(f"{users:,} users: {target}", highlight=False, soft_wrap=True)


@app.command()
def serve(
    run: RunOption,
    host: Annotated[str | None, typer.Option(help="default: serving.host, 127.0.0.1")] = None,
    port: Annotated[
        int | None, typer.Option(min=0, max=65535, help="default: serving.port, 8000; 0 = any free one")
    ] = None,
    overrides: SetOption = None,
) -> None:
    """Serve a run over HTTP: POST /v1/recommend, GET /healthz, /docs. SIGHUP: serve what --run leads to by then."""
    from ctd_scale.serving.app import serve_run

    def open_run() -> tuple[Run, RunConfig]:
        opened = Run.open(run)
        return opened, opened.read_config(overrides or ())

    serving = open_run()[1].serving
    serve_run(open_run, host=serving.host if host is None else host, port=serving.port if port is None else port)


@app.command()
def data(
    storage: StorageOption = "runs",
    name: NameOption = "",
    dataset: DatasetOption = None,
    data_dir: DataDirOption = None,
    interactions: InteractionsOption = None,
    items: ItemsOption = None,
    overrides: SetOption = None,
) -> None:
    """Read, check and split a log without training anything: bad rows are named and quarantined."""
    from ctd_scale.pipeline import run_by_itself, stage_named

    if dataset is None and interactions is None and items is None:
        dataset = "ml-100k"
    settings = configured(None, overrides, dataset, data_dir, interactions, items)
    run = Run(storage, name or "data")
    run_by_itself(stage_named("prepare_interactions"), run, settings)
    facts = run.fetch("interactions").manifest["facts"]
    console.print_json(json.dumps(facts))


def _run_all(run: Run, settings: RunConfig) -> None:
    from ctd_scale.evaluate import print_report, read_reports
    from ctd_scale.pipeline import run_pipeline

    console.print(f"run [bold]{run.url}[/], seed {settings.seed}", highlight=False)
    run_pipeline(run, settings)
    for report in read_reports(run):
        print_report(report)
    for name in ("run.toml", "metrics/", "models/", "embeddings/", "tokens/", "index/"):
        console.print(f"  {run.url}/{name}", highlight=False)
    console.print(f"  {run.url if run.is_local else run.root}/logs/", highlight=False)  # of a URL, they lie here
    console.print(f"serve it:  ctd serve --run {shlex.quote(run.url)}", highlight=False, soft_wrap=True)


def show_examples(run: Run, users: int) -> None:
    """For some users: the end of their history, what the LLM says, and ten titles."""
    from ctd_scale.recommender import Recommender

    recommender = Recommender(run)
    log, titles = recommender.log, recommender.catalogue.titles
    chosen = log.split_users()[:users]
    histories = [log.full_history(int(user)) for user in chosen]
    answers = recommender.recommend(histories, 10, explain=True)
    for user, history, answer in zip(chosen, histories, answers, strict=True):
        console.rule(f"user {log.user_ids[user]}", align="left")
        console.print(
            "chose lately: " + " · ".join(titles[item] for item in history[-5:]), highlight=False, markup=False
        )
        console.print(f"the LLM says: {answer.text}", highlight=False, markup=False)
        for place, item in enumerate(answer.items, start=1):
            console.print(f"{place:3}. {titles[item]}", highlight=False, markup=False)


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point: an error that a user can mend is one message and exit status 2, never a traceback."""
    environment.set_defaults()
    try:
        with interruptible():
            app(args=list(arguments) if arguments is not None else None, prog_name="ctd")
    except SystemExit as end:
        if end.code not in (INTERRUPTED, signal.SIGTERM):  # the latter is Ray's, while it starts
            raise
        print(INTERRUPTION, file=sys.stderr)
        sys.exit(INTERRUPTED)
    except (ValueError, TrainingError, ServingError, OSError, ImportError) as error:
        full = os.strerror(errno.ENOSPC) in str(error)  # here, or on a worker
        hint = "; free some space and give the same command again: what is published stays" if full else ""
        print(f"error: {error}{hint}", file=sys.stderr)
        sys.exit(1 if isinstance(error, RuntimeError) else 2)


def run_job(stage: str) -> None:
    """Entry point of `python -m jobs.<stage>`: the stage's name comes from the job."""
    main(["train", stage, *sys.argv[1:]])
