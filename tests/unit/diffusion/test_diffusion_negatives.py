"""Negatives of the contrastive loss: never the target, and distributed as they should be."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from ctd_scale.diffusion.negatives import HARD_POOL, chosen_negatives, popularity_sums, uniform_negatives

ITEMS, BATCH, COUNT = 12, 4000, 3


@pytest.fixture
def given() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    popularity = torch.tensor([0, 1, 1, 2, 3, 5, 8, 13, 21, 34, 55, 89])
    targets = torch.multinomial(popularity.float(), BATCH, replacement=True)
    return targets, torch.randn(ITEMS, 5), popularity


def drawn(kind: Any, given: Any, seed: int = 0) -> torch.Tensor:
    targets, vectors, popularity = given
    return chosen_negatives(
        kind, targets, COUNT, vectors, popularity_sums(popularity), torch.Generator().manual_seed(seed)
    )


@pytest.mark.parametrize("kind", ["uniform", "popularity", "in_batch", "hard"])
def test_a_negative_is_never_the_target_and_follows_from_the_seed(kind: str, given: Any) -> None:
    found = drawn(kind, given)
    assert found.shape == (BATCH, COUNT)
    assert ((found >= 0) & (found < ITEMS)).all()
    assert not (found == given[0][:, None]).any()
    assert torch.equal(found, drawn(kind, given))
    assert not torch.equal(found, drawn(kind, given, seed=1))


def shares(found: torch.Tensor) -> np.ndarray:
    return torch.bincount(found.flatten(), minlength=ITEMS).double().numpy() / found.numel()


def test_how_often_each_item_is_drawn(given: Any) -> None:
    targets, _, popularity = given
    of_targets = shares(targets)
    uniform = (1 - of_targets) / (ITEMS - 1)
    weights = popularity.double().numpy() ** 0.75
    for kind, chosen in (("popularity", weights / weights.sum()), ("in_batch", of_targets)):
        # Where the target itself comes up, a uniform other one stands in.
        repeated = of_targets * chosen
        stand_ins = (repeated.sum() - repeated) / (ITEMS - 1)
        assert np.abs(shares(drawn(kind, given)) - (chosen - repeated + stand_ins)).max() < 0.015, kind
    assert np.abs(shares(drawn("uniform", given)) - uniform).max() < 0.015
    assert torch.equal(
        uniform_negatives(targets, COUNT, ITEMS, torch.Generator().manual_seed(0)), drawn("uniform", given)
    )
    assert shares(drawn("popularity", given))[0] < 0.05, "nobody chose it: only ever a stand-in"


def test_hard_ones_are_the_nearest_of_their_pool(given: Any) -> None:
    targets, vectors, _ = given
    pool = uniform_negatives(targets, HARD_POOL * COUNT, ITEMS, torch.Generator().manual_seed(0))
    unit = F.normalize(vectors, dim=1).numpy()
    found = drawn("hard", given).numpy()
    for row in range(50):
        nearness = unit[pool[row].numpy()] @ unit[int(targets[row])]
        assert np.allclose(unit[found[row]] @ unit[int(targets[row])], np.sort(nearness)[::-1][:COUNT], atol=1e-6)
