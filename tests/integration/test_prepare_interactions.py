"""Raw files to a published artifact through Ray Data."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest

from ctd_scale.artifacts import Run, file_digest
from ctd_scale.batches import SPLITS, InteractionLog, read_table
from ctd_scale.config import InteractionsConfig
from ctd_scale.interactions.prepare import PrepareReport, prepare_interactions
from ctd_scale.interactions.schema import BadInputError
from ctd_scale.interactions.sketch import sketch_log
from ctd_scale.interactions.sources import input_digests
from ctd_scale.interactions.split import as_date

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("ray_session")]
ITEMS = pa.table({"item_id": [f"i{n}" for n in range(20)], "title": [f"Item {n}" for n in range(20)]})


def good_log(users: int = 100, length: int = 10) -> pa.Table:
    """`users` x `length` rows, shuffled, with a time for each user's n-th item."""
    rng = np.random.default_rng(0)
    user, step = (axis.ravel() for axis in np.meshgrid(range(users), range(length), indexing="ij"))
    shuffle = rng.permutation(users * length)
    columns = {
        "user_id": user[shuffle],
        "item_id": [f"i{n}" for n in rng.integers(20, size=users * length)],
        "timestamp": 1_000_000 + step[shuffle],
    }
    return pa.table(columns)


def spoiled_log(bad: int) -> pa.Table:
    """1,000 rows of which the first `bad` have no user."""
    log = good_log()
    users = [None] * bad + log["user_id"].to_pylist()[bad:]
    return log.set_column(0, "user_id", pa.array(users, pa.int64()))


