"""What was put into the catalogue of a run, altered and taken out after the run was made.

`changes/000001/`, `changes/000002/`, ...: a version each, published once and never changed. Each says all that differs
from the catalogue of `interactions`, by item id, so that it also holds over models that are trained anew.
`changes/current.json` names the one in force; to go back is to write another number there.
"""

from __future__ import annotations

import fcntl
import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.compute as pc

from ctd_scale.artifacts import MANIFEST, NO_LOCKS, Artifact, ArtifactError, Run
from ctd_scale.batches import ITEM_COLUMNS, read_table, write_table
from ctd_scale.config import InteractionsConfig
from ctd_scale.interactions.checking import read_catalogue
from ctd_scale.interactions.quarantine import list_paths
from ctd_scale.interactions.reading import expand
from ctd_scale.interactions.schema import ATTRIBUTE, BadInputError, clean_titles
from ctd_scale.interactions.sources import RawSource, require_item_columns
from ctd_scale.terminal import console

FOLDER, CURRENT, ITEMS = "changes", "changes/current.json", "items.parquet"
SCHEMA = pa.schema(
    [("item_id", pa.string()), ("title", pa.string()), ("category", pa.string()), ("deleted", pa.bool_())]
)
MAX_NAMED = 5


@dataclass(frozen=True)
class Changes:
    """One version: `table` has a row for each item that was ever touched, and a column for each of its numbers. `built`
    is the version that holds an index of its own, 0 where it is the run's."""

    number: int
    table: pa.Table
    digest: str
    built: int = 0
    said: str = "as the run was made"

    @property
    def summary(self) -> str:
        """What it was made for, and how many items it says something of in all."""
        deleted = pc.sum(self.table["deleted"]).as_py() or 0
        in_all = f"{len(self.table) - deleted:,} put in or altered, {deleted:,} taken out since the run was made"
        return f"version {self.number}: {self.said}; {in_all}"


NO_CHANGES = Changes(0, SCHEMA.empty_table(), "")


def in_force(run: Run) -> tuple[int, int]:
    """The version in force (0: nothing was changed), and the latest that was made. Raises ArtifactError: the file that
    says so cannot be read."""
    if not run.exists(CURRENT):
        return 0, 0
    text = run.read_file(CURRENT)
    try:
        said = json.loads(text)
        return int(said["version"]), int(said["latest"])
    except (ValueError, KeyError, TypeError):
        raise ArtifactError(
            f"{run.url}/{CURRENT} holds {text[:40]!r}, expected the number of a folder beside it and that of the last "
            'one, such as {"version": 2, "latest": 3}'
        ) from None


def read_changes(run: Run, number: int | None = None) -> Changes:
    """A version, verified; by default the one in force. Raises ArtifactError: missing or damaged."""
    number = in_force(run)[0] if number is None else number
    if number == 0:
        return NO_CHANGES
    artifact = fetch_version(run, number)
    facts = artifact.manifest["facts"]
    return Changes(number, read_table(artifact.path / ITEMS), artifact.digest, int(facts["built"]), facts["said"])


def fetch_version(run: Run, number: int) -> Artifact:
    """The folder of a version."""
    if run.manifest(_name(number)) is None:
        raise ArtifactError(f"{run.url}/{_name(number)} does not exist; `ctd index versions` lists those that do")
    return run.fetch(_name(number))


def versions(run: Run) -> list[Mapping[str, Any]]:
    """The facts of every version, in their order: version, based_on, built, said."""
    manifests = [run.manifest(_name(number)) for number in range(1, in_force(run)[1] + 1)]
    return [manifest["facts"] for manifest in manifests if manifest is not None]


def read_items(pattern: str, config: InteractionsConfig) -> pa.Table:
    """item_id, title, category and numbers of a file, folder, glob or URL with the columns of the run's catalogue.

    Raises BadInputError where any row is bad: a change is made as a whole or not at all.
    """
    paths = expand(pattern, "--items")
    columns = {"item": config.item_column, "title": config.title_column, "category": config.category_column}
    rows = read_catalogue(paths, {**columns, **{f"{ATTRIBUTE}{name}": name for name in config.attribute_columns}})
    bad = rows.filter(pc.is_valid(rows["reason"]))
    if len(bad):
        first = [f"  {paths[row['file']]}:{row['row']} {row['reason']}" for row in bad.slice(0, MAX_NAMED).to_pylist()]
        raise BadInputError("\n".join([f"{list_paths(paths)}: {len(bad):,} of {len(rows):,} rows are bad", *first]))
    cleaned = clean_titles(rows, config.max_title_chars)[0]
    return cleaned.rename_columns([name.removeprefix(ATTRIBUTE) for name in cleaned.column_names])


def read_whole_items(run: Run, pattern: str, config: InteractionsConfig) -> pa.Table:
    """`read_items` of files that say all that the run's catalogue says of an item: what they left out would be lost.

    Raises BadInputError where a column is missing, of categories too if any item of the run has one.
    """
    category = read_table(run.fetch("interactions").path / ITEMS)["category"]
    attributes = {f"{ATTRIBUTE}{name}": name for name in config.attribute_columns}
    names = {"item": config.item_column, "title": config.title_column, "category": config.category_column}
    source = RawSource((), tuple(expand(pattern, "--items")), attributes=attributes, **names)
    categories = bool(pc.any(pc.not_equal(category, "")).as_py())
    require_item_columns(source, categories=categories, instead="add it, the catalogue of the run has it")
    return read_items(pattern, config)


