"""Choose the fusion weights on the validation split, and nothing else on anything else."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import numpy as np
from jaxtyping import Float64
from numpy import ndarray

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
from ctd_scale.terminal import console

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
        histories = [log.history(int(user), split) for user in users]
        draws = density.draws(vectors)
        pool = retrieve.pool(vectors, texts, excluded_items(histories, mask_seen), draws=draws, histories=histories)
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
    console.print(
        f"  ranking: preference + {full.graph:.3g} x graph + {full.draws:g} x draws - {full.error:g} x error, "
        f"text factor {full.pi:g}",
        highlight=False,
    )


def choose_rankings(pools: list[ScoredPool], config: RunConfig) -> tuple[dict[str, Ranking], dict[str, float]]:
    """Every named ranking and its validation NDCG@10. Within a kind the best weight wins, of equals the smallest.

    `full`, which is served, is the cheapest kind within one standard error of the best: the preference alone, then
    with what the graph says of the history, with draws, with the denoiser's error of every candidate, with both of
    these, with all. `full_text` adds a text factor by that rule. Of all three the graph's weight is chosen first, then
    the other two beside it, then the graph's again: a grid of all would find more of what is chance.
    """
    evaluation = config.evaluation
    draws = [0.0, *(weight for weight in evaluation.draws_weights if weight)]
    errors = [0.0, *(weight for weight in evaluation.error_weights if weight)]
    unit = graph_unit(pools)
    graphs = [0.0, *(weight * unit for weight in evaluation.graph_weights if weight)]

    def best(candidates: Iterable[Ranking]) -> Ranking:
        return max(candidates, key=lambda ranking: pool_ndcg(pools, ranking))

    def fused(draws: Sequence[float], errors: Sequence[float], graphs: Sequence[float]) -> Ranking:
        return best(Ranking(1.0, d, e, graph=g) for d, e, g in product(draws, errors, graphs))

    fused_graph = fused([0.0], [0.0], graphs)
    beside = fused(draws, errors, [fused_graph.graph])
    kinds = {
        "preference": Ranking(1.0, 0.0, 0.0),
        "fused_graph": fused_graph,
        "fused_draws": fused(draws, [0.0], [0.0]),
        "fused_error": fused([0.0], errors, [0.0]),
        "fused_both": fused(draws, errors, [0.0]),
        "fused_all": fused([beside.draws], [beside.error], graphs),
    }
    full = cheapest_as_good(pools, list(kinds.values()))
    spoken = best(replace(full, pi=pi) for pi in evaluation.text_factors)
    rankings = {
        "graph": Ranking(0.0, 0.0, 0.0, graph=1.0),
        "draws": Ranking(0.0, 1.0, 0.0),
        "error": Ranking(0.0, 0.0, 1.0),
        **kinds,
        "full": full,
        "full_text": cheapest_as_good(pools, [full, spoken]),
    }
    return rankings, {name: round(pool_ndcg(pools, ranking), 6) for name, ranking in rankings.items()}


def graph_unit(pools: list[ScoredPool]) -> float:
    """By what the graph's scores are multiplied to vary as the preference's do, over all candidates."""
    real = [each.pool.ids >= 0 for each in pools]
    spreads = [
        float(np.concatenate([getattr(each.pool, name)[some] for each, some in zip(pools, real, strict=True)]).std())
        for name in ("cosines", "graph_scores")
    ]
    return spreads[0] / spreads[1] if spreads[1] else 1.0


def cheapest_as_good(pools: list[ScoredPool], rankings: Sequence[Ranking]) -> Ranking:
    """The first of `rankings`, in order of cost, whose NDCG@10 is at most one standard error below the best one's.

    The standard error is that of the mean difference over the same users. A grid of more weights always looks better
    on the users that chose it; less than its noise is no reason to pay for it.
    """
    gains = [pool_gains(pools, ranking) for ranking in rankings]
    best = max(gains, key=lambda each: float(each.mean()))
    for ranking, each in zip(rankings, gains, strict=True):
        behind = best - each
        if behind.mean() <= behind.std() / np.sqrt(len(behind)):
            return ranking
    raise ValueError("no rankings to choose from")


def pool_ndcg(pools: list[ScoredPool], ranking: Ranking, k: int = 10) -> float:
    """Mean of `pool_gains`."""
    return float(pool_gains(pools, ranking, k).mean())


def pool_gains(pools: list[ScoredPool], ranking: Ranking, k: int = 10) -> Float64[ndarray, "_"]:
    """NDCG@k of every user; a target outside its pool counts 0. The first k never leave the pool."""
    gains = []
    for each in pools:
        scores = fused_scores(each.pool, each.errors, ranking)
        if ranking.pi:
            scores = hybrid_scores(scores, _matched(each.pool), ranking.pi)
        here = each.pool.ids == each.targets[:, None]
        target = np.where(here, scores, -np.inf).max(axis=1, keepdims=True)
        rank = (scores > target).sum(axis=1) + 1
        gains.append(np.where(here.any(axis=1) & (rank <= k), 1 / np.log2(rank + 1), 0.0))
    return np.concatenate(gains)


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
