"""Runs whose catalogue is changed, and what they recommend."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
from tiny_run import ITEMS, make_tiny_run

from ctd_scale.artifacts import Run
from ctd_scale.recommender import Recommender

EVERYTHING = 2 * ITEMS


def make_run(folder: Path, seed: int = 0) -> Run:
    """One whose pool of candidates is everything: then no item's score depends on which others there are."""
    run = make_tiny_run(folder, seed)
    run.write_config(run.read_config(["diffusion.error_candidates=400"]))
    return run


def items(*rows: tuple[str, str, str]) -> pa.Table:
    return pa.Table.from_pylist([dict(zip(("item_id", "title", "category"), row, strict=True)) for row in rows])


def ids_of(recommender: Recommender, user: int = 0, k: int = EVERYTHING) -> list[str]:
    (answer,) = recommender.recommend([recommender.log.full_history(user)], k, exclude_seen=False)
    assert len(answer.scores) == len(set(answer.items)) == len(answer.items)
    return [recommender.catalogue.item_ids[item] for item in answer.items]
