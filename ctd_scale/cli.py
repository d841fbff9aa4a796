"""`ctd`: the command line. Every option that is not about where things lie is a config key (`--set`)."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from ctd_scale.artifacts import Run
from ctd_scale.config import RunConfig, load_config
from ctd_scale.training import TrainingError, console

app = typer.Typer(
    help="Generative recommendation with continuous-token diffusion.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)

bench = typer.Typer(help="Measure.", no_args_is_help=True)
app.add_typer(bench, name="bench")
index = typer.Typer(help="Change the catalogue of a run, also while it is served.", no_args_is_help=True)
app.add_typer(index, name="index")

ConfigOption = Annotated[str, typer.Option("--config", "-c", help="TOML file, or a shipped name such as ml100k")]
StorageOption = Annotated[str, typer.Option(help="folder or fsspec URL that holds the runs")]
NameOption = Annotated[str, typer.Option(help="the run's name within the storage")]
SetOption = Annotated[list[str] | None, typer.Option("--set", help="stage.key=value, repeatable")]
DatasetOption = Annotated[str | None, typer.Option(help="ready-made set: ml-100k, software, beauty, lastfm")]
DataDirOption = Annotated[str | None, typer.Option(help="folder of the ready-made sets (env CTD_DATA_DIR)")]
InteractionsOption = Annotated[str | None, typer.Option(help="your log: Parquet, CSV or JSONL")]
ItemsOption = Annotated[str | None, typer.Option(help="your catalogue: Parquet, CSV or JSONL")]
RunOption = Annotated[str, typer.Option("--run", help="folder or URL of a finished run")]

STAGE_ALIASES = {
    "interactions": "prepare_interactions",
    "preferences": "export_preferences",
    "index": "build_index",
    "ranking": "calibrate_ranking",
}


def configured(
    config: str | None,
    overrides: Sequence[str] | None,
    dataset: str | None,
    data_dir: str | None,
    interactions: str | None,
    items: str | None,
) -> RunConfig:
    """The config file with the command line on top of it."""
    sources = {"data_dir": data_dir, "interactions": interactions, "items": items}
    chosen = [f"interactions.{key}={json.dumps(value)}" for key, value in sources.items() if value is not None]
    if dataset is not None:
        chosen.append(f"interactions.dataset={dataset}")
    elif interactions is not None or items is not None:
        chosen.append("interactions.dataset=files")
    return load_config(config, [*chosen, *(overrides or ())])


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
    name: NameOption = "quickstart",
    config: ConfigOption = "quickstart",
    data_dir: DataDirOption = None,
    overrides: SetOption = None,
) -> None:
    """The whole chain on MovieLens-100k, and what it recommends to three users."""
    settings = configured(config, overrides, None, data_dir, None, None)
    run = Run(storage, name)
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
    """Run or resume one stage; what it reads must be published."""
    from ctd_scale.pipeline import run_stage, stage_named

    settings = configured(config, overrides, dataset, data_dir, interactions, items)
    run = Run(storage, name or Path(config).stem)
    run.write_config(settings)
    run_stage(stage_named(STAGE_ALIASES.get(stage, stage)), run, settings)


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
    """Rank the withheld items of a run again and print the table."""
    from ctd_scale.evaluate import print_report, read_reports
    from ctd_scale.pipeline import run_stage, stage_named

    opened = Run.open(run)
    settings = opened.read_config(overrides or ())
    run_stage(stage_named("calibrate_ranking"), opened, settings)
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
    from ctd_scale.recommender import BaselineRecommender, Recommender
    from ctd_scale.serving.schema import Directory, read_range, response_object

    if k < 1:
        raise ValueError(f"--k {k}: expected at least 1")
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
            ranges=dict(map(read_range, within or ())),
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
    port: Annotated[int | None, typer.Option(help="default: serving.port, 8000; 0 = any free one")] = None,
    overrides: SetOption = None,
) -> None:
    """Serve a run over HTTP: POST /v1/recommend, GET /healthz, /docs. SIGHUP: serve what --run leads to by then."""
    from ctd_scale.serving.app import serve_run

    def open_run() -> tuple[Run, RunConfig]:
        opened = Run.open(run)
        return opened, opened.read_config(overrides or ())

    serving = open_run()[1].serving
    serve_run(open_run, host=serving.host if host is None else host, port=serving.port if port is None else port)


@index.command()
def upsert(
    run: RunOption,
    items: Annotated[str, typer.Option(help="file, folder, glob or URL with item_id, title, category")],
) -> None:
    """Put items in, or give those that are there another title and category. What serves the run follows at once."""
    from ctd_scale.changes import read_items
    from ctd_scale.changes import upsert as put_in

    opened = Run.open(run)
    console.print(put_in(opened, read_items(items, opened.read_config().interactions)).summary, highlight=False)


@index.command()
def delete(
    run: RunOption,
    item: Annotated[list[str] | None, typer.Option(help="an item id; repeatable")] = None,
    items: Annotated[str, typer.Option(help="file, folder, glob or URL with item_id")] = "",
) -> None:
    """Take items out: they are never recommended again. Histories may still name them."""
    from ctd_scale.changes import delete as take_out
    from ctd_scale.changes import read_items

    opened = Run.open(run)
    gone = list(item or [])
    if items:
        gone += read_items(items, opened.read_config().interactions)["item_id"].to_pylist()
    if not gone:
        raise ValueError("nothing to take out: give --item ID or --items FILE")
    console.print(take_out(opened, gone).summary, highlight=False)


@index.command()
def rebuild(run: RunOption) -> None:
    """Build the index of the catalogue as it is now: after many changes, or when words have come to mean other things.
    What serves the run goes on with the index that it has until the new one is there."""
    from ctd_scale.live import rebuild_index
    from ctd_scale.recommender import load_artifacts

    opened = Run.open(run)
    changes = rebuild_index(opened, load_artifacts(opened), opened.read_config())
    console.print(f"{changes.summary}, in an index of its own", highlight=False)


@index.command()
def rollback(
    run: RunOption,
    to: Annotated[int | None, typer.Option(help="a version; 0: as the run was made; default: the one before")] = None,
) -> None:
    """Put an earlier version of the catalogue in force again."""
    from ctd_scale.changes import roll_back

    console.print(roll_back(Run.open(run), to).summary, highlight=False)


@index.command("versions")
def list_versions(run: RunOption) -> None:
    """The versions of the catalogue, and the one in force."""
    from ctd_scale.changes import in_force, versions

    opened = Run.open(run)
    current, _ = in_force(opened)
    lines = [{"version": 0, "based_on": 0, "said": "as the run was made"}, *versions(opened)]
    for facts in lines:
        mark = "*" if facts["version"] == current else " "
        console.print(f"{mark} {facts['version']:4}  from {facts['based_on']:4}  {facts['said']}", highlight=False)


@bench.command()
def quality(
    data: Annotated[list[str], typer.Option("--data", "-d", help="shipped config of a set, or TOML file; repeatable")],
    models: Annotated[str, typer.Option(help="names, separated by commas")] = "popularity,item_knn,bpr_mf,lightgcn,"
    "sasrec,bsarec,preference,full",
    seeds: Annotated[int, typer.Option(help="how many, from 0")] = 3,
    reference: Annotated[str, typer.Option(help="what the others are compared with; default: validation's best")] = "",
    storage: StorageOption = "runs/quality",
    data_dir: DataDirOption = None,
    out: Annotated[Path, typer.Option(help="Markdown; .json and .png go beside it")] = Path("quality.md"),
    overrides: SetOption = None,
) -> None:
    """Train and rank any models over seeds, into one table; goes on where it was interrupted."""
    from ctd_scale.quality import as_json, compare
    from ctd_scale.quality_report import show, write_quality

    chosen = [*(overrides or ()), *([f"interactions.data_dir={json.dumps(data_dir)}"] if data_dir else [])]
    names = [name.strip() for name in models.split(",") if name.strip()]
    for dataset in data:
        rows = as_json(compare(dataset, names, range(seeds), storage, chosen, reference))
        show(rows)
        said = "".join(f" --set {override}" for override in overrides or ())
        command = f"ctd bench quality --data {Path(dataset).stem} --models {','.join(names)} --seeds {seeds}{said}"
        write_quality(rows, out, command)
    console.print(f"written: {out}", highlight=False)


@bench.command("serve")
def bench_serve(
    run: RunOption,
    clients: Annotated[str, typer.Option(help="how many ask at once, one level after the other")] = "1,2,4,8",
    seconds: Annotated[float, typer.Option(help="of each level")] = 10.0,
    users: Annotated[int, typer.Option(help="of the log, asked for in turn; each was asked for once before")] = 100,
    k: Annotated[int, typer.Option(help="how many items")] = 10,
    explain: Annotated[bool, typer.Option(help="let the LLM write a text for every request")] = False,
    swap_to: Annotated[
        str, typer.Option("--swap", help="a run that takes its place while the last level goes on")
    ] = "",
    rest: Annotated[float, typer.Option(help="seconds of silence at the end, while replicas may go")] = 0.0,
    out: Annotated[Path | None, typer.Option("--json", help="where everything measured is written")] = None,
    overrides: SetOption = None,
) -> None:
    """Serve a run, let more and more clients ask, and say how many answers there were in how much time."""
    from ctd_scale.artifacts import write_text
    from ctd_scale.serving.load import as_json, measure_load, show_load

    levels = [int(count) for count in clients.split(",")]
    if min(levels) < 1 or seconds <= 0 or users < 1:
        raise ValueError(f"--clients {clients} --seconds {seconds} --users {users}: expected numbers above 0")
    opened = Run.open(run)
    other = Run.open(swap_to) if swap_to else None
    load = measure_load(opened, opened.read_config(overrides or ()), levels, seconds, users, k, explain, other, rest)
    show_load(load)
    if out is not None:
        said = "".join(f" --set {override}" for override in overrides or ())
        command = f"ctd bench serve --clients {clients} --seconds {seconds:g} --users {users}{said}"
        write_text(out, json.dumps(as_json(load, command), indent=1) + "\n")


@bench.command("latency")
def bench_latency(
    run: RunOption,
    users: Annotated[int, typer.Option(help="validation users, one request of each for every row")] = 500,
    out: Annotated[Path | None, typer.Option("--json", help="where everything measured is written too")] = None,
    overrides: SetOption = None,
) -> None:
    """Measure what cheaper settings cost and save, for serving.target_p99_ms to choose from."""
    from ctd_scale.artifacts import write_text
    from ctd_scale.latency import as_json, measure_latency, show_rows

    if users < 1:
        raise ValueError(f"--users {users}: expected at least 1")
    opened = Run.open(run)
    rows = measure_latency(opened, opened.read_config(overrides or ()), users)
    show_rows(rows)
    if out is not None:
        said = "".join(f" --set {override}" for override in overrides or ())
        write_text(out, json.dumps(as_json(rows, users, f"ctd bench latency --users {users}{said}"), indent=1) + "\n")


@app.command()
def data(
    storage: StorageOption = "runs",
    name: NameOption = "data",
    dataset: DatasetOption = None,
    data_dir: DataDirOption = None,
    interactions: InteractionsOption = None,
    items: ItemsOption = None,
    overrides: SetOption = None,
) -> None:
    """Read, check and split a log without training anything: bad rows are named and quarantined."""
    from ctd_scale.pipeline import run_stage, stage_named

    if dataset is None and interactions is None and items is None:
        dataset = "ml-100k"
    settings = configured(None, overrides, dataset, data_dir, interactions, items)
    run = Run(storage, name)
    run.write_config(settings)
    run_stage(stage_named("prepare_interactions"), run, settings)
    facts = run.fetch("interactions").manifest["facts"]
    console.print_json(json.dumps(facts))


def _run_all(run: Run, settings: RunConfig) -> None:
    from ctd_scale.evaluate import print_report, read_reports
    from ctd_scale.pipeline import run_pipeline

    console.print(f"run [bold]{run.url}[/], seed {settings.seed}", highlight=False)
    run_pipeline(run, settings)
    for report in read_reports(run):
        print_report(report)
    for name in ("run.toml", "metrics/", "models/", "embeddings/", "tokens/", "index/", "logs/"):
        console.print(f"  {run.url}/{name}", highlight=False)
    console.print(f"serve it:  ctd serve --run {run.url}", highlight=False)


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
    try:
        app(args=list(arguments) if arguments is not None else None, prog_name="ctd")
    except (ValueError, TrainingError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2 if isinstance(error, ValueError) else 1)


def run_job(stage: str) -> None:
    """Entry point of `python -m jobs.<stage>`: the stage's name comes from the job."""
    main(["train", stage, *sys.argv[1:]])
