"""Where raw files come from, which columns they must have, and the conversion of a download."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ctd_scale.config import InteractionsConfig
from ctd_scale.interactions import downloads, sources
from ctd_scale.interactions.quarantine import label_paths
from ctd_scale.interactions.schema import BadInputError
from ctd_scale.interactions.sources import RawSource, find_source, resolve_columns

LOG = "user_id,item_id,timestamp,position\n1,a,5,0\n"
ITEMS = "item_id,title\na,A\n"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.delenv("CTD_DATA_DIR", raising=False)
    monkeypatch.setenv("CTD_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(downloads, "DOWNLOAD", f"file://{tmp_path}/remote")
    (tmp_path / "log.csv").write_text(LOG)
    (tmp_path / "items.csv").write_text(ITEMS)
    return tmp_path


def config(folder: Path, **changes: str) -> InteractionsConfig:
    paths = {"interactions": f"{folder}/log.csv", "items": f"{folder}/items.csv"}
    return InteractionsConfig.model_validate({**paths, **changes})


def test_own_files_and_their_columns(folder: Path) -> None:
    source = find_source(config(folder))
    assert source == RawSource((f"{folder}/log.csv",), (f"{folder}/items.csv",))
    assert resolve_columns(source) == {
        "user": "user_id",
        "item": "item_id",
        "order": "timestamp",  # before position, which is there too
        "rating": "rating",
        "title": "title",
        "category": "category",
    }
    assert resolve_columns(find_source(config(folder, order_column="position")))["order"] == "position"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"interactions": ""}, r"interactions\.interactions is empty: .*--interactions PATH.*--dataset"),
        ({"items": ""}, r"interactions\.items is empty: .*--items PATH"),
        ({"interactions": "nowhere.csv"}, r"interactions\.interactions='nowhere\.csv': no such file"),
        (
            {"user_column": "who"},
            r"/log\.csv has no column 'who'; its columns: 'user_id', 'item_id', 'timestamp', ",
        ),
        ({"user_column": "who"}, r"set interactions\.user_column to"),
        ({"item_column": "what"}, r"/log\.csv has no column 'what'.*interactions\.item_column"),
        ({"order_column": "when"}, r"/log\.csv has no column 'when'.*interactions\.order_column"),
        ({"title_column": "name"}, r"/items\.csv has no column 'name'.*interactions\.title_column"),
        ({"category_column": "kind"}, r"/items\.csv has no column 'kind'.*interactions\.category_column"),
    ],
)
def test_messages_name_the_file_the_column_and_the_key(folder: Path, changes: dict[str, str], message: str) -> None:
    with pytest.raises(BadInputError, match=message):
        resolve_columns(find_source(config(folder, **changes)))


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
@pytest.mark.parametrize(("file", "column"), [("log", "item_id"), ("log", "rating"), ("items", "category")])
def test_a_column_that_is_there_twice_is_refused(folder: Path, suffix: str, file: str, column: str) -> None:
    names = ["user_id", "item_id", "timestamp", "title", "rating", "category", column]
    path = folder / f"{file}.{suffix}"
    if suffix == "csv":
        path.write_text(",".join(names) + "\n" + ",".join("1" * len(names)) + "\n")
    else:
        pq.write_table(pa.table([["1"]] * len(names), names=names), path)
    changes = {"interactions" if file == "log" else "items": str(path)}
    with pytest.raises(BadInputError, match=rf"/{file}\.{suffix} has 2 columns '{column}'; rename all but one"):
        resolve_columns(find_source(config(folder, **changes)))


def test_numbers_of_the_items_are_columns_of_the_catalogue(folder: Path) -> None:
    (folder / "items.csv").write_text("item_id,title,price\na,A,5\n")
    asked = config(folder).model_copy(update={"attribute_columns": ("price",)})
    source = find_source(asked)
    assert source.attributes == {"attribute:price": "price"}
    assert "attribute:price" not in resolve_columns(source), "the log has none"
    with pytest.raises(BadInputError, match=r"/items\.csv has no column 'prize'.*interactions\.attribute_columns"):
        resolve_columns(find_source(asked.model_copy(update={"attribute_columns": ("prize",)})))


def test_a_log_without_any_time_is_refused(folder: Path) -> None:
    (folder / "log.csv").write_text("user_id,item_id,when\n1,a,5\n")
    with pytest.raises(BadInputError, match=r"neither a column 'timestamp' nor 'position'.*interactions\.order_column"):
        resolve_columns(find_source(config(folder)))


def test_every_file_of_a_folder_needs_the_columns(folder: Path) -> None:
    (folder / "logs").mkdir()
    (folder / "logs" / "1.csv").write_text(LOG)
    (folder / "logs" / "2.csv").write_text("user_id,item_id\n1,a\n")
    with pytest.raises(BadInputError, match=r"/2\.csv has no column 'timestamp'"):
        resolve_columns(find_source(config(folder, interactions=f"{folder}/logs")))


def test_data_directory_from_config_or_environment(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "lastfm").mkdir()
    for name in ("interactions", "items"):
        (folder / "lastfm" / f"{name}.parquet").touch()
    expected = RawSource(
        (f"{folder}/lastfm/interactions.parquet",),
        (f"{folder}/lastfm/items.parquet",),
    )
    assert find_source(InteractionsConfig(dataset="lastfm", data_dir=str(folder))) == expected
    monkeypatch.setenv("CTD_DATA_DIR", str(folder))
    assert find_source(InteractionsConfig(dataset="lastfm")) == expected
    monkeypatch.chdir(folder.parent)
    assert find_source(InteractionsConfig(dataset="lastfm", data_dir=folder.name)) == expected
    with pytest.raises(BadInputError, match=r"CTD_DATA_DIR='.*' does not hold beauty: amazon_beauty/interactions"):
        find_source(InteractionsConfig(dataset="beauty"))


def test_movielens_without_its_wheel_names_the_wheel(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(BadInputError, match=r"pip install --no-deps recbole==1\.2\.1.*--data-dir"):
        find_source(InteractionsConfig(dataset="ml-100k"))


def publish(folder: Path) -> None:
    remote = folder / "remote" / "software"
    remote.mkdir(parents=True)
    (remote / "user_list.txt").write_text("org_id remap_id\nU1 0\nU2 1\n")
    (remote / "item_list.txt").write_text(
        "org_id remap_id title category\n"
        'B1 0 "Tax &amp; Home 2011 [Old Version]" Intuit\n'
        'B2 1 " Pro X2 [Old Version]""" "by\n    \n    Corel"\n'
        "B3 2 Office \n",
        encoding="utf-8",
    )
    (remote / "test.txt").write_text("0 0 1 1 2\n1 2 0\n")


