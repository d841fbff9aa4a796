"""Choose the fusion weights on the validation split, and nothing else on anything else."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from jaxtyping import Float64
from numpy import ndarray
from scipy.optimize import minimize
from scipy.special import log_softmax

from ctd_scale import training
from ctd_scale.artifacts import Run
from ctd_scale.batches import InteractionLog, Preferences, Ranking, Split, save_rankings
from ctd_scale.candidates import Pool, RetrieveStep, fused_scores
from ctd_scale.config import RunConfig
from ctd_scale.recommender import excluded_items, load_density, load_retrieve
from ctd_scale.retrieval.hybrid import hybrid_scores
from ctd_scale.retrieval.neighbors import count_neighbors, scores_of
from ctd_scale.terminal import console

NOTHING = Ranking(0.0, 0.0, 0.0)
# What each kind of ranking weighs beside the preference.
KINDS: dict[str, tuple[str, ...]] = {
    "preference": (),
    "fused_graph": ("graph", "neighbors"),
    "fused_draws": ("draws",),
    "fused_error": ("error",),
    "fused_both": ("draws", "error"),
    "fused_all": ("graph", "neighbors", "draws", "error"),
}
# On squared weights of terms at unit spread: it keeps them finite where a term always puts the withheld item first.
RIDGE = 1e-4
# How much of what all users chose for validation, or of the log, may be unknown at a time while weights are fitted.
UNKNOWN, UNKNOWN_OF_LOG = 0.1, 0.001
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
    # Of `pool.neighbor_scores`, what training alone knows; None: they are that.
    neighbors_before: ndarray | None = None

    def before(self) -> ScoredPool:
        """The same candidates as training alone knows them."""
        if self.neighbors_before is None:
            return self
        return replace(self, pool=replace(self.pool, neighbor_scores=self.neighbors_before))


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
        latest = density.latest(histories, retrieve.retriever.vectors)
        draws = density.draws(vectors, latest=latest)
        pool = retrieve.pool(vectors, texts, excluded_items(histories, mask_seen), draws=draws, histories=histories)
        errors = density.errors(vectors, pool.vectors, latest)
        yield ScoredPool(pool, errors, draws, users, preferences.targets[rows], texts)


def as_served(
    each: ScoredPool, ranking: Ranking, retrieve: RetrieveStep, histories: list[ndarray], *, spoken: bool
) -> ScoredPool:
    """What is left of these candidates for a request under this ranking, with or without a text: none comes from what
    it does not weigh."""
    pool, texts = each.pool, each.texts if spoken else [""] * len(each.texts)
    draws, read = each.draws if ranking.generates else None, histories if ranking.reads_histories else None
    asked = retrieve.pool(pool.preferences, texts, pool.excluded, draws=draws, histories=read)
    found = np.stack([np.isin(row, own) for row, own in zip(pool.ids, asked.ids, strict=True)])
    return replace(each, pool=replace(pool, ids=np.where(found, pool.ids, np.int32(-1))))


def calibration_parts(log: InteractionLog, preferences: Preferences, config: RunConfig) -> list[Preferences]:
    """Some users, or all, in parts whose validation interactions are unknown at the same time."""
    random, limit = np.random.default_rng((config.seed, 30)), config.evaluation.calibration_users
    chosen = random.permutation(len(preferences))[:limit]
    parts = np.array_split(chosen, number_of_parts(log, len(chosen), config))
    return [_some(preferences, np.sort(rows)) for rows in parts]


def number_of_parts(log: InteractionLog, chosen: int, config: RunConfig) -> int:
    """So many that at most a tenth of what all users chose for validation, or a thousandth of the log, is unknown at a
    time; one where nothing is counted anew."""
    if not knows_validation(log, config) or not config.retrieval.neighbors:
        return 1
    unknown = max(UNKNOWN * len(log.split_users("validation")), UNKNOWN_OF_LOG * len(log.items))
    return max(1, math.ceil(chosen / unknown))


def calibration_pools(
    log: InteractionLog, parts: Sequence[Preferences], density: Any, retrieve: RetrieveStep, config: RunConfig
) -> Iterator[ScoredPool]:
    """Pools of the validation users of all parts, for which as much is known as for those of test.

    What is chosen next to an item is counted from the log. At test it knows what all others chose for validation; with
    weights of less than that it would weigh too little. So it is counted anew for each part, without what its users
    chose.
    """
    chunk, mask_seen = config.evaluation.chunk_users, config.evaluation.mask_seen
    before = retrieve.graph.neighbors
    for part in parts:
        if before is None or not knows_validation(log, config):
            yield from scored_pools(log, part, "validation", density, retrieve, mask_seen=mask_seen, chunk=chunk)
            continue
        near = count_neighbors(log, log.lengths_known_beside(part.users), config.retrieval.neighbors)
        then = retrieve.over(retrieve.retriever, replace(retrieve.graph, neighbors=near))
        for each in scored_pools(log, part, "validation", density, then, mask_seen=mask_seen, chunk=chunk):
            said = before.after([log.history(int(user), "validation") for user in each.users])
            yield replace(each, neighbors_before=scores_of(said, each.pool.ids))


def knows_validation(log: InteractionLog, config: RunConfig) -> bool:
    """Whether more is known of others at test than on validation: not where both are asked for at one time for all."""
    return config.evaluation.know_validation and log.cuts is None


def calibrate_ranking(run: Run, config: RunConfig, config_hash: str) -> None:
    """interactions, preferences, models, index -> ranking (named weights, fitted on validation)."""
    artifacts = {name: run.fetch(name) for name in INPUTS}
    for artifact in artifacts.values():
        run.require_made_from(artifact, *(other for other in artifacts.values() if other is not artifact))
    log = InteractionLog.load(artifacts["interactions"].path)
    preferences = Preferences.load(artifacts["preferences"].path, "validation")
    parts = calibration_parts(log, preferences, config)
    scored = calibration_pools(
        log, parts, load_density(artifacts, config), load_retrieve(artifacts, config, "validation"), config
    )
    logs = run.root / "logs" / "calibrate_ranking"
    steps = sum(-(-len(part) // config.evaluation.chunk_users) for part in parts)
    pools = list(training.shown_steps(scored, steps, "calibrate_ranking", logs))
    rankings, ndcg = choose_rankings(pools, config)
    inputs = {artifact.name: artifact.digest for artifact in artifacts.values()}
    facts = {"validation_ndcg@10": ndcg, "users": sum(map(len, parts))}
    with run.publish("ranking", config_hash=config_hash, inputs=inputs, facts=facts) as folder:
        save_rankings(rankings, folder)
    full = rankings["full_text"]
    console.print(
        f"  ranking: preference + {full.graph:.3g} x graph + {full.neighbors:.3g} x neighbors "
        f"+ {full.draws:.3g} x draws - {full.error:.3g} x error, text factor {full.pi:g}",
        highlight=False,
    )


def choose_rankings(pools: list[ScoredPool], config: RunConfig) -> tuple[dict[str, Ranking], dict[str, float]]:
    """Every named ranking and its validation NDCG@10. The weights of a kind are fitted (`fitted_ranking`).

    `full` weighs all that is known of a candidate: the preference, what the graph says of the history, what is chosen
    next to its items, the draws and the denoiser's error; a term that says nothing new is fitted to zero and then costs
    nothing.
    Where all of it together does not rank these users better than the preference alone, `full` is the preference.

    What others chose for validation they chose at the same time, and what all choose at one time is chosen less at
    another. So weights of what they chose count only where they do not rank worse than the preference by what training
    alone knows; else they are fitted to that.
    `full_text`, which is served, adds the text factor with the best NDCG@10, where that is more than noise.
    """
    alone = ("graph", *(("neighbors",) if config.retrieval.neighbors else ()), "draws", "error")
    before = [each.before() for each in pools]
    least = pool_ndcg(before, _only("preference"))
    kinds = {}
    for name, terms in KINDS.items():
        kinds[name] = fitted_ranking(pools, terms)
        if "neighbors" in terms and pool_ndcg(before, kinds[name]) < least:
            kinds[name] = fitted_ranking(before, terms)
    # The fit is by likelihood, which also counts users whose item stays far from the first ten.
    full = max((kinds["preference"], kinds["fused_all"]), key=lambda each: pool_ndcg(before, each))
    spoken = max(
        (replace(full, pi=pi) for pi in config.evaluation.text_factors), key=lambda each: pool_ndcg(pools, each)
    )
    rankings = {
        **{name: _only(name) for name in alone},
        **kinds,
        "full": full,
        "full_text": first_as_good(pools, [full, spoken]),
    }
    return rankings, {name: round(pool_ndcg(pools, ranking), 6) for name, ranking in rankings.items()}


def fitted_ranking(pools: list[ScoredPool], terms: Sequence[str]) -> Ranking:
    """Weights of the preference and the `terms` of `Ranking` by the conditional logit (McFadden, 1974).

    The score of a candidate is `w . x`, x the terms; a softmax over a user's pool makes it the probability of the
    withheld item, whose log is maximised over all users, w >= 0. Every user whose item is in the pool counts, not only
    those in whom it comes near the first ten: fitted on half of the users, such weights rank the other half better than
    those with the best NDCG@10 do. In the end the preference weighs one, unless it weighs nothing.
    """
    names = ("preference", *terms)
    parts = []
    for each in pools:
        here, real = each.pool.ids == each.targets[:, None], each.pool.ids >= 0
        some = here.any(axis=1)
        scores = np.stack([fused_scores(each.pool, each.errors, _only(name)) for name in names], axis=-1)
        parts.append((np.where(real[..., None], scores, 0.0)[some], real[some], here[some].argmax(axis=1)))
    users = sum(len(targets) for _, _, targets in parts)
    if not terms or not users:
        return _only("preference")
    spread = np.concatenate([scores[real] for scores, real, _ in parts]).std(axis=0)
    unit = np.where(spread > 0, spread, 1.0)

    def loss(weights: Float64[ndarray, "terms"]) -> tuple[float, Float64[ndarray, "terms"]]:
        """Negative mean log-probability and its gradient, in weights of the terms at unit spread."""
        value, slope = RIDGE * float(weights @ weights), 2 * RIDGE * weights
        for scores, real, targets in parts:
            scaled = scores / unit
            log_probs = log_softmax(np.where(real, scaled @ weights, -np.inf), axis=1)
            rows = np.arange(len(targets))
            expected = (np.exp(log_probs)[..., None] * scaled).sum(axis=1)
            value -= float(log_probs[rows, targets].sum()) / users
            slope = slope - (scaled[rows, targets] - expected).sum(axis=0) / users
        return value, slope

    bounds = [(0, None)] * len(names)
    fitted = minimize(loss, np.ones(len(names)), jac=True, bounds=bounds, method="L-BFGS-B").x / unit
    if not fitted.any():  # nothing tells the withheld items apart
        return _only("preference")
    fitted = fitted / (fitted[0] or fitted.max())
    # No more digits than the fit is good for.
    return replace(NOTHING, **{name: float(f"{weight:.3g}") for name, weight in zip(names, fitted, strict=True)})


def _only(name: str) -> Ranking:
    return replace(NOTHING, **{name: 1.0})


def first_as_good(pools: list[ScoredPool], rankings: Sequence[Ranking]) -> Ranking:
    """The first of `rankings` whose NDCG@10 is at most one standard error below the best one's.

    The standard error is that of the mean difference over the same users. The best of many always looks better on the
    users that chose it.
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
    """NDCG@k of every user; a target outside its pool counts 0. The first k never leave the pool, whose order decides
    between equal scores, as where answers are ranked."""
    gains = []
    for each in pools:
        scores = fused_scores(each.pool, each.errors, ranking)
        if ranking.pi:
            scores = hybrid_scores(scores, _matched(each.pool), ranking.pi)
        here = each.pool.ids == each.targets[:, None]
        target = np.where(here, scores, -np.inf).max(axis=1, keepdims=True)
        before = np.arange(scores.shape[1]) < here.argmax(axis=1)[:, None]
        rank = ((scores > target) | ((scores == target) & before)).sum(axis=1) + 1
        gains.append(np.where(here.any(axis=1) & (rank <= k), 1 / np.log2(rank + 1), 0.0))
    return np.concatenate(gains)


def _matched(pool: Pool) -> ndarray:
    return np.stack([np.isin(ids, match) for ids, match in zip(pool.ids, pool.matches, strict=True)])


def _some(preferences: Preferences, rows: ndarray) -> Preferences:
    return Preferences(
        preferences.users[rows],
        preferences.targets[rows],
        preferences.vectors[rows],
        [preferences.texts[row] for row in rows],
    )
