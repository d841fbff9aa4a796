"""`ctd index`: change the catalogue of a run, also while it is served."""

from __future__ import annotations

from typing import Annotated

import typer

from ctd_scale.artifacts import Run
from ctd_scale.cli_options import RunOption
from ctd_scale.terminal import console

index = typer.Typer(help="Change the catalogue of a run, also while it is served.", no_args_is_help=True)


@index.command()
def upsert(
    run: RunOption,
    items: Annotated[str, typer.Option(help="file, folder, glob or URL with item_id, title, category and the numbers")],
) -> None:
    """Put items in, or give those that are there another title, category and numbers. What serves the run follows at
    once."""
    from ctd_scale.changes import read_whole_items
    from ctd_scale.changes import upsert as put_in

    opened = Run.open(run)
    rows = read_whole_items(opened, items, opened.read_config().interactions)
    console.print(put_in(opened, rows).summary, highlight=False)


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


@index.command()
def prune(
    run: RunOption,
    keep: Annotated[int, typer.Option(min=0, help="how many of the latest versions stay")] = 10,
) -> None:
    """Remove old versions of the catalogue; the one in force and its index stay."""
    from ctd_scale.changes import prune as remove_old

    gone = remove_old(Run.open(run), keep)
    console.print(f"removed {len(gone):,} versions{': ' if gone else ''}{', '.join(map(str, gone))}", highlight=False)


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
