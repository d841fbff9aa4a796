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
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Float32, Float64, Int32, Int64, Integer
from numpy import ndarray

Split = Literal["validation", "test"]
SPLITS: tuple[Split, Split] = ("validation", "test")
# Leave-one-out needs one item to train on, one to validate and one to test.
MIN_SPLIT_LENGTH = 3
# Of items.parquet; every further column is a number of the items.
ITEM_COLUMNS = ("item_id", "title", "category")


@dataclass(frozen=True)
class Catalogue:
    """Items in index order: raw id, title, category ('' where unknown), and named numbers (NaN where unknown)."""

    item_ids: list[str]
    titles: list[str]
    categories: list[str]
    attributes: Mapping[str, Float64[ndarray, "items"]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.item_ids)

    def save(self, folder: Path) -> None:
        columns = dict(zip(ITEM_COLUMNS, (self.item_ids, self.titles, self.categories), strict=True))
        write_table(pa.table({**columns, **self.attributes}), folder / "items.parquet")

    @classmethod
    def load(cls, folder: Path) -> Catalogue:
        items = read_table(folder / "items.parquet")
        numbers = {name: items[name].to_numpy() for name in items.column_names if name not in ITEM_COLUMNS}
        item_ids, titles, categories = (items[name].to_pylist() for name in ITEM_COLUMNS)
        return cls(item_ids, titles, categories, numbers)


