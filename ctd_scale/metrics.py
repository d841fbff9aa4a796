"""Full-ranking metrics with one relevant item per user: hit rate, NDCG, MRR and coverage.

Ranks are 1-based. Everything works on one chunk of users at a time; a caller concatenates the ranks of its
chunks and summarises them once.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float32, Float64, Int, Int32
from numpy import ndarray


def target_ranks(scores: Float32[ndarray, "batch items"], targets: Int[ndarray, "batch"]) -> Float64[ndarray, "batch"]:
    """Rank of each target among all items, best first.

    Equal scores share their mean rank: a model that scores everything alike earns the middle of the list, not
    its top. A masked target (score -inf) has rank inf.
    Raises ValueError: a NaN score, or a target outside the items.
    """
    _refuse_nan(scores)
    items = scores.shape[1]
    if targets.size and not 0 <= targets.min() <= targets.max() < items:
        raise ValueError(f"targets span [{targets.min()}, {targets.max()}], expected item indices in [0, {items})")
    of_target = np.take_along_axis(scores, targets[:, None], axis=1)
    higher = (scores > of_target).sum(axis=1)
    others_equal = (scores == of_target).sum(axis=1) - 1
    return np.where(np.isneginf(of_target[:, 0]), np.inf, 1 + higher + others_equal / 2)


def ranks_in_lists(ids: Int32[ndarray, "batch k"], targets: Int[ndarray, "batch"]) -> Float64[ndarray, "batch"]:
    """Rank of each target in an ordered list of item indices (padded with -1); inf where it is absent.

    Raises ValueError: a negative target, which would be found in the padding.
    """
    if targets.size and targets.min() < 0:
        raise ValueError(f"targets hold {targets.min()}, expected item indices >= 0")
    hits = ids == targets[:, None]
    ranks = np.full(len(ids), np.inf)
    rows, columns = np.nonzero(hits)
    np.minimum.at(ranks, rows, columns + 1.0)
    return ranks


def summarise(
    ranks: Float64[ndarray, "users"],
    top10: Int32[ndarray, "users 10"],
    num_items: int,
    ks: Sequence[int] = (10, 20),
) -> dict[str, float]:
    """Means over users: hr@k = [rank <= k], ndcg@k = [rank <= k] / log2(rank + 1), mrr = 1 / rank.

    `coverage@10` is the share of the catalogue that appears in at least one user's first ten (`top10`, padded
    with -1). A rank of inf contributes 0. Raises ValueError: no users.
    """
    if not len(ranks):
        raise ValueError("no users to summarise: ranks is empty")
    summary: dict[str, float] = {}
    gains = 1 / np.log2(ranks + 1)
    for k in ks:
        hits = ranks <= k
        summary[f"hr@{k}"] = float(hits.mean())
        summary[f"ndcg@{k}"] = float(np.where(hits, gains, 0.0).mean())
    summary["mrr"] = float((1 / ranks).mean())
    summary["coverage@10"] = len(np.unique(top10[top10 >= 0])) / num_items
    return summary


def top_k(
    scores: Float32[ndarray, "batch items"], k: int
) -> tuple[Int32[ndarray, "batch k"], Float32[ndarray, "batch k"]]:
    """The k best item indices of each row and their scores, descending; equal scores in index order.

    Masked items (score -inf) and the places beyond the number of items have id -1 and score -inf.
    Raises ValueError: a NaN score.
    """
    _refuse_nan(scores)
    batch, items = scores.shape
    width = min(k, items)
    ids = np.full((batch, k), -1, dtype=np.int32)
    best = np.full((batch, k), -np.inf, dtype=np.float32)
    if width == 0:
        return ids, best
    edge = np.partition(scores, items - width, axis=1)[:, items - width, None]
    chosen = scores >= edge
    # Where several items are tied at the edge, too many are chosen: the last of them by index go.
    crowded = np.flatnonzero(chosen.sum(axis=1) > width)
    tied = scores[crowded] == edge[crowded]
    room = width - (chosen[crowded] & ~tied).sum(axis=1, keepdims=True)
    chosen[crowded] &= ~tied | (np.cumsum(tied, axis=1) <= room)
    columns = np.nonzero(chosen)[1].reshape(batch, width)
    kept = np.take_along_axis(scores, columns, axis=1)
    order = np.argsort(-kept, axis=1, kind="stable")
    best[:, :width] = np.take_along_axis(kept, order, axis=1)
    ids[:, :width] = np.take_along_axis(columns, order, axis=1)
    ids[np.isneginf(best)] = -1
    return ids, best


def _refuse_nan(scores: Float32[ndarray, "batch items"]) -> None:
    # NaN compares false with everything, so that an item scored NaN would pass for the best or for absent.
    missing = np.isnan(scores)
    if missing.any():
        row, item = (int(axis) for axis in np.argwhere(missing)[0])
        raise ValueError(f"scores[{row}, {item}] is NaN, expected a number or -inf for a masked item")