def upsert(run: Run, items: pa.Table) -> Changes:
    """Put items in, or give those that are there another title, category and numbers."""
    rows = items.append_column("deleted", pa.repeat(pa.scalar(False), len(items)))
    return _change(run, lambda _: rows, f"put in or altered {_items(len(items))}")


def delete(run: Run, item_ids: Sequence[str]) -> Changes:
    """Take items out: they are never recommended. Histories may still name them.

    Raises BadInputError: an item that is not there.
    """
    wanted = list(dict.fromkeys(item_ids))

    def rows(before: Changes) -> pa.Table:
        there = {row["item_id"]: row for row in before.table.to_pylist()}
        missing = pa.array([item_id for item_id in wanted if item_id not in there], pa.string())
        built = read_table(run.fetch("interactions").path / ITEMS)
        found = built.filter(pc.is_in(built["item_id"], missing)).to_pylist() if len(missing) else []
        there.update({row["item_id"]: {**row, "deleted": False} for row in found})
        unknown = [item_id for item_id in wanted if item_id not in there or there[item_id]["deleted"]]
        if unknown:
            named = ", ".join(f"{item_id[:64]!r}" for item_id in unknown[:MAX_NAMED])
            are = "is" if len(unknown) == 1 else "are"
            raise BadInputError(f"{_items(len(unknown))} {are} not in the catalogue, so none was taken out: {named}")
        # Its numbers go with it: nobody can ask for it by them any more.
        kept = [{name: there[item_id][name] for name in ITEM_COLUMNS} for item_id in wanted]
        return pa.Table.from_pylist([{**row, "deleted": True} for row in kept], SCHEMA)

    return _change(run, rows, f"took out {_items(len(wanted))}")


def roll_back(run: Run, to: int | None = None) -> Changes:
    """Put an earlier version (by default the one that the current was made from; 0: none) in force again.

    Raises ArtifactError: there is no such version, or none before.
    """
    with alone(run):
        number, latest = in_force(run)
        if to is None:
            if number == 0:
                raise ArtifactError(f"{run.url} has no version before the one in force; `ctd index versions` lists all")
            to = int(fetch_version(run, number).manifest["facts"]["based_on"])
        found = read_changes(run, to)
        _put_in_force(run, to, latest)
        return found


@contextmanager
def next_version(
    run: Run, before: Changes, table: pa.Table, said: str, inputs: Mapping[str, str], *, with_index: bool
) -> Iterator[Path]:
    """Publish a version and put it in force; yields its folder, for what else belongs to it. Nobody else may change the
    run at the same time: see `alone`."""
    number = in_force(run)[1] + 1
    while run.exists(f"{_name(number)}/{MANIFEST}"):  # what was published stays, also where `current.json` is lost
        number += 1
    facts = {
        "version": number,
        "based_on": before.number,
        "built": number if with_index else before.built,
        "said": said,
    }
    for begun in (run.root / ".staging").glob(f"{FOLDER}-*"):  # of what was killed: nobody else is at work
        shutil.rmtree(begun, ignore_errors=True)
    with run.publish(_name(number), config_hash="", inputs=inputs, facts=facts) as folder:
        write_table(table, folder / ITEMS)
        yield folder
    _put_in_force(run, number, number)


def prune(run: Run, keep: int) -> list[int]:
    """Remove all versions but the latest `keep`, the one in force, and those that hold their indexes; returns what was
    removed. What was made from a version that is gone stays whole."""
    with alone(run):
        number, _ = in_force(run)
        known = {int(facts["version"]): int(facts["built"]) for facts in versions(run)}
        kept = {number, *sorted(known)[max(0, len(known) - keep) :]}
        kept |= {known[each] for each in kept if each in known}
        gone = sorted(set(known) - kept)
        filesystem, base = fsspec.url_to_fs(run.url)
        for each in gone:
            filesystem.rm_file(f"{base}/{_name(each)}/{MANIFEST}")  # it goes first: what follows is not published
            filesystem.rm(f"{base}/{_name(each)}", recursive=True)
        return gone


def _change(run: Run, rows: Callable[[Changes], pa.Table], said: str) -> Changes:
    with alone(run):
        before = read_changes(run)
        made = rows(before)
        kept = before.table.filter(pc.invert(pc.is_in(before.table["item_id"], made["item_id"].combine_chunks())))
        table = pa.concat_tables([kept, made], promote_options="default")
        with next_version(run, before, table, said, {}, with_index=False):
            pass  # its table is all there is
        return read_changes(run)


@contextmanager
def alone(run: Run, doing: str = "") -> Iterator[None]:
    """One change at a time on this machine, or one of those that are `doing` the same; a second one waits. Where the
    file system has no locks, nobody does."""
    folder = run.root / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f".{doing}lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            console.print(f"waiting for another process that changes the catalogue of {run.url}", highlight=False)
            fcntl.flock(lock, fcntl.LOCK_EX)
        except OSError as error:  # better unguarded than not at all
            if error.errno not in NO_LOCKS:
                raise
        yield


def _put_in_force(run: Run, number: int, latest: int) -> None:
    run.write_file(CURRENT, json.dumps({"version": number, "latest": latest}) + "\n")


def _items(number: int) -> str:
    return f"{number:,} item{'s' * (number != 1)}"


def _name(number: int) -> str:
    return f"{FOLDER}/{number:06d}"