def write_raw(folder: Path, log: pa.Table, items: pa.Table = ITEMS, suffix: str = ".parquet") -> dict[str, str]:
    """Both files in one format; the config that names them."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = {"interactions": str(folder / f"log{suffix}"), "items": str(folder / f"items{suffix}")}
    for table, path in ((log, paths["interactions"]), (items, paths["items"])):
        if suffix == ".parquet":
            pq.write_table(table, path, row_group_size=300)
        elif suffix == ".csv":
            pyarrow.csv.write_csv(table, path)
        else:
            Path(path).write_text("".join(json.dumps(row) + "\n" for row in table.to_pylist()))
    return paths


def prepare(run: Run, values: dict[str, Any]) -> PrepareReport:
    return prepare_interactions(InteractionsConfig.model_validate(values), run, "hash")


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(str(tmp_path), "run")


def test_every_format_publishes_the_same_log(tmp_path: Path) -> None:
    digests, logs = [], []
    for suffix in (".parquet", ".csv", ".jsonl"):
        run = Run(str(tmp_path), suffix[1:])
        values = write_raw(tmp_path / suffix[1:], spoiled_log(5), suffix=suffix)
        report = prepare(run, values)
        assert report.quarantined == {"missing user_id": 5}
        artifact = run.fetch("interactions")
        files = {name: entry["sha256"] for name, entry in artifact.manifest["files"].items()}
        files.pop("quarantine.parquet")  # names the raw file
        digests.append(files)
        logs.append(InteractionLog.load(artifact.path))
    assert digests[0] == digests[1] == digests[2]
    log = logs[0]
    assert (log.num_users, log.num_items, len(log.items)) == (100, 20, 995)


@pytest.mark.parametrize("duplicates", ["keep", "last"])
def test_many_parts_publish_the_same_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, duplicates: str) -> None:
    values = write_raw(tmp_path, spoiled_log(60)) | {"max_bad_fraction": 0.5, "duplicates": duplicates}
    values |= {"min_user_interactions": 6, "min_item_interactions": 30}
    made = []
    for num_parts in (1, 7):
        monkeypatch.setattr("ctd_scale.interactions.prepare.count_parts", lambda paths, parts=num_parts: parts)
        run = Run(str(tmp_path), f"parts-{num_parts}")
        report = prepare(run, values)
        artifact = run.fetch("interactions")
        files = {name: entry["sha256"] for name, entry in artifact.manifest["files"].items()}
        files.pop("quarantine.parquet")  # duplicates come by part
        quarantine = read_table(artifact.path / "quarantine.parquet").sort_by(
            [("reason", "ascending"), ("row", "ascending")]
        )
        assert len(quarantine) == sum(report.quarantined.values()) >= (60 if duplicates == "keep" else 200)
        made.append((report, files, quarantine.to_pylist()))
        assert not list((run.root / ".staging").glob("*"))
    assert made[0] == made[1]


@pytest.mark.parametrize("core", [{}, {"min_user_interactions": 7, "min_item_interactions": 35}])
def test_a_sketch_has_the_pairs_of_the_prepared_log(tmp_path: Path, run: Run, core: dict[str, int]) -> None:
    values = write_raw(tmp_path, spoiled_log(60)) | core | {"max_bad_fraction": 0.5}
    prepare(run, values)
    prepared = InteractionLog.load(run.fetch("interactions").path)
    sketch = sketch_log(InteractionsConfig.model_validate(values))
    assert (sketch.num_users, sketch.num_items) == (prepared.num_users, prepared.num_items)
    assert sorted(np.diff(sketch.offsets)) == sorted(np.diff(prepared.offsets))
    assert np.array_equal(np.bincount(sketch.items), np.bincount(prepared.items))


def test_numbers_of_items_are_published_by_name(tmp_path: Path) -> None:
    prices = [None, "cheap", "", *(str(n / 4) for n in range(3, 20))]
    items = ITEMS.append_column("price", pa.array(prices)).append_column("year", pa.array(range(1990, 2010)))
    asked = {"attribute_columns": ["price", "year"]}
    for suffix in (".parquet", ".csv", ".jsonl"):
        run = Run(str(tmp_path), suffix[1:])
        report = prepare(run, write_raw(tmp_path / suffix[1:], good_log(), items, suffix) | asked)
        assert report.numbers_missing == {"price": 2, "year": 0}
        assert report.numbers_unread == {"price": 1, "year": 0}
        found = InteractionLog.load(run.fetch("interactions").path).catalogue.attributes
        expected = [np.nan] * 3 + [n / 4 for n in range(3, 20)]
        assert np.array_equal(found["price"], expected, equal_nan=True)
        assert found["year"].tolist() == list(range(1990, 2010))
    values = write_raw(tmp_path / "b", good_log(), items.append_column("name", items["title"]))
    with pytest.raises(BadInputError, match="attribute_columns: 'name' holds no number in 20 items"):
        prepare(Run(str(tmp_path), "b"), values | {"attribute_columns": ["name"]})


def test_times_are_kept_and_positions_are_not_times(tmp_path: Path) -> None:
    raw = good_log()
    timed, ordered = Run(str(tmp_path), "timed"), Run(str(tmp_path), "ordered")
    prepare(timed, write_raw(tmp_path / "a", raw))
    prepare(ordered, write_raw(tmp_path / "b", raw.rename_columns(["user_id", "item_id", "position"])))
    log = InteractionLog.load(timed.fetch("interactions").path)
    assert log.times is not None
    assert log.times.reshape(100, 10).tolist() == [[(1_000_000 + step) * 10**6 for step in range(10)]] * 100
    assert InteractionLog.load(ordered.fetch("interactions").path).times is None


def test_the_log_is_what_plain_python_makes_of_the_rows(tmp_path: Path, run: Run) -> None:
    raw = good_log()
    prepare(run, write_raw(tmp_path, raw))
    log = InteractionLog.load(run.fetch("interactions").path)
    expected: dict[str, list[str]] = {}
    for row in raw.to_pylist():
        expected.setdefault(str(row["user_id"]), [])
    for row in sorted(raw.to_pylist(), key=lambda row: row["timestamp"]):
        expected[str(row["user_id"])].append(row["item_id"])
    assert log.user_ids == list(expected)
    for user, name in enumerate(log.user_ids):
        assert [log.catalogue.item_ids[item] for item in log.full_history(user)] == expected[name]
        assert [log.catalogue.item_ids[item] for item in log.train_sequence(user)] == expected[name][:-2]


def test_manifest_quarantine_and_facts(tmp_path: Path, run: Run) -> None:
    items = pa.table({"item_id": ["a", "b", "a", "c"], "title": ["A" * 600, None, "again", "C\nD"]})
    log = pa.table(
        {
            "user_id": ["u", "u", "u", "u", "u", "v", None, "u"],
            "item_id": ["a", "b", "c", "a", "z", "a", "a", "a"],
            "timestamp": ["1", "2", "2024-01-01", "4", "5", "then", "7", "1"],
        }
    )
    values = write_raw(tmp_path, log, items, ".csv")
    report = prepare(run, {**values, "max_bad_fraction": 0.5, "duplicates": "first"})
    assert report == PrepareReport(
        dataset="files",
        rows=8,
        item_rows=4,
        quarantined={
            "duplicate": 2,
            "duplicate item_id": 1,
            "unknown item": 1,
            "unparsable time": 1,
            "missing user_id": 1,
        },
        core_interactions=0,
        core_users=0,
        core_items=0,
        titles_cut=1,
        titles_missing=1,
        numbers_missing={},
        numbers_unread={},
        users=1,
        items=3,
        interactions=3,
        split_users=1,
    )
    artifact = run.fetch("interactions")
    assert artifact.manifest["config_hash"] == "hash"
    assert artifact.manifest["facts"]["quarantined"] == report.quarantined
    digests = {name: file_digest(tmp_path / name) for name in ("log.csv", "items.csv")}
    assert artifact.manifest["inputs"] == digests
    assert input_digests(InteractionsConfig.model_validate(values)) == digests
    assert read_table(artifact.path / "quarantine.parquet").to_pylist() == [
        dict(zip(("file", "row", "user_id", "item_id", "time", "reason"), row, strict=True))
        for row in (
            ("items.csv", 3, None, "a", None, "duplicate item_id"),
            ("log.csv", 5, "u", "z", "5", "unknown item"),
            ("log.csv", 6, "v", "a", "then", "unparsable time"),
            ("log.csv", 7, None, "a", "7", "missing user_id"),
            ("log.csv", 4, "u", "a", "4", "duplicate"),
            ("log.csv", 8, "u", "a", "1", "duplicate"),
        )
    ]
    assert InteractionLog.load(artifact.path).catalogue.titles == ["A" * 512, "b", "C D"]
    assert not (run.root / "quarantine.parquet").exists()


def test_one_percent_of_bad_rows_passes_or_stops(tmp_path: Path, run: Run) -> None:
    values = write_raw(tmp_path, spoiled_log(10))
    assert prepare(run, {**values, "max_bad_fraction": 0.01}).interactions == 990
    stopped = Run(str(tmp_path), "stopped")
    with pytest.raises(BadInputError) as caught:
        prepare(stopped, {**values, "max_bad_fraction": 0.009})
    lines = str(caught.value).splitlines()
    assert lines[0] == (
        f"{tmp_path}/log.parquet: 10 of 1,000 rows (1.00%) cannot be used, interactions.max_bad_fraction=0.009 allows 9"
    )
    assert lines[1] == "  missing user_id: 10"
    assert lines[2].startswith("  log.parquet:1 missing user_id item_id='i")
    assert len(lines) == 9
    assert lines[-2] == f"  all of them: {stopped.root}/quarantine.parquet"
    assert lines[-1] == "  repair the rows, or leave them out by raising interactions.max_bad_fraction"
    assert len(read_table(stopped.root / "quarantine.parquet")) == 10
    assert stopped.manifest("interactions") is None
    assert prepare(stopped, {**values, "max_bad_fraction": 0.01}).interactions == 990
    assert not (stopped.root / "quarantine.parquet").exists()


def test_duplicates_do_not_count_as_bad(tmp_path: Path, run: Run) -> None:
    log = good_log()
    values = write_raw(tmp_path, pa.concat_tables([log, log]))
    report = prepare(run, {**values, "max_bad_fraction": 0.0, "duplicates": "last"})
    assert report.rows == 2_000
    assert report.quarantined == {"duplicate": 2_000 - report.interactions}


def test_bad_items_stop_too(tmp_path: Path, run: Run) -> None:
    values = write_raw(tmp_path, good_log(), pa.concat_tables([ITEMS, ITEMS.slice(0, 1)]))
    with pytest.raises(BadInputError, match=r"/items\.parquet: 1 of 21 rows \(4\.76%\)") as caught:
        prepare(run, values)
    assert "  items.parquet:21 duplicate item_id item_id='i0'" in str(caught.value)


def test_core_is_reported_and_not_quarantined(tmp_path: Path, run: Run) -> None:
    lonely = pa.table({"user_id": [999], "item_id": ["i0"], "timestamp": [5]})
    items = pa.concat_tables([ITEMS, pa.table({"item_id": ["never"], "title": ["Never"]})])
    values = write_raw(tmp_path, pa.concat_tables([good_log(), lonely]), items)
    report = prepare(run, {**values, "min_user_interactions": 5, "min_item_interactions": 2})
    assert (report.core_interactions, report.core_users, report.core_items) == (1, 1, 1)
    assert report.quarantined == {}
    assert (report.users, report.items, report.interactions) == (100, 20, 1_000)


def test_many_files_in_a_folder(tmp_path: Path, run: Run) -> None:
    log = good_log()
    values = write_raw(tmp_path, log)
    for part in range(3):
        write_raw(
            tmp_path / "logs" / str(part),
            log.slice(part * 400, 400),
            suffix=(".csv", ".jsonl", ".parquet")[part],
        )
        (tmp_path / "logs" / str(part)).joinpath(f"items{('.csv', '.jsonl', '.parquet')[part]}").unlink()
    prepare(run, values)
    parts = Run(str(tmp_path), "parts")
    prepare(parts, {**values, "interactions": str(tmp_path / "logs")})
    assert run.fetch("interactions").digest == parts.fetch("interactions").digest
    assert set(parts.fetch("interactions").manifest["inputs"]) == {
        "logs/0/log.csv",
        "logs/1/log.jsonl",
        "logs/2/log.parquet",
        "items.parquet",
    }


@pytest.mark.parametrize(
    ("spoil", "changes", "message"),
    [
        ("no rows", {}, r"/log\.parquet holds no interactions \(0 rows\)"),
        ("no items", {}, r"/items\.parquet holds no items \(0 rows\)"),
        (
            "",
            {"min_user_interactions": 11},
            r"1,000 good rows of 100 users have no core.*_user_.*=11",
        ),
        (
            "short",
            {},
            r"none of 100 users has 3 interactions \(the most is 2\), so there is nothing to hold out",
        ),
        (
            "all bad",
            {"max_bad_fraction": 1.0},
            r"1,000 of 1,000 rows \(100\.00%\) cannot be used\n  missing user_id: 1,000\n(.*\n)*  repair the rows$",
        ),
        ("damaged", {}, r"/log\.csv\.gz cannot be read: .*end-of-stream marker was reached$"),
    ],
)
def test_what_cannot_be_learned_from_is_refused(
    tmp_path: Path, run: Run, spoil: str, changes: dict[str, Any], message: str
) -> None:
    log = good_log(length=2) if spoil == "short" else spoiled_log(1_000) if spoil == "all bad" else good_log()
    log, items = (
        log.slice(0, 0 if spoil == "no rows" else None),
        ITEMS.slice(0, 0 if spoil == "no items" else None),
    )
    values = write_raw(tmp_path, log, items)
    if spoil == "damaged":
        import gzip

        values["interactions"] = str(tmp_path / "log.csv.gz")
        text = (Path(write_raw(tmp_path / "csv", log, suffix=".csv")["interactions"])).read_bytes()
        Path(values["interactions"]).write_bytes(gzip.compress(text)[:-12])
    with pytest.raises(BadInputError, match=message):
        prepare(run, {**values, **changes})
    assert run.manifest("interactions") is None


def test_milliseconds_are_asked_about() -> None:
    assert as_date(0) == "1970-01-01T00:00:00+00:00"
    assert as_date(-86_400_000_000) == "1969-12-31T00:00:00+00:00"
    assert "milliseconds?" in as_date(1_700_000_000_000 * 1_000_000)


@pytest.mark.skipif(importlib.util.find_spec("recbole") is None, reason="the recbole wheel brings the data")
def test_movielens_from_its_wheel(run: Run) -> None:
    report = prepare(run, {"dataset": "ml-100k"})
    assert (report.users, report.items, report.interactions) == (943, 1_682, 100_000)
    assert report.split_users == 943
    assert report.quarantined == {}


def test_a_split_in_time_needs_times_and_is_published(tmp_path: Path, data_dir: Path) -> None:
    options = {"split": "global_time", "data_dir": str(data_dir)}
    run = Run(str(tmp_path), "run")
    prepare_interactions(InteractionsConfig(dataset="ml-100k", **options), run, "key")
    log = InteractionLog.load(run.fetch("interactions").path)
    assert log.cuts is not None
    assert log.times is not None
    assert (np.asarray(log.times) >= log.cuts[1]).mean() == pytest.approx(0.1, abs=1e-3)
    for split in SPLITS:
        assert len(log.split_users(split)) > 50
    with pytest.raises(BadInputError, match="'position' orders each user's items alone"):
        prepare_interactions(InteractionsConfig(dataset="lastfm", **options), Run(str(tmp_path), "other"), "key")
