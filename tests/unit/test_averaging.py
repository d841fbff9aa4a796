"""The average of weights, by hand and along a whole training."""

from __future__ import annotations

import pytest
import torch

from ctd_scale.averaging import update_average


def test_two_steps_by_hand() -> None:
    average, weights = [torch.tensor([2.0])], [torch.tensor([4.0])]
    update_average(average, weights, 0.75, 100)
    assert average[0].item() == pytest.approx(0.75 * 2 + 0.25 * 4)
    assert weights[0].item() == 4
    update_average(average, weights, 0.0, 100)
    assert average[0].item() == 4


def test_the_start_is_forgotten() -> None:
    """However slow the decay, and though the first weights are far from all others."""
    average = [torch.tensor([1000.0])]
    for step in range(1, 201):
        update_average(average, [torch.tensor([float(step)])], 0.9999, step)
    assert 180 < average[0].item() < 200
