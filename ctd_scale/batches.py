"""The data that crosses a boundary between stages, and the glossary of axes.

Axes (used in every jaxtyping annotation):
    users, items       size of the user / item index
    nodes              users + items: users first, then items
    edges              training interactions, once per distinct (user, item)
    batch              samples of one step
    history            items of one (padded) history, oldest first
    ways      (K)      continuous tokens per item
    token_dim (H)      hidden size of the LLM
    embed_dim (D)      collaborative embedding
    cond_dim  (C)      preference vector and item vector
    draws     (S)      generated vectors per user
    pool      (M)      candidates per user

Each class knows how to write itself into an artifact's folder and read itself back; nothing else does.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Float32, Int32, Int64
from numpy import ndarray

Split = Literal["validation", "test"]
SPLITS: tuple[Split, Split] = ("validation", "test")
# Leave-one-out needs one item to train on, one to validate and one to test.
MIN_SPLIT_LENGTH = 3


@dataclass(frozen=True)
class Catalogue:
    """Items in index order: raw id, title, category ('' where unknown)."""

    item_ids: list[str]
    titles: list[str]
    categories: list[str]

    def __len__(self) -> int:
        return len(self.item_ids)


@dataclass(frozen=True)
class InteractionLog:
    """All interactions as one time-ordered sequence per user (CSR), and the leave-one-out split over them.

    The last item of a user is the test target, the one before it the validation target, the rest is training.
    Users with fewer than three interactions are training only.
    """

    offsets: Int64[ndarray, "offsets"]
    items: Int32[ndarray, "interactions"]
    user_ids: list[str]
    catalogue: Catalogue
    # Microseconds since 1970, where the source has timestamps and not only positions.
    times: Int64[ndarray, "interactions"] | None = None

    @property
    def num_users(self) -> int:
        return len(self.offsets) - 1

    @property
    def num_items(self) -> int:
        return len(self.catalogue)

    def train_lengths(self) -> Int64[ndarray, "users"]:
        """How many interactions of each user belong to the training split."""
        lengths = np.diff(self.offsets)
        return np.where(lengths >= MIN_SPLIT_LENGTH, lengths - 2, lengths)

    def train_sequence(self, user: int) -> Int32[ndarray, "length"]:
        """A user's training items, oldest first."""
        start = int(self.offsets[user])
        length = int(self.offsets[user + 1]) - start
        return self.items[start : start + (length - 2 if length >= MIN_SPLIT_LENGTH else length)]

    def train_edges(self) -> tuple[Int32[ndarray, "interactions"], Int32[ndarray, "interactions"]]:
        """(user_index, item_index) of every training interaction, in log order."""
        lengths = np.diff(self.offsets)
        position = np.arange(len(self.items)) - np.repeat(self.offsets[:-1], lengths)
        keep = position < np.repeat(self.train_lengths(), lengths)
        users = np.repeat(np.arange(self.num_users, dtype=np.int32), lengths)
        return users[keep], self.items[keep]

    def split_users(self) -> Int64[ndarray, "split_users"]:
        """Users that have a validation and a test target."""
        return np.flatnonzero(np.diff(self.offsets) >= MIN_SPLIT_LENGTH)

    def history(self, user: int, split: Split) -> Int32[ndarray, "length"]:
        """What is known of the user before the split's target (test: training + validation item)."""
        end = int(self.offsets[user + 1]) - (2 if split == "validation" else 1)
        return self.items[int(self.offsets[user]) : end]

    def full_history(self, user: int) -> Int32[ndarray, "length"]:
        """Everything known of the user: what a served request starts from."""
        return self.items[int(self.offsets[user]) : int(self.offsets[user + 1])]

    def targets(self, users: Int64[ndarray, "batch"], split: Split) -> Int32[ndarray, "batch"]:
        """The withheld item of each user."""
        return self.items[self.offsets[users + 1] - (2 if split == "validation" else 1)]

    def save(self, folder: Path) -> None:
        np.save(folder / "offsets.npy", self.offsets)
        np.save(folder / "items.npy", self.items)
        if self.times is not None:
            np.save(folder / "times.npy", self.times)
        write_table(pa.table({"user_id": self.user_ids}), folder / "users.parquet")
        columns = {
            "item_id": self.catalogue.item_ids,
            "title": self.catalogue.titles,
            "category": self.catalogue.categories,
        }
        write_table(pa.table(columns), folder / "items.parquet")

    @classmethod
    def load(cls, folder: Path) -> InteractionLog:
        items = read_table(folder / "items.parquet")
        return cls(
            offsets=np.load(folder / "offsets.npy", mmap_mode="r"),
            items=np.load(folder / "items.npy", mmap_mode="r"),
            user_ids=read_table(folder / "users.parquet")["user_id"].to_pylist(),
            catalogue=Catalogue(
                items["item_id"].to_pylist(), items["title"].to_pylist(), items["category"].to_pylist()
            ),
            times=np.load(times, mmap_mode="r") if (times := folder / "times.npy").exists() else None,
        )


