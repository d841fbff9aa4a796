"""A baseline in the place of the whole chain: no more of it than ids and scores."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Int32
from numpy import ndarray

from ctd_scale.artifacts import Run
from ctd_scale.baselines.scorers import KNOWS_USERS, SCORERS, trained_artifact
from ctd_scale.batches import Catalogue, InteractionLog
from ctd_scale.changes import NO_CHANGES, Changes, read_changes
from ctd_scale.metrics import top_k
from ctd_scale.recommender import Recommendation, answers, excluded_items


class BaselineRecommender:
    """A baseline of a run, with the answers of `Recommender`: what was taken out of the catalogue (as of `changes`, or
    until now) does not come back. What was put in since, it does not know."""

    def __init__(self, run: Run, name: str, changes: int | None = None) -> None:
        changed = read_changes(run, changes)
        self.version = baseline_version(run, name, changed)
        self.name, self.log = name, InteractionLog.load(run.fetch("interactions").path)
        gone = set(changed.table.filter(changed.table["deleted"])["item_id"].to_pylist())
        places = [item for item, item_id in enumerate(self.catalogue.item_ids) if item_id in gone]
        self._deleted = np.array(places, np.int64)
        self._scorer = SCORERS[name](run, run.read_config(), "test")

    @property
    def catalogue(self) -> Catalogue:
        return self.log.catalogue

    def recommend(
        self,
        histories: Sequence[Int32[ndarray, "_"]],
        k: int,
        *,
        users: Sequence[int] | None = None,
        exclude_seen: bool = True,
        excluded: Sequence[Int32[ndarray, "_"]] | None = None,
    ) -> list[Recommendation]:
        """The k best items after each history. `users` are their indices in the log, which what has learned a vector
        per user cannot do without. Raises ValueError where it must."""
        if users is None and self.name in KNOWS_USERS:
            raise ValueError(f"{self.name} has a vector for each user of the log and none for a history; give a user")
        index = np.asarray(users if users is not None else np.zeros(len(histories), np.int64))
        scores = np.array(self._scorer(index, [np.asarray(history) for history in histories]), np.float32)
        for row, unwanted in zip(scores, excluded_items(histories, exclude_seen, excluded), strict=True):
            row[unwanted] = -np.inf
        scores[:, self._deleted] = -np.inf
        return answers(*top_k(scores, k), [""] * len(histories))


def baseline_version(run: Run, name: str, changes: Changes = NO_CHANGES) -> str:
    """Identity of a baseline's answers, as of these changes. Raises ValueError: there is none of that name;
    ArtifactError: not trained."""
    if name not in SCORERS:
        raise ValueError(f"no baseline {name!r}; baselines: {', '.join(SCORERS)}")
    digests = (run.fetch(trained_artifact(name) or "interactions").digest, changes.digest)
    return "-".join([name, *(digest[:12] for digest in digests if digest)])
