"""Raw files become the `interactions` artifact: Ray Data reads and checks, the driver divides, sorts and indexes.

Every refused row goes to a quarantine table with its file, row and reason; too many of them stop the run.
"""

from __future__ import annotations

import shutil
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from ctd_scale.artifacts import Run
from ctd_scale.batches import InteractionLog
from ctd_scale.config import InteractionsConfig
from ctd_scale.interactions.checking import read_catalogue, read_interactions
from ctd_scale.interactions.parts import PartWriter, count_parts
from ctd_scale.interactions.quarantine import (
    QUARANTINE,
    Quarantine,
    Refused,
    label_paths,
    list_reasons,
    refuse_too_many,
)
from ctd_scale.interactions.schema import ATTRIBUTE, DUPLICATE, BadInputError, attributes_of, clean_titles
from ctd_scale.interactions.sequences import Sequences, build_sequences
from ctd_scale.interactions.sources import RawSource, find_source, input_digests, resolve_columns
from ctd_scale.interactions.split import require_targets, time_cuts, withheld_users
from ctd_scale.terminal import console
from ctd_scale.training import shown_progress, start_ray, write_progress


@dataclass(frozen=True)
class PrepareReport:
    """What was read, what was left out and why, and what was published."""

    dataset: str
    rows: int
    item_rows: int
    quarantined: dict[str, int]
    core_interactions: int
    core_users: int
    core_items: int
    titles_cut: int
    titles_missing: int
    # By attribute: how many items have none, and how many have something there that is no number.
    numbers_missing: dict[str, int]
    numbers_unread: dict[str, int]
    users: int
    items: int
    interactions: int
    split_users: int


def prepare_interactions(config: InteractionsConfig, run: Run, config_hash: str) -> PrepareReport:
    """Read, check, split and publish `interactions`: an InteractionLog and quarantine.parquet.

    Raises BadInputError, with nothing published: files or columns missing, files empty or damaged, more bad
    rows than `max_bad_fraction`, or nothing left to learn from. The quarantine is then in the run's folder.
    """
    source = find_source(config)
    columns = resolve_columns(source)
    labels = label_paths([*source.interactions, *source.items])
    inputs = input_digests(config)
    kept_at = run.root / QUARANTINE
    kept_at.unlink(missing_ok=True)
    scratch = run.root / ".staging" / "interactions-parts"
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    try:
        report, log = _read(
            source, columns, config, Quarantine(kept_at, labels), scratch, run.root / "logs" / "interactions"
        )
        with run.publish("interactions", config_hash=config_hash, inputs=inputs, facts=asdict(report)) as folder:
            log.save(folder)
            shutil.copyfile(kept_at, folder / QUARANTINE)
    finally:
        shutil.rmtree(scratch)
    kept_at.unlink()
    _show(report, config)
    return report


