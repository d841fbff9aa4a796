"""Recommendations for every user of the log as Parquet: Ray Data actors hold the chain, each writes whole files.

A folder knows what it holds. A second start makes only the files that are missing, and refuses another version or k.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any

import fsspec
import pyarrow as pa

from ctd_scale.artifacts import Run, put_file
from ctd_scale.baseline_recommender import BaselineRecommender, baseline_version
from ctd_scale.batches import InteractionLog
from ctd_scale.changes import read_changes
from ctd_scale.parts import part_name, write_parts
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
    model: str = ""  # a baseline of the run instead of the chain


def recommend_all(run: Run, out: str, order: Order) -> int:
    """Write `out`/part-*.parquet (user_id, item_ids, scores, text), by user index, and then manifest.json.

    `out` is a folder or fsspec URL that every node sees. Users without interactions get empty lists. Gives the number
    of users. Raises ValueError: k below 1, a baseline that says nothing is to explain, or the folder holds the answer
    to another order or of another version.
    """
    if order.k < 1:
        raise ValueError(f"--k {order.k}: expected at least 1")
    if order.model and order.explain:
        raise ValueError(f"--explain needs the chain; {order.model} says nothing")
    changes = read_changes(run)
    version = baseline_version(run, order.model, changes) if order.model else version_of(load_artifacts(run), changes)
    users = InteractionLog.load(run.fetch("interactions").path).num_users
    asked = {"version": version, **asdict(order), "users": users, "users_per_part": PART_USERS}
    filesystem, root = fsspec.url_to_fs(out)
    if filesystem.isfile(root):
        raise ValueError(f"{out} is a file, expected a folder for the parts")
    filesystem.makedirs(root, exist_ok=True)
    if filesystem.exists(f"{root}/{ORDER}"):
        _require_same(out, asked, json.loads(filesystem.cat_file(f"{root}/{ORDER}")))
    else:
        put_file(filesystem, f"{root}/{ORDER}", json.dumps(asked).encode())

    config, count = run.read_config(), -(-users // PART_USERS)
    write_parts(
        RecommendPart,
        {
            "storage": str(run.root.parent) if run.is_local else run.storage,  # actors start in another folder
            "name": run.name,
            "order": asdict(order),
            "part_users": PART_USERS,
            "version": version,
            "changes": changes.number,
        },
        count,
        out,
        stage="recommend_all",
        logs=run.root / "logs" / "recommend_all",
        resources=config.resources.llm,
    )
    names = [part_name(part) for part in range(count)]
    put_file(filesystem, f"{root}/{MANIFEST}", json.dumps({**asked, "parts": names}, indent=2).encode())
    return users


def _require_same(out: str, asked: dict[str, Any], found: dict[str, Any]) -> None:
    other = [f"{name}={found.get(name)!r}, now {value!r}" for name, value in asked.items() if found.get(name) != value]
    if other:
        raise ValueError(f"{out} holds other recommendations ({'; '.join(other)}); choose another --out or empty it")


class RecommendPart:
    """The chain in one actor, and the users of one part after the other. Raises ValueError where the run is no longer
    of this version; what was changed in its catalogue since is left out."""

    def __init__(
        self, storage: str, name: str, order: dict[str, Any], part_users: int, version: str, changes: int
    ) -> None:
        self._order, self._part_users, run = Order(**order), part_users, Run(storage, name)
        self._chunk_users = run.read_config().evaluation.chunk_users
        model = self._order.model
        self._recommender = BaselineRecommender(run, model, changes) if model else Recommender(run, changes=changes)
        if self._recommender.version != version:
            raise ValueError(f"{run.url} is version {self._recommender.version} by now, and not {version}; start again")

    def table(self, part: int) -> pa.Table:
        """(user_id, item_ids, scores, text) of the part's users, by user index."""
        first = part * self._part_users
        users = range(first, min(first + self._part_users, self._recommender.log.num_users))
        log, order = self._recommender.log, self._order
        answers = {user: Recommendation([], [], "") for user in users}
        known = [user for user in users if log.offsets[user + 1] > log.offsets[user]]
        for start in range(0, len(known), self._chunk_users):
            chunk = known[start : start + self._chunk_users]
            histories = [log.full_history(user) for user in chunk]
            if isinstance(self._recommender, BaselineRecommender):
                found = self._recommender.recommend(histories, order.k, users=chunk, exclude_seen=order.exclude_seen)
            else:
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