@dataclass(frozen=True)
class NodeArrays:
    """One array per side of the graph: embeddings [users|items, D], or tokens [users|items, K, H]."""

    users: Float32[ndarray, "users ..."]
    items: Float32[ndarray, "items ..."]

    def save(self, folder: Path) -> None:
        np.save(folder / "users.npy", self.users)
        np.save(folder / "items.npy", self.items)

    @classmethod
    def load(cls, folder: Path) -> NodeArrays:
        return cls(
            np.load(folder / "users.npy", mmap_mode="r"),
            np.load(folder / "items.npy", mmap_mode="r"),
        )


@dataclass(frozen=True)
class Preferences:
    """Preference vectors with the items that followed them; texts only where they were generated ('' elsewhere)."""

    users: Int32[ndarray, "rows"]
    targets: Int32[ndarray, "rows"]
    vectors: Float32[ndarray, "rows cond_dim"]
    texts: list[str]

    def __len__(self) -> int:
        return len(self.users)

    def save(self, folder: Path, split: str) -> None:
        flat = pa.array(self.vectors.reshape(-1), type=pa.float32())
        table = pa.table(
            {
                "user_index": pa.array(self.users),
                "target_index": pa.array(self.targets),
                "preference": pa.FixedSizeListArray.from_arrays(flat, self.vectors.shape[1]),
                "text": pa.array(self.texts, type=pa.string()),
            }
        )
        write_table(table, folder / f"{split}.parquet")

    @classmethod
    def load(cls, folder: Path, split: str) -> Preferences:
        table = read_table(folder / f"{split}.parquet").combine_chunks()
        column = table["preference"].combine_chunks()
        vectors = column.flatten().to_numpy().reshape(len(table), column.type.list_size)
        return cls(
            table["user_index"].to_numpy(),
            table["target_index"].to_numpy(),
            vectors,
            table["text"].to_pylist(),
        )


@dataclass(frozen=True)
class Ranking:
    """How candidates are scored, in units of a cosine; weights chosen on the validation split.

    score = preference * cos(c, q) + draws * g - error * (d - mean d), then the text factor (1 + pi * match), with
    g = tau * (log-sum-exp over draws of cos(y, q) / tau - log S) and d the denoiser's error.
    """

    preference: float
    draws: float
    error: float
    pi: float = 0.0


def save_rankings(rankings: dict[str, Ranking], folder: Path) -> None:
    """Named rankings as ranking.json."""
    text = json.dumps({name: asdict(ranking) for name, ranking in rankings.items()}, indent=2)
    (folder / "ranking.json").write_text(text + "\n")


def load_rankings(folder: Path) -> dict[str, Ranking]:
    """What `save_rankings` wrote."""
    stored = json.loads((folder / "ranking.json").read_text())
    return {name: Ranking(**values) for name, values in stored.items()}


def write_table(table: pa.Table, path: Path) -> None:
    """Parquet with page checksums, so that a flipped bit is seen when it is read."""
    pq.write_table(table, path, write_page_checksum=True)


def read_table(path: Path) -> pa.Table:
    """Read what `write_table` wrote, checksums verified."""
    return pq.read_table(path, page_checksum_verification=True)
