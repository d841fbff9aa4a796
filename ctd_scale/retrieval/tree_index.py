"""What approximate engines have in common: vectors lie in the leaves of a tree, a search opens the nearest leaves.

How many must be opened is measured when the index is built. A large catalogue may be split into shards of items that
follow each other: each is trained by itself, and all are searched with an effort that is enough for the merged list.
"""

from __future__ import annotations

import json
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import numpy as np
from jaxtyping import Float32, Int32
from numpy import ndarray

from ctd_scale.retrieval.dense import DenseIndex, ExactIndex, require_dim, unit_vectors
from ctd_scale.retrieval.segments import SegmentedIndex

# Too few to have leaves, and ScaNN's codebooks have 16 centres.
MIN_TREE_ITEMS = 16
CALIBRATION_QUERIES = 256
# A list of ten, and what the pool of candidates asks for: one does not follow from the other.
CALIBRATION_KS = (10, 100)
SETTINGS = "settings.json"

Engine = TypeVar("Engine", bound="TreeIndex")


@dataclass(frozen=True)
class Settings:
    """What a calibration chose, and the recalls that it measured: of a shard, those of all shards together.

    `reorder`: so many candidates are scored again, exactly; 0 where the engine's scores are exact.
    """

    items: int
    dim: int
    leaves: int
    leaves_to_search: int
    reorder: int
    recall: float = 0.0
    recall_at_100: float = 0.0


@dataclass(frozen=True)
class TreeIndex(ABC):
    """The engine's own object, and how much of it a search of ten neighbours looks at."""

    searcher: Any
    settings: Settings
    name: ClassVar[str]
    package: ClassVar[str]
    growth: ClassVar[float]  # k times as many neighbours need k ** growth times as many leaves, by experience

    @property
    def recall(self) -> float:
        """recall@10 against exact search on the calibration queries."""
        return self.settings.recall

    @classmethod
    def build(
        cls: type[Engine],
        vectors: Float32[ndarray, "items cond_dim"],
        target_recall: float,
        seed: int = 0,
        queries: Float32[ndarray, "queries cond_dim"] | None = None,
        leaves: int = 0,
    ) -> Engine:
        """One index of everything, as `build_shards` makes them."""
        return cls.build_shards(vectors, 1, target_recall, seed, queries, leaves)[0]

    @classmethod
    def build_shards(
        cls: type[Engine],
        vectors: Float32[ndarray, "items cond_dim"],
        shards: int,
        target_recall: float,
        seed: int = 0,
        queries: Float32[ndarray, "queries cond_dim"] | None = None,
        leaves: int = 0,
    ) -> list[Engine]:
        """Train the indexes, then double the effort of a search until recall@10 and @100 of all together reach
        `target_recall`. `leaves`: of each tree, 0 = sqrt(its items).

        They are measured on at most 256 of `queries`, drawn with `seed`. Without queries they are items
        turned by some 40 degrees in a random direction: an item itself is too easy, its own neighbour.
        Raises ValueError: fewer than 16 items in a shard, or vectors without a direction. RuntimeError: the engine is
        not installed.
        """
        if len(vectors) < MIN_TREE_ITEMS * shards:
            each = f" for each of retrieval.shards={shards}" if shards > 1 else ""
            raise ValueError(
                f"{cls.name} needs at least {MIN_TREE_ITEMS} items{each}, got {len(vectors)}; use ExactIndex"
            )
        vectors = unit_vectors(vectors)
        trained = [
            cls._trained(part, leaves or round(math.sqrt(len(part)))) for part in np.array_split(vectors, shards)
        ]
        sample = _calibration_queries(vectors, queries, np.random.default_rng(seed))
        return _calibrated(trained, ExactIndex(vectors), sample, target_recall)

    def search(
        self, queries: Float32[ndarray, "batch cond_dim"], k: int
    ) -> tuple[Int32[ndarray, "batch k"], Float32[ndarray, "batch k"]]:
        """The k nearest as far as the index finds them; with k >= items, all of them.

        Uses one thread. Raises ValueError: a query without a direction or of another dimension.
        """
        settings = self.settings
        require_dim(queries, settings.dim)
        queries = unit_vectors(queries, "query")
        ids = np.full((len(queries), k), -1, dtype=np.int32)
        cosines = np.full((len(queries), k), -np.inf, dtype=np.float32)
        width = min(k, settings.items)
        if not ids.size:  # engines refuse an empty batch
            return ids, cosines
        # The settings are for ten neighbours. More of them need that many more candidates, but since neighbours
        # lie together not that many more leaves. Calibration holds the exponent to recall@100.
        times = max(1.0, k / CALIBRATION_KS[0])
        reorder = min(settings.items, max(width, math.ceil(settings.reorder * times)))
        leaves = min(settings.leaves, math.ceil(settings.leaves_to_search * times**self.growth))
        found, scores = self._found(queries, width, settings.leaves if width == settings.items else leaves, reorder)
        ids[:, :width], cosines[:, :width] = found, scores
        return ids, cosines

    def save(self, folder: Path) -> None:
        """Write the index; the folder may be moved."""
        folder.mkdir(parents=True, exist_ok=True)
        self._write(folder)
        (folder / SETTINGS).write_text(json.dumps(asdict(self.settings), indent=2) + "\n")

    @classmethod
    def load(cls: type[Engine], folder: Path) -> Engine:
        """Read what `save` wrote. Raises ValueError where it cannot be that; RuntimeError: the engine is not
        installed."""
        settings = cls.read_settings(folder)
        return cls(cls._read(folder), settings)

    @classmethod
    def read_settings(cls, folder: Path) -> Settings:
        """What is known of an index without loading it. Raises ValueError: there is none."""
        if not (folder / SETTINGS).is_file():
            raise ValueError(f"{folder} is no {cls.name} index: {SETTINGS} is missing; rerun build_index")
        return Settings(**json.loads((folder / SETTINGS).read_text()))

    @classmethod
    def library(cls) -> Any:
        """The engine's own module, imported when it is needed. Raises RuntimeError: it cannot be."""
        try:
            return cls._library()
        except ImportError as error:
            raise RuntimeError(
                f"{cls.name} cannot be imported ({error}). Install {cls.package} where it has a wheel; here, set "
                "retrieval.engine to another one, or retrieval.exact_limit above the number of items, and rerun "
                "build_index"
            ) from error

    @classmethod
    def importable(cls) -> bool:
        try:
            cls._library()
        except ImportError:
            return False
        return True

    @classmethod
    @abstractmethod
    def _library(cls) -> Any: ...

    @classmethod
    @abstractmethod
    def _trained(cls: type[Engine], vectors: Float32[ndarray, "items cond_dim"], leaves: int) -> Engine:
        """An index of unit vectors that looks at everything."""

    @abstractmethod
    def _found(
        self, queries: Float32[ndarray, "batch cond_dim"], k: int, leaves: int, reorder: int
    ) -> tuple[Int32[ndarray, "batch k"], Float32[ndarray, "batch k"]]:
        """What a search of so much finds, padded with -1 / -inf."""

    @abstractmethod
    def _write(self, folder: Path) -> None: ...

    @classmethod
    @abstractmethod
    def _read(cls, folder: Path) -> Any: ...


