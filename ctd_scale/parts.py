"""Batch inference that can be interrupted: Ray Data actors write numbered Parquet files, those that are missing."""

from __future__ import annotations

from collections.abc import Mapping
from io import BytesIO
from pathlib import Path
from typing import Any, Protocol

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray.data
import torch
from ray.exceptions import RayError

from ctd_scale import environment, training
from ctd_scale.artifacts import put_file
from ctd_scale.config_resources import StageResources
from ctd_scale.terminal import TrainingError


class PartMaker(Protocol):
    """What an actor holds: it is made once, and then gives the rows of one part after the other."""

    def table(self, part: int) -> pa.Table: ...


def part_name(part: int) -> str:
    return f"part-{part:06}.parquet"


def write_parts(
    maker: type[PartMaker],
    arguments: Mapping[str, Any],
    count: int,
    folder: str,
    *,
    stage: str,
    logs: Path,
    resources: StageResources,
) -> None:
    """Write `folder`/part-000000.parquet and so on, `count` of them; those that are there stay as they are.

    `folder` is a path or fsspec URL that every node sees. Each of `resources.num_workers` actors makes a
    `maker(**arguments)`. A file appears whole or not at all, so a kill costs the parts that were being made.
    """
    filesystem, root = fsspec.url_to_fs(folder)  # absolute where it is local, as actors need it
    filesystem.makedirs(root, exist_ok=True)
    missing = [part for part in range(count) if not filesystem.exists(f"{root}/{part_name(part)}")]
    if not missing:
        return
    training.start_ray()
    made = ray.data.from_items([{"part": part} for part in missing], override_num_blocks=len(missing)).map_batches(
        WriteParts,
        fn_constructor_kwargs={
            "maker": maker,
            "arguments": dict(arguments),
            "folder": folder if "://" in folder else str(root),
            "resources": resources,
        },
        concurrency=min(resources.num_workers, len(missing)),
        num_gpus=resources.num_gpus,
        batch_size=1,
    )
    with training.shown_progress(stage, logs):
        done = count - len(missing)
        try:
            for _ in made.iter_batches(batch_size=1):
                done += 1
                training.write_progress(logs, done, count)
        except RayError as error:
            raise TrainingError(f"{stage} failed on its workers: {error}") from error


class WriteParts:
    """The actor of `write_parts`."""

    def __init__(
        self, maker: type[PartMaker], arguments: dict[str, Any], folder: str, resources: StageResources
    ) -> None:
        # Counted here: the driver may have other cores.
        torch.set_num_threads(resources.threads_per_worker or environment.share_of_cores(resources.num_workers))
        self._maker = maker(**arguments)
        self._filesystem, self._root = fsspec.url_to_fs(folder)

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        for part in batch["part"].tolist():
            buffer = BytesIO()
            pq.write_table(self._maker.table(part), buffer, write_page_checksum=True)
            put_file(self._filesystem, f"{self._root}/{part_name(part)}", buffer.getvalue())
        return batch


def read_parts(folder: str, count: int) -> pa.Table:
    """All rows of all parts, in their order."""
    filesystem, root = fsspec.url_to_fs(folder)
    parts = []
    for part in range(count):
        with filesystem.open(f"{root}/{part_name(part)}", "rb") as file:
            parts.append(pq.read_table(file, page_checksum_verification=True))
    return pa.concat_tables(parts)
