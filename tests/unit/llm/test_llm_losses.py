"""The sampled softmax estimates the full one."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from ctd_scale.llm.losses import sampled_softmax_loss, softmax_loss

ITEMS, DIM, BATCH = 40, 6, 3
TEMPERATURE = torch.tensor(0.5)


@pytest.fixture
def drawn() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    return torch.randn(BATCH, DIM), torch.randn(ITEMS, DIM), torch.tensor([4, 11, 4])


def test_the_full_softmax_by_hand(drawn: tuple[torch.Tensor, ...]) -> None:
    preferences, vectors, targets = drawn
    for got, preference, target in zip(softmax_loss(*drawn, TEMPERATURE), preferences, targets, strict=True):
        scores = [math.exp(F.cosine_similarity(preference, vector, dim=0) / 0.5) for vector in vectors]
        assert got.item() == pytest.approx(-math.log(scores[target] / sum(scores)), rel=1e-4)
    scaled = softmax_loss(3 * preferences, 5 * vectors, targets, TEMPERATURE)
    assert torch.allclose(scaled, softmax_loss(*drawn, TEMPERATURE), atol=1e-5), "a cosine knows no length"


def test_with_every_item_as_a_negative_it_is_the_full_softmax(drawn: tuple[torch.Tensor, ...]) -> None:
    every = torch.randperm(ITEMS)
    assert torch.allclose(
        sampled_softmax_loss(*drawn, TEMPERATURE, every), softmax_loss(*drawn, TEMPERATURE), atol=1e-5
    )
    twice = torch.cat([every, every])  # each counts half
    assert torch.allclose(
        sampled_softmax_loss(*drawn, TEMPERATURE, twice), softmax_loss(*drawn, TEMPERATURE), atol=1e-5
    )


def test_the_partition_sum_is_estimated_without_bias(drawn: tuple[torch.Tensor, ...]) -> None:
    preferences, vectors, targets = drawn
    logits = F.normalize(preferences, dim=1) @ F.normalize(vectors, dim=1).T / TEMPERATURE
    positive = logits[torch.arange(BATCH), targets]
    generator = torch.Generator().manual_seed(1)
    estimates = []
    for _ in range(1500):
        negatives = torch.randint(ITEMS, (16,), generator=generator)
        loss = sampled_softmax_loss(preferences, vectors, targets, TEMPERATURE, negatives)
        estimates.append((loss + positive).exp().numpy())  # loss = log Z - positive
    mean, error = np.mean(estimates, axis=0), np.std(estimates, axis=0) / math.sqrt(len(estimates))
    exact = logits.exp().sum(dim=1).numpy()
    assert (error < 0.02 * exact).all(), "too noisy to tell a bias"
    assert (np.abs(mean - exact) < 4.5 * error).all()


def test_gradients_reach_preferences_vectors_and_temperature(drawn: tuple[torch.Tensor, ...]) -> None:
    preferences, vectors, targets = drawn
    preferences.requires_grad_()
    vectors.requires_grad_()
    temperature = torch.tensor(0.5, requires_grad=True)
    sampled_softmax_loss(preferences, vectors, targets, temperature, torch.tensor([4, 7, 9])).sum().backward()
    assert preferences.grad is not None
    assert preferences.grad.norm(dim=1).min() > 0
    assert vectors.grad is not None
    assert vectors.grad.norm(dim=1).nonzero().flatten().tolist() == [4, 7, 9, 11]
    assert temperature.grad is not None
    assert temperature.grad != 0
