"""Recommendations for every user of the log as Parquet: Ray Data actors hold the chain, each writes whole files.

A folder knows what it holds. A second start makes only the files that are missing, and refuses another version or k.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from io import BytesIO
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray.data
import torch

from ctd_scale import training
from ctd_scale.artifacts import Run
from ctd_scale.batches import InteractionLog
from ctd_scale.recommender import Recommendation, Recommender, load_artifacts, version_of

# Users per file: little to lose in a kill, little to pay for a file.
PART_USERS = 1024
ORDER, MANIFEST = "order.json", "manifest.json"
SCHEMA = pa.schema(
    [
        ("user_id", pa.string()),
        ("item_ids", pa.list_(pa.string())),
        ("scores", pa.list_(pa.float32())),
        ("text", pa.string()),
    ]
)


@dataclass(frozen=True)
class Order:
    """What is asked for every user; the same as in a request to the endpoint."""

    k: int = 10
    exclude_seen: bool = True
    explain: bool = False


def recommend_all(run: Run, out: str, order: Order) -> int:
    """Write `out`/part-*.parquet (user_id, item_ids, scores, text), by user index, and then manifest.json.

    `out` is a folder or fsspec URL that every node sees. Users without interactions get empty lists. Gives the number
    of users. Raises ValueError: k below 1, or the folder holds the answer to another order or of another version.
    """
    if order.k < 1:
        raise ValueError(f"--k {order.k}: expected at least 1")
    artifacts = load_artifacts(run)
    users = InteractionLog.load(artifacts["interactions"].path).num_users
    asked = {"version": version_of(artifacts), **asdict(order), "users": users, "users_per_part": PART_USERS}
    filesystem, root = fsspec.url_to_fs(out)
    filesystem.makedirs(root, exist_ok=True)
    if filesystem.exists(f"{root}/{ORDER}"):
        _require_same(out, asked, json.loads(filesystem.cat_file(f"{root}/{ORDER}")))
    else:
        put(filesystem, f"{root}/{ORDER}", json.dumps(asked).encode())

    names = [part_name(part) for part in range(-(-users // PART_USERS))]
    missing = [part for part, name in enumerate(names) if not filesystem.exists(f"{root}/{name}")]
    if missing:
        _make(run, out, order, missing)
    put(filesystem, f"{root}/{MANIFEST}", json.dumps({**asked, "parts": names}, indent=2).encode())
    return users


def part_name(part: int) -> str:
    return f"part-{part:06}.parquet"


def put(filesystem: Any, path: str, data: bytes) -> None:
    """Write a file so that its name stands for all of it."""
    folder, _, name = path.rpartition("/")
    aside = f"{folder}/.{name}"
    filesystem.pipe_file(aside, data)
    filesystem.mv(aside, path)


def _require_same(out: str, asked: dict[str, Any], found: dict[str, Any]) -> None:
    other = [f"{name}={found.get(name)!r}, now {value!r}" for name, value in asked.items() if found.get(name) != value]
    if other:
        raise ValueError(f"{out} holds other recommendations ({'; '.join(other)}); choose another --out or empty it")


def _make(run: Run, out: str, order: Order, parts: list[int]) -> None:
    config = run.read_config()
    resources = config.resources.llm
    training.start_ray()
    made = ray.data.from_items([{"part": part} for part in parts], override_num_blocks=len(parts)).map_batches(
        RecommendPart,
        fn_constructor_kwargs={
            "storage": run.storage,
            "name": run.name,
            "out": out,
            "order": asdict(order),
            "threads": training.threads_per_worker(resources),
        },
        concurrency=min(resources.num_workers, len(parts)),
        num_gpus=1 if resources.use_gpu else 0,
        batch_size=1,
    )
    logs = run.root / "logs" / "recommend_all"
    with training.shown_progress("recommend_all", logs):
        for done, _ in enumerate(made.iter_batches(batch_size=1), start=1):
            training.write_progress(logs, done, len(parts))


class RecommendPart:
    """A Ray Data actor that holds the chain and writes one file after the other."""

    def __init__(self, storage: str, name: str, out: str, order: dict[str, Any], threads: int) -> None:
        torch.set_num_threads(threads)
        self._recommender, self._order = Recommender(Run(storage, name)), Order(**order)
        self._filesystem, self._root = fsspec.url_to_fs(out)

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        for part in batch["part"].tolist():
            first = part * PART_USERS
            table = self.table(range(first, min(first + PART_USERS, self._recommender.log.num_users)))
            buffer = BytesIO()
            pq.write_table(table, buffer, write_page_checksum=True)
            put(self._filesystem, f"{self._root}/{part_name(part)}", buffer.getvalue())
        return batch

    def table(self, users: range) -> pa.Table:
        """The rows of these users."""
        log, order = self._recommender.log, self._order
        answers = {user: Recommendation([], [], "") for user in users}
        known = [user for user in users if log.offsets[user + 1] > log.offsets[user]]
        step = self._recommender.config.evaluation.chunk_users
        for start in range(0, len(known), step):
            chunk = known[start : start + step]
            histories = [log.full_history(user) for user in chunk]
            found = self._recommender.recommend(
                histories, order.k, exclude_seen=order.exclude_seen, explain=order.explain
            )
            answers.update(zip(chunk, found, strict=True))
        ids = log.catalogue.item_ids
        columns = [
            [log.user_ids[user] for user in users],
            [[ids[item] for item in answer.items] for answer in answers.values()],
            [answer.scores for answer in answers.values()],
            [answer.text for answer in answers.values()],
        ]
        return pa.table([pa.array(column, field.type) for column, field in zip(columns, SCHEMA, strict=True)], SCHEMA)
