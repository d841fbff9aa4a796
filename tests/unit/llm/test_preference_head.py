"""What a preference begins with: the vectors of the latest items (a reader's: test_history.py)."""

from __future__ import annotations

import torch

from ctd_scale.llm.model import PreferenceHead


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
