"""Row updates against torch's own optimizers."""

from __future__ import annotations

import torch

from ctd_scale.graph.table import EmbeddingTable

NODES, DIM, RATE = 7, 3, 0.05
CPU = torch.device("cpu")


def table_and_copy() -> tuple[EmbeddingTable, torch.nn.Embedding]:
    torch.manual_seed(0)
    table = EmbeddingTable(NODES, DIM, RATE, CPU)
    return table, torch.nn.Embedding.from_pretrained(table.weight.clone(), freeze=False, sparse=True)


def loss_of(rows: torch.Tensor, step: int) -> torch.Tensor:
    return ((rows - step).sin() * torch.arange(1, DIM + 1)).sum()


def test_all_rows_is_adam() -> None:
    table, copy = table_and_copy()
    dense = copy.weight.detach().clone().requires_grad_()
    adam = torch.optim.Adam([dense], lr=RATE)
    everyone = torch.randperm(NODES)
    for step in range(20):
        rows = table.rows(everyone)
        table.update(everyone, *torch.autograd.grad(loss_of(rows, step), [rows]))
        adam.zero_grad()
        loss_of(dense, step).backward()
        adam.step()
    torch.testing.assert_close(table.weight, dense.detach(), rtol=1e-5, atol=1e-6)


def test_some_rows_is_sparse_adam_and_the_others_stay() -> None:
    table, copy = table_and_copy()
    adam = torch.optim.SparseAdam([copy.weight], lr=RATE)
    for step in range(20):
        some = torch.randperm(NODES)[:3]
        before = table.weight.clone()
        rows = table.rows(some)
        table.update(some, *torch.autograd.grad(loss_of(rows, step), [rows]))
        adam.zero_grad()
        loss_of(copy(some), step).backward()
        adam.step()
        torch.testing.assert_close(table.weight, copy.weight.detach(), rtol=1e-5, atol=1e-6)
        others = torch.ones(NODES, dtype=torch.bool).index_fill_(0, some, False)
        assert torch.equal(table.weight[others], before[others])
        assert not torch.equal(table.weight[some], before[some])


def test_a_state_goes_on_as_if_nothing_had_happened() -> None:
    table, _ = table_and_copy()
    nodes = torch.tensor([5, 1])

    def step(of: EmbeddingTable) -> None:
        rows = of.rows(nodes)
        of.update(nodes, *torch.autograd.grad(loss_of(rows, 1), [rows]))

    step(table)
    other = EmbeddingTable(NODES, DIM, RATE, CPU)
    other.load_state_dict(table.state_dict())
    for _ in range(3):
        step(table)
        step(other)
    assert torch.equal(table.weight, other.weight)
