"""Which settings are measured, and which of them a budget chooses."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from threadpoolctl import threadpool_info, threadpool_limits

from ctd_scale.batches import Ranking
from ctd_scale.config import RunConfig, load_config
from ctd_scale.latency import Row, Settings, _one_thread, choose, grid

OWN = Settings(32, 8, 100, 8)
PREFERENCE = Ranking(1.0, 0.0, 0.0)
# The last is worse than the one before it and takes longer.
ROWS = [
    Row(OWN, 5.0, 20.0, 0.30),
    Row(replace(OWN, num_draws=16), 3.0, 9.0, 0.25),
    Row(replace(OWN, num_draws=8), 2.0, 5.0, 0.20),
    Row(replace(OWN, effort=0.5), 2.0, 6.0, 0.19),
]


def test_only_what_the_ranking_weighs_is_varied() -> None:
    config = RunConfig()
    everything = grid(config, Ranking(1.0, 0.5, 0.5), tunable=False)
    assert everything[0] == OWN
    assert len(everything) == len(set(everything)) == 9
    assert everything[-1] == Settings(8, 2, 25, 2)
    assert grid(config, PREFERENCE, tunable=False) == [OWN]
    assert [each.effort for each in grid(config, PREFERENCE, tunable=True)] == [1.0, 0.5, 2.0]
    assert {
        (each.num_draws, each.error_candidates) for each in grid(config, replace(PREFERENCE, graph=1.0), tunable=False)
    } == {
        (32, 100),
        (32, 50),
        (32, 25),
    }
    assert {each.error_evaluations for each in grid(config, replace(PREFERENCE, draws=1.0), tunable=False)} == {8}
    once = load_config(overrides=["diffusion.sampler=distilled"])
    steps = {each.sampling_steps for each in grid(once, replace(PREFERENCE, draws=1.0), tunable=False)}
    assert steps == {8}, "those of the teacher, whom no request asks"
    small = load_config(
        overrides=["diffusion.num_draws=1", "diffusion.sampling_steps=1", "diffusion.error_candidates=7"]
    )
    assert {each.error_candidates for each in grid(small, Ranking(1.0, 0.5, 0.5), tunable=False)} == {7}, "never more"
    assert {each.num_draws for each in grid(small, Ranking(1.0, 0.5, 0.5), tunable=False)} == {1}


def test_settings_take_the_place_of_those_of_the_run() -> None:
    config = RunConfig()
    applied = Settings(3, 2, 50, 4, 0.5).applied(config)
    given = {"num_draws": 3, "sampling_steps": 2, "error_candidates": 50, "error_evaluations": 4}
    assert applied.diffusion.model_dump() == config.diffusion.model_dump() | given
    assert applied.model_copy(update={"diffusion": config.diffusion}) == config


def test_the_best_within_the_budget_is_chosen() -> None:
    assert choose(ROWS, 100) is ROWS[0]
    assert choose(ROWS, 20) is ROWS[0]
    assert choose(ROWS, 19.9) is ROWS[1]
    assert choose(ROWS, 6) is ROWS[2]
    with pytest.raises(ValueError, match=r"target_p99_ms=4: nothing.*p99 5 ms, NDCG@10 0.2 \(num_draws=8, "):
        choose(ROWS, 4)
    assert choose([replace(ROWS[1], ndcg=0.2), ROWS[2]], 100) is ROWS[2], "of equals the fastest"


def test_everything_has_one_thread_while_it_is_measured() -> None:
    def threads(*kinds: str) -> set[int]:
        return {pool["num_threads"] for pool in threadpool_info() if pool["user_api"] in kinds}

    own = torch.get_num_threads()
    with threadpool_limits(2):
        assert threads("blas") == {2}
        with _one_thread():
            assert threads("blas", "openmp") == {torch.get_num_threads()} == {1}
        assert threads("blas") == {2}
    assert torch.get_num_threads() == own
