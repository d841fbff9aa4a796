"""Metrics against hand-made cases and against ir-measures."""

from __future__ import annotations

import ir_measures
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from ctd_scale.metrics import ranks_in_lists, summarise, target_ranks, top_k

INF = np.inf


def scores_of(*rows: list[float]) -> np.ndarray:
    return np.array(rows, dtype=np.float32)


def test_the_best_item_has_rank_one_and_the_worst_the_last() -> None:
    scores = scores_of([0.1, 0.9, 0.5], [0.1, 0.9, 0.5], [0.1, 0.9, 0.5])
    assert target_ranks(scores, np.array([1, 2, 0])).tolist() == [1, 2, 3]


def test_ties_share_their_mean_rank() -> None:
    scores = scores_of([5, 3, 3, 3, 1], [0, 0, 0, 0, 0])
    assert target_ranks(scores, np.array([2, 0])).tolist() == [3, 3]


def test_a_masked_target_is_never_found() -> None:
    assert target_ranks(scores_of([-INF, 1, -INF]), np.array([0])).tolist() == [INF]


def test_masked_items_do_not_push_a_target_down() -> None:
    assert target_ranks(scores_of([-INF, 1, 2, -INF]), np.array([1])).tolist() == [2]


@pytest.mark.parametrize("function", [lambda s: target_ranks(s, np.array([1])), lambda s: top_k(s, 1)])
def test_nan_scores_are_refused(function) -> None:
    with pytest.raises(ValueError, match=r"scores\[0, 2\] is NaN"):
        function(scores_of([1, 2, np.nan]))


@pytest.mark.parametrize("target", [-1, 3])
def test_targets_outside_the_items_are_refused(target: int) -> None:
    with pytest.raises(ValueError, match="expected item indices"):
        target_ranks(scores_of([1, 2, 3]), np.array([target]))


def test_ranks_in_lists() -> None:
    ids = np.array([[7, 3, 5], [7, 3, -1], [-1, -1, -1]], dtype=np.int32)
    assert ranks_in_lists(ids, np.array([5, 5, 5])).tolist() == [3, INF, INF]
    with pytest.raises(ValueError, match="expected item indices"):
        ranks_in_lists(ids, np.array([-1, 1, 1]))


def test_a_summary_by_hand() -> None:
    ranks = np.array([1.0, 3.0, 15.0, INF])
    top10 = np.full((4, 10), -1, dtype=np.int32)
    top10[:3, :2] = [[0, 1], [1, 2], [2, -1]]
    assert summarise(ranks, top10, num_items=12) == pytest.approx(
        {
            "hr@10": 2 / 4,
            "ndcg@10": (1 + 1 / 2) / 4,
            "hr@20": 3 / 4,
            "ndcg@20": (1 + 1 / 2 + 1 / 4) / 4,
            "mrr": (1 + 1 / 3 + 1 / 15) / 4,
            "coverage@10": 3 / 12,
        }
    )


def test_a_tie_across_the_edge_counts_by_its_mean_rank() -> None:
    top10 = np.zeros((1, 10), dtype=np.int32)
    assert summarise(np.array([10.0]), top10, 100)["hr@10"] == 1
    assert summarise(np.array([10.5]), top10, 100)["hr@10"] == 0


def test_no_users_is_an_error() -> None:
    with pytest.raises(ValueError, match="no users"):
        summarise(np.empty(0), np.empty((0, 10), dtype=np.int32), 5)


def test_summaries_equal_ir_measures() -> None:
    rng = np.random.default_rng(3)
    users, items = 200, 60
    scores = rng.permuted(np.tile(np.arange(items, dtype=np.float32), (users, 1)), axis=1)
    scores[rng.random(scores.shape) < 0.2] = -INF
    targets = rng.integers(items, size=users)
    ours = summarise(target_ranks(scores, targets), top_k(scores, 10)[0], items)

    qrels = [ir_measures.Qrel(str(user), str(target), 1) for user, target in enumerate(targets)]
    run = [
        ir_measures.ScoredDoc(str(user), str(item), float(scores[user, item]))
        for user, item in np.argwhere(np.isfinite(scores))
    ]
    names = {
        "hr@10": ir_measures.Success @ 10,
        "hr@20": ir_measures.Success @ 20,
        "ndcg@10": ir_measures.nDCG @ 10,
        "ndcg@20": ir_measures.nDCG @ 20,
        "mrr": ir_measures.RR,
    }
    theirs = ir_measures.calc_aggregate(names.values(), qrels, run)
    assert {name: ours[name] for name in names} == pytest.approx(
        {name: theirs[measure] for name, measure in names.items()}
    )


@given(
    arrays(
        np.float32,
        st.tuples(st.integers(1, 4), st.integers(1, 12)),
        elements=st.sampled_from([-INF, -1, 0, 1]),
    ),
    st.integers(1, 15),
)
def test_top_k_is_a_stable_full_sort_cut_short(scores: np.ndarray, k: int) -> None:
    ids, best = top_k(scores, k)
    assert ids.shape == best.shape == (len(scores), k)
    for row, row_ids, row_best in zip(scores, ids, best, strict=True):
        order = [item for item in sorted(range(len(row)), key=lambda item: -row[item]) if row[item] > -INF][:k]
        padding = k - len(order)
        assert row_ids.tolist() == order + [-1] * padding
        assert row_best.tolist() == [*row[order], *[-INF] * padding]


@given(st.integers(0, 2**32 - 1))
def test_ranks_agree_with_lists_where_nothing_is_tied(seed: int) -> None:
    rng = np.random.default_rng(seed)
    scores = rng.permuted(np.tile(np.arange(20, dtype=np.float32), (5, 1)), axis=1)
    targets = rng.integers(20, size=5)
    ids, _ = top_k(scores, 8)
    full = target_ranks(scores, targets)
    assert np.array_equal(ranks_in_lists(ids, targets), np.where(full <= 8, full, INF))
