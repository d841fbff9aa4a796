"""What a preference begins with: the vectors of the latest items, and what attention over all that were read says."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from ctd_scale.llm.losses import softmax_loss
from ctd_scale.llm.model import PreferenceHead, history_encoder, history_widths


@pytest.mark.parametrize(
    ("max_history", "widths"), [(1, [1]), (3, [3]), (4, [4]), (5, [4, 5]), (8, [4, 8]), (50, [4, 8, 16, 32, 50])]
)
def test_widths_of_histories(max_history: int, widths: list[int]) -> None:
    assert history_widths(max_history) == widths


def test_histories_of_unlike_length_are_read_as_each_alone() -> None:
    """Of several widths, in any order; and where a batch has none of some width."""
    torch.manual_seed(0)
    head = PreferenceHead(
        7, torch.randn(9, 5), 0.1, learn_vectors=True, recency=False, history=history_encoder(5, 20, 2)
    )
    lengths = [20, 3, 9, 1, 16, 4]
    recent = torch.full((len(lengths), 20), -1)
    for row, length in enumerate(lengths):
        recent[row, :length] = torch.randint(0, 9, (length,))
    states = torch.randn(len(lengths), 7)
    together = head(states, recent)
    for row, length in enumerate(lengths):
        alone = head(states[row : row + 1], recent[row : row + 1, :length])
        assert torch.allclose(together[row], alone[0], atol=1e-5)


def test_a_preference_begins_with_the_vectors_of_the_latest_items() -> None:
    torch.manual_seed(0)
    vectors, states = 3 * torch.randn(9, 5), torch.randn(3, 7)
    recent = torch.tensor([[4, 2, 2, 8], [0, 6, -1, -1], [5, -1, -1, -1]])
    head = PreferenceHead(7, vectors, 0.1, learn_vectors=True, recency=True)
    torch.nn.init.uniform_(head.recency)
    found = head(states, recent)
    for row, items in enumerate(recent.tolist()):
        expected = head.project(states[row])
        for weight, item in zip(head.recency, items, strict=True):
            if item >= 0:
                expected = expected + weight * vectors[item] / vectors[item].norm()
        assert torch.allclose(found[row], expected, atol=1e-5)
    found.square().sum().backward()
    moved = head.vectors.grad.abs().sum(dim=1) > 0
    assert torch.nonzero(moved).flatten().tolist() == [0, 2, 4, 5, 6, 8], "those that were read, and no other"
    without = PreferenceHead(7, vectors, 0.1, learn_vectors=True, recency=False)
    assert torch.equal(without(states, recent), without.project(states))


def test_a_preference_begins_with_what_all_read_items_say() -> None:
    """Padded in a batch as each history alone; only what was read is moved."""
    torch.manual_seed(0)
    vectors, states = 3 * torch.randn(9, 5), torch.randn(3, 7)
    recent = torch.tensor([[4, 2, 2, 8], [0, 6, -1, -1], [5, -1, -1, -1]])
    history = history_encoder(5, 3, 2)
    head = PreferenceHead(7, vectors, 0.1, learn_vectors=True, recency=False, history=history)
    for parameter in head.history.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    found = head(states, recent)
    for row, items in enumerate([[2, 2, 4], [6, 0], [5]]):  # the oldest first; the first history is longer than is read
        real = torch.ones(1, len(items), dtype=torch.bool)
        said = head.history(head.vectors[items][None], real)[0, -1]
        assert torch.allclose(found[row], head.project(states[row]) + said, atol=1e-5)
    found.square().sum().backward()
    moved = head.vectors.grad.abs().sum(dim=1) > 0
    assert torch.nonzero(moved).flatten().tolist() == [0, 2, 4, 5, 6]
    assert history_encoder(5, 3, 0) is None


def test_what_follows_the_item_before_the_last_is_learned_from_the_read_items() -> None:
    """Next is the last but one, plus one: no sum of weighted vectors says so, and the states here say nothing."""
    random = np.random.default_rng(0)
    items = 12
    recent = torch.from_numpy(random.integers(0, items, (1100, 3)))
    targets = (recent[:, 1] + 1) % items
    shares = {}
    for blocks in (0, 2):
        torch.manual_seed(0)
        head = PreferenceHead(
            4,
            0.1 * torch.randn(items, 16),
            0.1,
            learn_vectors=True,
            recency=True,
            history=history_encoder(16, 3, blocks),
        )
        optimizer = torch.optim.Adam(head.parameters(), lr=3e-3)
        for _ in range(600):
            loss = softmax_loss(
                head(torch.zeros(1000, 4), recent[:1000]), head.item_vectors(), targets[:1000], head.temperature
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        ranked = F.normalize(head(torch.zeros(100, 4), recent[1000:]), dim=1) @ F.normalize(head.vectors, dim=1).T
        shares[blocks] = float((ranked.argmax(dim=1) == targets[1000:]).float().mean())
    assert shares[2] > 0.95 > 0.6 > shares[0]