def united(shards: Sequence[TreeIndex]) -> DenseIndex:
    """Shards as one index of all their items."""
    if len(shards) == 1:
        return shards[0]
    return SegmentedIndex.of(shards, [shard.settings.items for shard in shards])


def save_shards(shards: Sequence[TreeIndex], folder: Path) -> None:
    """A single shard as it is; several into folders named 0, 1, and so on."""
    for number, shard in enumerate(shards):
        shard.save(folder / str(number) if len(shards) > 1 else folder)


def shard_folders(folder: Path) -> list[Path]:
    """Where `save_shards` wrote each."""
    if not (folder / "0").is_dir():
        return [folder]
    return sorted(folder.iterdir(), key=lambda each: int(each.name))


def load_shards(engine: type[Engine], folder: Path) -> list[Engine]:
    """Read what `save_shards` wrote. Raises as `TreeIndex.load` does."""
    return [engine.load(each) for each in shard_folders(folder)]


def _calibrated(
    shards: Sequence[Engine], exact: ExactIndex, queries: Float32[ndarray, "queries cond_dim"], target: float
) -> list[Engine]:
    """Half of the loss that `target` allows may go to the hashing, the rest to the leaves left out."""
    items = len(exact.vectors)
    ks = [min(k, items) for k in CALIBRATION_KS]
    # A neighbour counts by its cosine, not by its id: among equal items it does not matter which comes back.
    _, cosines = exact.search(queries, max(ks))
    needed = [cosines[:, k - 1 : k] - 1e-6 for k in ks]

    def measured(leaves: int, reorder: int) -> list[Settings]:
        tried = [
            replace(
                shard.settings,
                leaves_to_search=min(leaves, shard.settings.leaves),
                reorder=min(reorder, shard.settings.items),
            )
            for shard in shards
        ]
        whole = united([replace(shard, settings=each) for shard, each in zip(shards, tried, strict=True)])
        at_10, at_100 = (
            float((whole.search(queries, k)[1] >= enough).mean()) for k, enough in zip(ks, needed, strict=True)
        )
        return [replace(each, recall=at_10, recall_at_100=at_100) for each in tried]

    def worst(trial: list[Settings]) -> float:
        return min(trial[0].recall, trial[0].recall_at_100)

    largest, most = (max(getattr(shard.settings, name) for shard in shards) for name in ("items", "leaves"))
    reorder = min(2 * ks[0], largest) if shards[0].settings.reorder else 0
    while 0 < reorder < largest and worst(measured(most, reorder)) < (1 + target) / 2:
        reorder = min(2 * reorder, largest)
    leaves = 1
    while worst(trial := measured(leaves, reorder)) < target and leaves < most:
        leaves = min(2 * leaves, most)
    return [replace(shard, settings=each) for shard, each in zip(shards, trial, strict=True)]


def _calibration_queries(
    vectors: Float32[ndarray, "items cond_dim"],
    queries: Float32[ndarray, "queries cond_dim"] | None,
    rng: np.random.Generator,
) -> Float32[ndarray, "sample cond_dim"]:
    source = vectors if queries is None else queries
    rows = rng.choice(len(source), size=min(CALIBRATION_QUERIES, len(source)), replace=False)
    sample = source[np.sort(rows)]
    if queries is None:
        noise = rng.standard_normal(sample.shape)
        # Shorter than the item, so that the sum never vanishes.
        noise *= 0.9 / np.linalg.norm(noise, axis=1, keepdims=True)
        sample = (sample + noise).astype(np.float32)
    return unit_vectors(sample, "calibration query")