def _read(
    source: RawSource,
    columns: dict[str, str],
    config: InteractionsConfig,
    quarantine: Quarantine,
    scratch: Path,
    logs: Path,
) -> tuple[PrepareReport, InteractionLog]:
    """Everything but publishing; refused rows are in the quarantine, and the log is backed by files in `scratch`."""
    with quarantine:
        bad_items, bad_rows, repeated = Refused(), Refused(), Refused()
        item_columns = {name: columns[name] for name in ("item", "title", "category")}
        items = read_catalogue(source.items, {**item_columns, **source.attributes})
        in_labels = pc.add(items["file"], pa.scalar(len(source.interactions), pa.int32()))
        items = items.set_column(items.schema.get_field_index("file"), "file", in_labels)
        quarantine.add(items.filter(pc.is_valid(items["reason"])), bad_items)
        refuse_too_many(bad_items, len(items), source.items, config.max_bad_fraction, quarantine.path)
        catalogue, titles_cut, titles_missing = clean_titles(
            items.filter(pc.is_null(items["reason"])), config.max_title_chars
        )
        numbers_missing, numbers_unread = _count_numbers(catalogue)

        start_ray()
        keep_raw = config.duplicates != "keep"
        num_parts = count_parts(source.interactions)
        rows, shown = 0, 0.0
        blocks = read_interactions(
            source.interactions,
            columns,
            catalogue["item_id"].combine_chunks(),
            num_parts=num_parts,
            keep_raw=keep_raw,
        )
        with PartWriter(scratch, num_parts) as parts, shown_progress("interactions", logs):
            for good, bad, pieces, of in blocks:
                rows += len(good) + len(bad)
                parts.add(good.drop_columns(["reason"] if keep_raw else ["reason", "item_id", "time", "row", "file"]))
                quarantine.add(bad, bad_rows)
                if time.monotonic() - shown > 1:
                    write_progress(logs, pieces, of, {"rows": rows, "refused": bad_rows.reasons.total()})
                    shown = time.monotonic()
        refuse_too_many(bad_rows, rows, source.interactions, config.max_bad_fraction, quarantine.path)

        def refuse(duplicates: pa.Table) -> None:
            reason = pa.repeat(pa.scalar(DUPLICATE), len(duplicates))
            quarantine.add(duplicates.append_column("reason", reason), repeated)

        made = build_sequences(
            parts.read(),
            catalogue,
            scratch,
            duplicates=config.duplicates,
            min_user_interactions=config.min_user_interactions,
            min_item_interactions=config.min_item_interactions,
            timed=columns["order"] != "position",
            refuse=refuse,
        )
        _require_interactions(made, config)
        log = made.log
        if config.split == "global_time":
            if log.times is None:
                raise BadInputError(
                    f"interactions.split='global_time' needs times, but {columns['order']!r} orders each user's items "
                    "alone; give a timestamp column, or use 'leave_one_out'"
                )
            log = replace(log, cuts=time_cuts(log.times, config.withheld_fraction))
        if config.withheld_users:
            log = replace(log, withheld=withheld_users(log, config.withheld_users))
        require_targets(log)
    reasons = bad_items.reasons + bad_rows.reasons + repeated.reasons
    report = PrepareReport(
        dataset=config.dataset,
        rows=rows,
        item_rows=len(items),
        quarantined=dict(reasons.most_common()),
        core_interactions=made.core_interactions,
        core_users=made.core_users,
        core_items=made.core_items,
        titles_cut=titles_cut,
        titles_missing=titles_missing,
        numbers_missing=numbers_missing,
        numbers_unread=numbers_unread,
        users=log.num_users,
        items=log.num_items,
        interactions=len(log.items),
        split_users=len(log.split_users()),
    )
    return report, log


def _count_numbers(catalogue: pa.Table) -> tuple[dict[str, int], dict[str, int]]:
    """By attribute: items without a value, and those whose value is no number. An item is not left out for it, as it
    would take its interactions with it: no range holds it. Raises BadInputError where a column has no number at all."""
    missing, unread = {}, {}
    for column in attributes_of(catalogue):
        name, values = column.removeprefix(ATTRIBUTE), catalogue[column]
        missing[name], unread[name] = values.null_count, pc.sum(pc.is_nan(values)).as_py() or 0
        if len(values) and missing[name] + unread[name] == len(values):
            raise BadInputError(
                f"interactions.attribute_columns: {name!r} holds no number in {len(values):,} items "
                f"({unread[name]:,} have something else there); name a column of numbers"
            )
    return missing, unread


def _require_interactions(made: Sequences, config: InteractionsConfig) -> None:
    if not len(made.log.items):
        raise BadInputError(
            f"no interactions are left: {made.core_interactions:,} good rows of {made.core_users:,} users have "
            f"no core with interactions.min_user_interactions={config.min_user_interactions} and "
            f"interactions.min_item_interactions={config.min_item_interactions}; lower these or give more"
        )


def _show(report: PrepareReport, config: InteractionsConfig) -> None:
    bad = sum(report.quarantined.values())
    lines = [
        f"{report.rows:,} interaction rows and {report.item_rows:,} item rows read, {bad:,} quarantined"
        + (f" ({list_reasons(report.quarantined)})" if bad else ""),
    ]
    if report.core_interactions or report.core_items:
        lines.append(
            f"k-core removed {report.core_interactions:,} interactions, {report.core_users:,} users and "
            f"{report.core_items:,} items"
        )
    if report.titles_missing:
        lines.append(f"titles missing: {report.titles_missing:,} (the category, or else the id, stands in)")
    if report.titles_cut:
        lines.append(f"titles cut to interactions.max_title_chars={config.max_title_chars}: {report.titles_cut:,}")
    for name, missing in report.numbers_missing.items():
        lines.append(
            f"{name}: {missing:,} items have none, {report.numbers_unread[name]:,} something that is no number"
        )
    lines.append(
        f"{report.users:,} users, {report.items:,} items, {report.interactions:,} interactions; "
        f"{report.split_users:,} users have a test target"
    )
    for line in lines:
        console.print(f"  {line}", highlight=False, markup=False, soft_wrap=True)
