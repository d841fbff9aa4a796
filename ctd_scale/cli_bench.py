"""`ctd bench`: measure."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Annotated

import typer

from ctd_scale.artifacts import Run
from ctd_scale.cli_options import DataDirOption, RunOption, SetOption, StorageOption
from ctd_scale.terminal import console

bench = typer.Typer(help="Measure.", no_args_is_help=True)


def _listed(names: str) -> list[str]:
    return [name.strip() for name in names.split(",") if name.strip()]


def _once(names: str) -> list[str]:
    return list(dict.fromkeys(_listed(names)))


def _said(overrides: list[str] | None) -> str:
    """The options as they are typed."""
    return "".join(f" --set {shlex.quote(override)}" for override in overrides or ())


def _writable(out: Path | None) -> None:
    """Refuse, before anything is measured for it, a file that could not be written."""
    if out is not None and (out.is_dir() or not out.absolute().parent.is_dir()):
        raise ValueError(f"--json {out}: expected the name of a file in a folder that exists")


def _overrides(given: list[str] | None, data_dir: str | None) -> list[str]:
    return [*(given or ()), *([f"interactions.data_dir={json.dumps(data_dir)}"] if data_dir else [])]


@bench.command()
def quality(
    data: Annotated[list[str], typer.Option("--data", "-d", help="shipped config of a set, or TOML file; repeatable")],
    models: Annotated[str, typer.Option(help="names, separated by commas")] = "popularity,item_knn,bpr_mf,lightgcn,"
    "sasrec,bsarec,preference,full",
    seeds: Annotated[int, typer.Option(min=1, help="how many, from 0")] = 3,
    reference: Annotated[str, typer.Option(help="what the others are compared with; default: validation's best")] = "",
    storage: StorageOption = "runs/quality",
    data_dir: DataDirOption = None,
    out: Annotated[Path, typer.Option(help="Markdown; .json and .png go beside it")] = Path("quality.md"),
    overrides: SetOption = None,
) -> None:
    """Train and rank any models over seeds, into one table; goes on where it was interrupted."""
    from ctd_scale.quality import as_json, compare, require_comparable
    from ctd_scale.quality_report import require_target, show, write_quality

    require_target(out)
    chosen = _overrides(overrides, data_dir)
    names = _once(models)
    require_comparable(data, names, range(seeds), chosen, reference)
    for dataset in data:
        rows = as_json(compare(dataset, names, range(seeds), storage, chosen, reference))
        show(rows)
        said = (f" --reference {reference}" if reference else "") + _said(overrides)
        name = shlex.quote(Path(dataset).name)
        command = f"ctd bench quality --data {name} --models {','.join(names)} --seeds {seeds}{said}"
        write_quality(rows, out, command)
    console.print(f"written: {out}", highlight=False)


@bench.command()
def ablation(
    data: Annotated[str, typer.Option("--data", "-d", help="shipped config of a set, or TOML file")],
    without: Annotated[str, typer.Option(help="names, separated by commas; default: all")] = "",
    models: Annotated[str, typer.Option(help="of the chain, separated by commas")] = "preference,draws,error,"
    "fused_both,full",
    seeds: Annotated[int, typer.Option(min=1, help="how many, from 0")] = 1,
    storage: StorageOption = "runs/quality",
    data_dir: DataDirOption = None,
    out: Annotated[Path, typer.Option(help="Markdown; .json and .png go beside it")] = Path("ablation.md"),
    overrides: SetOption = None,
) -> None:
    """Train and rank the chain with one of its parts left out or exchanged; goes on where it was interrupted."""
    from ctd_scale.ablation import ABLATIONS, ablate
    from ctd_scale.quality import as_json
    from ctd_scale.quality_report import require_target, show, write_quality

    require_target(out)
    chosen = _overrides(overrides, data_dir)
    parts = _once(without) or list(ABLATIONS)
    names = _once(models)
    rows = as_json(ablate(data, parts, names, range(seeds), storage, chosen))
    show(rows)
    about = f"--data {shlex.quote(Path(data).name)} --without {','.join(parts)} --models {','.join(names)}"
    command = f"ctd bench ablation {about} --seeds {seeds}{_said(overrides)}"
    write_quality(rows, out, command, "Ablations")
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
        str, typer.Option("--swap", help="a run that takes its place, and gives it back, while it is asked")
    ] = "",
    rest: Annotated[float, typer.Option(help="seconds of silence at the end, while replicas may go")] = 0.0,
    out: Annotated[Path | None, typer.Option("--json", help="where everything measured is written")] = None,
    overrides: SetOption = None,
) -> None:
    """Serve a run, let more and more clients ask, and say how many answers there were in how much time."""
    from ctd_scale.artifacts import write_text
    from ctd_scale.serving.load import as_json, measure_load, show_load

    levels = [int(count) if count.isdecimal() else 0 for count in _listed(clients)]
    if not levels or min(levels) < 1 or seconds <= 0 or users < 1:
        raise ValueError(f"--clients {clients} --seconds {seconds} --users {users}: expected numbers above 0")
    _writable(out)
    opened = Run.open(run)
    most = opened.read_config(overrides or ()).serving.max_k
    if not 1 <= k <= most:
        raise ValueError(f"--k {k}: expected 1 to serving.max_k={most}")
    other = Run.open(swap_to) if swap_to else None
    load = measure_load(opened, opened.read_config(overrides or ()), levels, seconds, users, k, explain, other, rest)
    show_load(load)
    if out is not None:
        further = (" --explain" if explain else "") + (" --swap OTHER" if swap_to else "") + f" --rest {rest:g}"
        about = f"--clients {clients} --seconds {seconds:g} --users {users} --k {k}{further}"
        command = f"ctd bench serve --run RUN {about}{_said(overrides)}"
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
    _writable(out)
    opened = Run.open(run)
    rows = measure_latency(opened, opened.read_config(overrides or ()), users)
    show_rows(rows)
    if out is not None:
        command = f"ctd bench latency --users {users}{_said(overrides)}"
        write_text(out, json.dumps(as_json(rows, users, command), indent=1) + "\n")
