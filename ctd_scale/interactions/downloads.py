"""Software, Beauty and Last.fm, fetched from the public repository of DeftRec and rewritten as Parquet."""

from __future__ import annotations

import csv
import html
import shutil
import urllib.request
import uuid
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa

from ctd_scale.batches import write_table
from ctd_scale.interactions.schema import BadInputError

DOWNLOAD = "https://raw.githubusercontent.com/Quhaoh233/DeftRec/f29f02a810f690419ad79668addf0ae3fdc0370a/data"
DOWNLOADED_FILES = ("test.txt", "user_list.txt", "item_list.txt")
# users, items, interactions: a download that differs is not the published set.
DOWNLOADED_SIZES = {
    "software": (1_351, 778, 9_322),
    "beauty": (22_363, 12_101, 198_502),
    "lastfm": (1_091, 3_685, 52_670),
}


def download(name: str, folder: Path) -> None:
    """Fetch a published set and write it to `folder` as interactions.parquet and items.parquet.

    Raises OSError (no network, no such file) and BadInputError (not the published set).
    """
    aside = folder.with_name(f".{folder.name}-{uuid.uuid4().hex[:8]}")
    aside.mkdir(parents=True)
    try:
        for file in DOWNLOADED_FILES:
            with (
                urllib.request.urlopen(f"{DOWNLOAD}/{name}/{file}", timeout=30) as remote,
                (aside / file).open("wb") as out,
            ):
                shutil.copyfileobj(remote, out)
        try:
            sizes = convert(aside)
        except (KeyError, UnicodeDecodeError):
            sizes = (0, 0, 0)
        if sizes != DOWNLOADED_SIZES[name]:
            raise BadInputError(
                f"{DOWNLOAD}/{name} has (users, items, interactions) = {sizes}, expected "
                f"{DOWNLOADED_SIZES[name]}; give a data directory with --data-dir DIR instead"
            )
        shutil.rmtree(folder, ignore_errors=True)
        aside.rename(folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def convert(folder: Path) -> tuple[int, int, int]:
    """Write interactions.parquet and items.parquet next to the downloads; (users, items, interactions).

    `test.txt` has a line per user: its number, then the numbers of all its items, oldest first. The lists
    give the ids (`org_id`) of the numbers (`remap_id`), separated by blanks and quoted.
    """
    users = {entry["remap_id"]: entry["org_id"] for entry in _listed(folder / "user_list.txt")}
    items = {entry["remap_id"]: entry for entry in _listed(folder / "item_list.txt")}
    columns: dict[str, list[str | int]] = {"user_id": [], "item_id": [], "position": []}
    for line in (folder / "test.txt").read_text(encoding="utf-8").splitlines():
        user, *history = line.split()
        columns["user_id"] += [users[user]] * len(history)
        columns["item_id"] += [items[item]["org_id"] for item in history]
        columns["position"] += range(len(history))
    catalogue = {
        "item_id": [entry["org_id"] for entry in items.values()],
        "title": [_plain(entry["title"]) for entry in items.values()],
        "category": [_plain(entry.get("category") or "").removeprefix("by ") for entry in items.values()],
    }
    write_table(pa.table(columns), folder / "interactions.parquet")
    write_table(pa.table(catalogue), folder / "items.parquet")
    return len(users), len(items), len(columns["user_id"])


def _listed(path: Path) -> Iterator[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        yield from csv.DictReader(file, delimiter=" ")


def _plain(text: str) -> str:
    return " ".join(html.unescape(text).split())
