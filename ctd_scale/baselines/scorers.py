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
from ctd_scale.batches import InteractionLog, NodeArrays
from ctd_scale.config import RunConfig
from ctd_scale.ranking import Scorer


def _log(run: Run) -> InteractionLog:
    return InteractionLog.load(run.fetch("interactions").path)


def _popularity(run: Run, config: RunConfig) -> Scorer:
    return popularity_scorer(_log(run))


def _item_knn(run: Run, config: RunConfig) -> Scorer:
    return item_knn_scorer(item_similarities(_log(run), config.baselines.item_knn))


def _lightgcn(run: Run, config: RunConfig) -> Scorer:
    return lightgcn_scorer(NodeArrays.load(run.fetch("embeddings").path))


SCORERS: dict[str, Callable[[Run, RunConfig], Scorer]] = {
    "popularity": _popularity,
    "item_knn": _item_knn,
    "lightgcn": _lightgcn,
    **{name: partial(load_scorer, name) for name in TRAINED},
    **{name: partial(variant_scorer, name) for name in VARIANTS},
}
# What has a vector for each user of the log, and cannot answer for a history alone.
KNOWS_USERS = ("lightgcn", "bpr_mf")


def trained_artifact(name: str) -> str:
    """The artifact that a baseline's training published; '' where nothing is trained."""
    return "embeddings" if name == "lightgcn" else f"baselines/{name}" if name in (*TRAINED, *VARIANTS) else ""
