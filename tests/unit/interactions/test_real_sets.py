"""The ready-made real sets, read and checked without Ray: their published sizes, no row refused."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest

from ctd_scale.config import InteractionsConfig
from ctd_scale.interactions.checking import check_piece, read_catalogue
from ctd_scale.interactions.parts import add_parts
from ctd_scale.interactions.reading import pieces_of
from ctd_scale.interactions.schema import clean_titles
from ctd_scale.interactions.sequences import Sequences, build_sequences
from ctd_scale.interactions.sources import FOLDERS, find_source, resolve_columns

DATA = Path(os.environ.get("CTD_DATA_DIR") or Path(__file__).parents[4] / "shared" / "data")


def sequences(config: InteractionsConfig, folder: Path) -> Sequences:
    source = find_source(config)
    columns = resolve_columns(source)
    items = read_catalogue(source.items, {name: columns[name] for name in ("item", "title", "category")})
    catalogue, _, missing = clean_titles(items, config.max_title_chars)
    known = catalogue["item_id"].combine_chunks()
    tables = [table for piece in pieces_of(source.interactions) for table in check_piece(piece, columns, known)]
    rows = add_parts(pa.concat_tables(tables), num_parts=1)
    assert pc.all(pc.is_null(rows["reason"])).as_py()
    assert pc.all(pc.is_null(items["reason"])).as_py()
    assert missing == 0
    return build_sequences([rows], catalogue, folder)


@pytest.mark.parametrize(
    ("name", "users", "items", "interactions"),
    [("lastfm", 1_091, 3_685, 52_670), ("software", 1_351, 778, 9_322), ("beauty", 22_363, 12_101, 198_502)],
)
def test_sizes_and_order(tmp_path: Path, name: str, users: int, items: int, interactions: int) -> None:
    if not (DATA / FOLDERS[name]).is_dir():
        pytest.skip(f"{name} is not in the data directory")
    log = sequences(InteractionsConfig.model_validate({"dataset": name, "data_dir": str(DATA)}), tmp_path).log
    assert (log.num_users, log.num_items, len(log.items)) == (users, items, interactions)
    assert len(log.split_users()) == users


def test_last_item_is_in_the_history_of_245_software_users(tmp_path: Path) -> None:
    if not (DATA / FOLDERS["software"]).is_dir():
        pytest.skip("software is not in the data directory")
    log = sequences(InteractionsConfig(dataset="software", data_dir=str(DATA)), tmp_path).log
    users = log.split_users()
    repeats = [
        target in log.history(int(user), "test") for user, target in zip(users, log.targets(users, "test"), strict=True)
    ]
    assert sum(repeats) == 245


@pytest.mark.skipif(importlib.util.find_spec("recbole") is None, reason="the recbole wheel brings the data")
def test_movielens_from_its_wheel(tmp_path: Path) -> None:
    made = sequences(InteractionsConfig(dataset="ml-100k"), tmp_path)
    log = made.log
    assert (log.num_users, log.num_items, len(log.items)) == (943, 1_682, 100_000)
    assert log.catalogue.titles[:2] == ["Toy Story", "GoldenEye"]
    assert log.catalogue.categories[0] == "Animation Children's Comedy"
    assert int(np.diff(log.offsets).min()) >= 20