@dataclass(frozen=True)
class InteractionLog:
    """All interactions as one time-ordered sequence per user (CSR), and the split over them.

    Leave-one-out: the last item of a user is the test target, the one before it the validation target, the rest is
    training. Users with fewer than three interactions are training only.

    With `cuts`, at two times that are the same for all: what is older than the first is training, a user's first item
    from the first on is the validation target, that from the second on the test target, and the history is all that
    is older than the cut. No model then learns from what happened after a target. Users whom training has not seen
    have no target.

    With `withheld` these users alone have targets; in leave-one-out all that the others chose is training.
    """

    offsets: Int64[ndarray, "offsets"]
    items: Int32[ndarray, "interactions"]
    user_ids: list[str]
    catalogue: Catalogue
    # Microseconds since 1970, where the source has timestamps and not only positions.
    times: Int64[ndarray, "interactions"] | None = None
    # In the unit of `times`: where validation begins, and where test begins. None: leave-one-out.
    cuts: tuple[int, int] | None = None
    # Users that have targets, ascending. None: all that can have one.
    withheld: Int64[ndarray, "withheld"] | None = None

    @property
    def num_users(self) -> int:
        return len(self.offsets) - 1

    @property
    def num_items(self) -> int:
        return len(self.catalogue)

    @cached_property
    def _places(self) -> Mapping[str, Int64[ndarray, "users"]]:
        """Within each user's sequence: how much is training, and where each split's target lies (-1: there is none)."""
        lengths = np.diff(self.offsets)
        asked = np.ones(self.num_users, bool)
        if self.withheld is not None:
            asked[:] = False
            asked[self.withheld] = True
        if self.cuts is None:
            split = asked & (lengths >= MIN_SPLIT_LENGTH)
            return {
                "train": np.where(split, lengths - 2, lengths),
                "validation": np.where(split, lengths - 2, -1),
                "test": np.where(split, lengths - 1, -1),
            }
        validation, test = (self._older_than(cut) for cut in self.cuts)
        seen = asked & (validation > 0)
        return {
            "train": validation,
            "validation": np.where(seen & (validation < test), validation, -1),
            "test": np.where(seen & (test < lengths), test, -1),
        }

    def _older_than(self, cut: int) -> Int64[ndarray, "users"]:
        """How many interactions of each user are older than a time."""
        assert self.times is not None, "only a log with times is cut at one"
        older = np.concatenate([[0], np.cumsum(self.times < cut)])
        return older[self.offsets[1:]] - older[self.offsets[:-1]]

    def train_lengths(self) -> Int64[ndarray, "users"]:
        """How many interactions of each user belong to the training split."""
        return self._places["train"]

    def train_sequence(self, user: int) -> Int32[ndarray, "length"]:
        """A user's training items, oldest first."""
        start = int(self.offsets[user])
        return self.items[start : start + int(self._places["train"][user])]

    def known_lengths(self, split: Split) -> Int64[ndarray, "users"]:
        """How many interactions of each user are known when the targets of the split are asked for: the training ones,
        and for test those of validation too."""
        if split == "validation":
            return self.train_lengths()
        if self.cuts is None:
            return np.maximum(self._places["test"], self.train_lengths())
        return self._older_than(self.cuts[1])

    def lengths_known_beside(self, users: Integer[ndarray, "some"]) -> Int64[ndarray, "users"]:
        """How many interactions of each user are known where, in leave-one-out, the validation targets of these `users`
        alone are asked for: of them the training ones, of all others those that are known at test."""
        lengths = self.known_lengths("test").copy()
        lengths[users] = self.train_lengths()[users]
        return lengths

    def known_edges(self, split: Split) -> tuple[Int32[ndarray, "interactions"], Int32[ndarray, "interactions"]]:
        """(user_index, item_index) of every interaction that is known by then, in log order."""
        lengths = np.diff(self.offsets)
        position = np.arange(len(self.items)) - np.repeat(self.offsets[:-1], lengths)
        keep = position < np.repeat(self.known_lengths(split), lengths)
        users = np.repeat(np.arange(self.num_users, dtype=np.int32), lengths)
        return users[keep], self.items[keep]

    def train_edges(self) -> tuple[Int32[ndarray, "interactions"], Int32[ndarray, "interactions"]]:
        """(user_index, item_index) of every training interaction, in log order."""
        return self.known_edges("validation")

    def split_users(self, split: Split = "test") -> Int64[ndarray, "split_users"]:
        """Users that have a target in the split; in leave-one-out the same for both."""
        return np.flatnonzero(self._places[split] >= 0)

    def history(self, user: int, split: Split) -> Int32[ndarray, "length"]:
        """What is known of a user of the split before its target (leave-one-out test: training + validation item)."""
        start = int(self.offsets[user])
        return self.items[start : start + int(self._places[split][user])]

    def full_history(self, user: int) -> Int32[ndarray, "length"]:
        """Everything known of the user: what a served request starts from."""
        return self.items[int(self.offsets[user]) : int(self.offsets[user + 1])]

    def targets(self, users: Int64[ndarray, "batch"], split: Split) -> Int32[ndarray, "batch"]:
        """The withheld item of each of the split's users."""
        return self.items[self.offsets[users] + self._places[split][users]]

    def save(self, folder: Path) -> None:
        np.save(folder / "offsets.npy", self.offsets)
        np.save(folder / "items.npy", self.items)
        if self.times is not None:
            np.save(folder / "times.npy", self.times)
        if self.cuts is not None:
            (folder / "cuts.json").write_text(json.dumps(self.cuts))
        if self.withheld is not None:
            np.save(folder / "withheld.npy", self.withheld)
        write_table(pa.table({"user_id": self.user_ids}), folder / "users.parquet")
        self.catalogue.save(folder)

    @classmethod
    def load(cls, folder: Path, catalogue: Catalogue | None = None) -> InteractionLog:
        """What `save` wrote; a `catalogue` that is given is not read again, which takes seconds a million items."""
        return cls(
            offsets=_mapped(folder / "offsets.npy"),
            items=_mapped(folder / "items.npy"),
            user_ids=read_table(folder / "users.parquet")["user_id"].to_pylist(),
            catalogue=Catalogue.load(folder) if catalogue is None else catalogue,
            times=_mapped(times) if (times := folder / "times.npy").exists() else None,
            cuts=tuple(json.loads(cuts.read_text())) if (cuts := folder / "cuts.json").exists() else None,
            withheld=np.load(withheld) if (withheld := folder / "withheld.npy").exists() else None,
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
            _mapped(folder / "users.npy"),
            _mapped(folder / "items.npy"),
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

    score = preference * cos(c, q) + graph * u . e / M + neighbors * s + draws * g - error * (d - mean d), then the text
    factor (1 + pi * match), with u what the graph says of the history and M the largest |e|, s how much the item is
    chosen next to the history's, g = tau * (log-sum-exp over draws of cos(y, q) / tau - log S), and d the denoiser's
    error.
    """

    preference: float
    draws: float
    error: float
    pi: float = 0.0
    graph: float = 0.0
    neighbors: float = 0.0

    @property
    def reads_histories(self) -> bool:
        """Whether it weighs what a history says without the LLM."""
        return bool(self.graph or self.neighbors)

    @property
    def generates(self) -> bool:
        """Whether it weighs what the denoiser says."""
        return bool(self.draws or self.error)

    @property
    def weighs_all(self) -> bool:
        """Whether candidates come from everywhere."""
        return self.reads_histories and self.generates


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


def _mapped(file: Path) -> ndarray:
    """An array that is read where it is looked at. As a plain one: numpy's memmap takes ten times as long to cut."""
    return np.asarray(np.load(file, mmap_mode="r"))