def test_a_download_is_converted_once_and_kept(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    publish(folder)
    monkeypatch.setitem(downloads.DOWNLOADED_SIZES, "software", (2, 3, 6))
    source = find_source(InteractionsConfig(dataset="software"))
    assert source.interactions == (f"{folder}/cache/data/amazon_software/interactions.parquet",)
    log = pq.read_table(source.interactions[0]).to_pylist()
    assert [tuple(row.values()) for row in log] == [
        ("U1", "B1", 0),
        ("U1", "B2", 1),
        ("U1", "B2", 2),
        ("U1", "B3", 3),
        ("U2", "B3", 0),
        ("U2", "B1", 1),
    ]
    assert pq.read_table(source.items[0]).to_pylist() == [
        {"item_id": "B1", "title": "Tax & Home 2011 [Old Version]", "category": "Intuit"},
        {"item_id": "B2", "title": 'Pro X2 [Old Version]"', "category": "Corel"},
        {"item_id": "B3", "title": "Office", "category": ""},
    ]
    monkeypatch.setattr(sources, "download", None)  # not called again
    assert find_source(InteractionsConfig(dataset="software")) == source


def test_a_download_that_is_not_the_published_set_is_refused(folder: Path) -> None:
    publish(folder)
    with pytest.raises(BadInputError, match=r"\(2, 3, 6\), expected \(1351, 778, 9322\); give a data directory"):
        find_source(InteractionsConfig(dataset="software"))
    (folder / "remote" / "software" / "test.txt").write_text("<html> not found\n")
    with pytest.raises(BadInputError, match=r"\(0, 0, 0\), expected"):
        find_source(InteractionsConfig(dataset="software"))
    assert not list((folder / "cache" / "data").iterdir())


def test_no_network_names_the_folder_to_give(folder: Path) -> None:
    with pytest.raises(
        BadInputError, match=r"dataset lastfm cannot be downloaded.*lastfm/items\.parquet with --data-dir"
    ):
        find_source(InteractionsConfig(dataset="lastfm"))


def test_labels_tell_files_apart() -> None:
    assert label_paths(["/data/log.csv"]) == ["log.csv"]
    assert label_paths(["/data/a.csv", "/data/b.csv"]) == ["a.csv", "b.csv"]
    assert label_paths(["/data/x/log.csv", "/data/y/log.csv"]) == ["x/log.csv", "y/log.csv"]
    assert label_paths(["s3://bucket/log.csv", "/data/log.csv"]) == ["s3://bucket/log.csv", "/data/log.csv"]
