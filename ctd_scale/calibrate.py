"""Choose the fusion weights on the validation split, and nothing else on anything else."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import numpy as np
from numpy import ndarray

from ctd_scale import training
from ctd_scale.artifacts import Run
from ctd_scale.batches import InteractionLog, Preferences, Ranking, Split, save_rankings
from ctd_scale.config import RunConfig
from ctd_scale.recommender import (
    Pool,
    RetrieveStep,
    excluded_items,
    fused_scores,
    load_density,
    load_retrieve,
)
from ctd_scale.retrieval.hybrid import hybrid_scores

INPUTS = ("interactions", "models/llm", "preferences", "models/diffusion", "index")


@dataclass(frozen=True)
class ScoredPool:
    """Candidates of some users with everything that a ranking can weigh, and their withheld items."""

    pool: Pool
    errors: ndarray
    draws: ndarray
    users: ndarray
    targets: ndarray
    texts: list[str]


def scored_pools(
    log: InteractionLog,
    preferences: Preferences,
    split: Split,
    density: Any,
    retrieve: RetrieveStep,
    *,
    mask_seen: bool,
    chunk: int,
) -> Iterator[ScoredPool]:
    """Pools of all rows of `preferences`, `chunk` users at a time, made as a request makes them."""
    for start in range(0, len(preferences), chunk):
        rows = slice(start, start + chunk)
        users, vectors, texts = preferences.users[rows], preferences.vectors[rows], preferences.texts[rows]
        excluded = excluded_items([log.history(int(user), split) for user in users], mask_seen)
        draws = density.draws(vectors)
        pool = retrieve.pool(vectors, draws, texts, excluded)
        errors = density.errors(vectors, pool.vectors)
        yield ScoredPool(pool, errors, draws, users, preferences.targets[rows], texts)


def calibrate_ranking(run: Run, config: RunConfig, config_hash: str) -> None:
    """interactions, preferences, models, index -> ranking (named weights, chosen by NDCG@10 on validation)."""
    artifacts = {name: run.fetch(name) for name in INPUTS}
    for artifact in artifacts.values():
        run.require_made_from(artifact, *(other for other in artifacts.values() if other is not artifact))
    log = InteractionLog.load(artifacts["interactions"].path)
    preferences = Preferences.load(artifacts["preferences"].path, "validation")
    preferences = _sample(preferences, config.evaluation.calibration_users, config.seed)
    pools = list(
        scored_pools(
            log,
            preferences,
            "validation",
            load_density(artifacts, config),
            load_retrieve(artifacts, config),
            mask_seen=config.evaluation.mask_seen,
            chunk=config.evaluation.chunk_users,
        )
    )
    rankings, ndcg = choose_rankings(pools, config)
    inputs = {artifact.name: artifact.digest for artifact in artifacts.values()}
    facts = {"validation_ndcg@10": ndcg, "users": len(preferences)}
    with run.publish("ranking", config_hash=config_hash, inputs=inputs, facts=facts) as folder:
        save_rankings(rankings, folder)
    full = rankings["full_text"]
    training.console.print(
        f"  ranking: preference + {full.draws:g} x draws - {full.error:g} x error, text factor {full.pi:g}",
        highlight=False,
    )


def choose_rankings(pools: list[ScoredPool], config: RunConfig) -> tuple[dict[str, Ranking], dict[str, float]]:
    """Every named ranking and its validation NDCG@10. Of equals the first, hence smallest, weight wins."""
    evaluation = config.evaluation

    def best(candidates: list[Ranking]) -> Ranking:
        return max(candidates, key=lambda ranking: pool_ndcg(pools, ranking))

    full = best([Ranking(1.0, d, e) for d, e in product(evaluation.draws_weights, evaluation.error_weights)])
    rankings = {
        "preference": Ranking(1.0, 0.0, 0.0),
        "draws": Ranking(0.0, 1.0, 0.0),
        "error": Ranking(0.0, 0.0, 1.0),
        "fused_draws": best([Ranking(1.0, d, 0.0) for d in evaluation.draws_weights]),
        "fused_error": best([Ranking(1.0, 0.0, e) for e in evaluation.error_weights]),
        "full": full,
        "full_text": best([replace(full, pi=pi) for pi in evaluation.text_factors]),
    }
    return rankings, {name: round(pool_ndcg(pools, ranking), 6) for name, ranking in rankings.items()}


def pool_ndcg(pools: list[ScoredPool], ranking: Ranking, k: int = 10) -> float:
    """Mean NDCG@k over users; a target outside its pool counts 0. The first k never leave the pool."""
    gains = []
    for each in pools:
        scores = fused_scores(each.pool, each.errors, ranking)
        if ranking.pi:
            scores = hybrid_scores(scores, _matched(each.pool), ranking.pi)
        here = each.pool.ids == each.targets[:, None]
        target = np.where(here, scores, -np.inf).max(axis=1, keepdims=True)
        rank = (scores > target).sum(axis=1) + 1
        gains.append(np.where(here.any(axis=1) & (rank <= k), 1 / np.log2(rank + 1), 0.0))
    return float(np.concatenate(gains).mean())


def _matched(pool: Pool) -> ndarray:
    return np.stack([np.isin(ids, match) for ids, match in zip(pool.ids, pool.matches, strict=True)])


def _sample(preferences: Preferences, limit: int, seed: int) -> Preferences:
    if len(preferences) <= limit:
        return preferences
    rows = np.sort(np.random.default_rng((seed, 30)).choice(len(preferences), limit, replace=False))
    return Preferences(
        preferences.users[rows],
        preferences.targets[rows],
        preferences.vectors[rows],
        [preferences.texts[row] for row in rows],
    )
