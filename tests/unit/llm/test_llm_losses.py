"""The sampled softmax estimates the full one."""

from __future__ import annotations

import math
from typing import Any

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
    expected = 0.0
    for preference, target in zip(preferences, targets, strict=True):
        scores = [math.exp(F.cosine_similarity(preference, vector, dim=0) / 0.5) for vector in vectors]
        expected -= math.log(scores[target] / sum(scores))
    assert softmax_loss(*drawn, TEMPERATURE).item() == pytest.approx(expected, rel=1e-4)
    scaled = softmax_loss(3 * preferences, 5 * vectors, targets, TEMPERATURE)
    assert torch.allclose(scaled, softmax_loss(*drawn, TEMPERATURE), atol=1e-5), "a cosine knows no length"


@pytest.mark.parametrize("max_logits", [1, 2 * ITEMS, 2 * ITEMS + 5, 1 << 24])
def test_in_chunks_it_is_the_plain_cross_entropy_with_its_gradients(
    drawn: tuple[torch.Tensor, ...], max_logits: int
) -> None:
    temperature = torch.tensor(0.5)
    got, expected = [], []
    for found in (got, expected):
        inputs = [part.clone().requires_grad_() for part in (drawn[0], drawn[1], temperature)]
        preferences, vectors, scale = inputs
        if found is got:
            loss = softmax_loss(preferences, vectors, drawn[2], scale, max_logits)
        else:
            logits = F.normalize(preferences, dim=1) @ F.normalize(vectors, dim=1).T / scale
            loss = F.cross_entropy(logits, drawn[2], reduction="sum")
        found += [loss, *torch.autograd.grad(0.3 * loss, inputs)]
    for one, other in zip(got, expected, strict=True):
        assert torch.allclose(one, other, atol=1e-5)


def test_it_stays_in_float32_where_the_caller_does_not(drawn: tuple[torch.Tensor, ...]) -> None:
    preferences, vectors, targets = drawn
    found = []
    for enabled in (False, True):
        leaf = preferences.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            loss = softmax_loss(leaf, vectors, targets, TEMPERATURE)
        found.append((loss, *torch.autograd.grad(loss, [leaf])))
    for plain, mixed in zip(*found, strict=True):
        assert torch.equal(plain, mixed)


def test_logits_of_all_positions_never_exist_together() -> None:
    """A million logits in chunks of a thousand: the largest tensor that is made is a chunk or a gradient."""
    made: list[int] = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            made.extend(part.numel() for part in torch.utils._pytree.tree_leaves(out) if torch.is_tensor(part))
            return out

    preferences, vectors = torch.randn(1000, 4, requires_grad=True), torch.randn(1000, 4, requires_grad=True)
    targets = torch.arange(1000)
    with Watch():
        softmax_loss(preferences, vectors, targets, TEMPERATURE, 2000).backward()
    assert 2000 <= max(made) <= 4000


def sampled(
    preferences: torch.Tensor,
    vectors: torch.Tensor,
    targets: torch.Tensor,
    temperature: torch.Tensor,
    negatives: torch.Tensor,
) -> torch.Tensor:
    return sampled_softmax_loss(
        preferences, lambda items: vectors[items], len(vectors), targets, temperature, negatives
    )


def test_with_every_item_as_a_negative_it_is_the_full_softmax(drawn: tuple[torch.Tensor, ...]) -> None:
    every = torch.randperm(ITEMS)
    assert torch.allclose(sampled(*drawn, TEMPERATURE, every), softmax_loss(*drawn, TEMPERATURE), atol=1e-5)
    twice = torch.cat([every, every])  # each counts half
    assert torch.allclose(sampled(*drawn, TEMPERATURE, twice), softmax_loss(*drawn, TEMPERATURE), atol=1e-5)


def test_the_partition_sum_is_estimated_without_bias(drawn: tuple[torch.Tensor, ...]) -> None:
    preferences, vectors, targets = drawn
    logits = F.normalize(preferences, dim=1) @ F.normalize(vectors, dim=1).T / TEMPERATURE
    positive = logits[torch.arange(BATCH), targets]
    generator = torch.Generator().manual_seed(1)
    estimates = []
    for _ in range(1500):
        negatives = torch.randint(ITEMS, (16,), generator=generator)
        rows = [slice(row, row + 1) for row in range(BATCH)]
        losses = [sampled(preferences[row], vectors, targets[row], TEMPERATURE, negatives) for row in rows]
        estimates.append((torch.stack(losses) + positive).exp().numpy())  # loss = log Z - positive
    mean, error = np.mean(estimates, axis=0), np.std(estimates, axis=0) / math.sqrt(len(estimates))
    exact = logits.exp().sum(dim=1).numpy()
    assert (error < 0.02 * exact).all(), "too noisy to tell a bias"
    assert (np.abs(mean - exact) < 4.5 * error).all()


def test_gradients_reach_preferences_vectors_and_temperature(drawn: tuple[torch.Tensor, ...]) -> None:
    preferences, vectors, targets = drawn
    preferences.requires_grad_()
    vectors.requires_grad_()
    temperature = torch.tensor(0.5, requires_grad=True)
    sampled(preferences, vectors, targets, temperature, torch.tensor([4, 7, 9])).backward()
    assert preferences.grad is not None
    assert preferences.grad.norm(dim=1).min() > 0
    assert vectors.grad is not None
    assert vectors.grad.norm(dim=1).nonzero().flatten().tolist() == [4, 7, 9, 11]
    assert temperature.grad is not None
    assert temperature.grad != 0
