"""Every baseline by its name, ready to rank the whole catalogue."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from ctd_scale.artifacts import Run
from ctd_scale.baselines.item_knn import item_knn_scorer, item_similarities
from ctd_scale.baselines.lightgcn import lightgcn_scorer
from ctd_scale.baselines.llm import variant_scorer
from ctd_scale.baselines.names import TRAINED, VARIANTS
from ctd_scale.baselines.popularity import popularity_scorer
from ctd_scale.baselines.train import load_scorer
from ctd_scale.batches import InteractionLog, NodeArrays, Split
from ctd_scale.config import RunConfig
from ctd_scale.ranking import Scorer


def _log(run: Run) -> InteractionLog:
    return InteractionLog.load(run.fetch("interactions").path)


def _popularity(run: Run, config: RunConfig, split: Split) -> Scorer:
    return popularity_scorer(_log(run), split)


def _item_knn(run: Run, config: RunConfig, split: Split) -> Scorer:
    return item_knn_scorer(item_similarities(_log(run), config.baselines.item_knn, split))


def _lightgcn(run: Run, config: RunConfig, split: Split) -> Scorer:
    name = {"validation": "embeddings", "test": "embeddings_at_test"}[split]
    return lightgcn_scorer(NodeArrays.load(run.fetch(name).path))


def _learned(name: str, run: Run, config: RunConfig, split: Split) -> Scorer:
    return (variant_scorer if name in VARIANTS else load_scorer)(name, run, config)


# Whose answers need no training once more interactions are known has them when test is asked for, as the chain has.
SCORERS: dict[str, Callable[[Run, RunConfig, Split], Scorer]] = {
    "popularity": _popularity,
    "item_knn": _item_knn,
    "lightgcn": _lightgcn,
    **{name: partial(_learned, name) for name in (*TRAINED, *VARIANTS)},
}
# What has a vector for each user of the log, and cannot answer for a history alone.
KNOWS_USERS = ("lightgcn", "bpr_mf")


def trained_artifact(name: str) -> str:
    """The artifact that a baseline's training published; '' where nothing is trained."""
    return "embeddings_at_test" if name == "lightgcn" else f"baselines/{name}" if name in (*TRAINED, *VARIANTS) else ""
