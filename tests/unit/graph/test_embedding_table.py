"""Row updates against torch's own optimizers."""

from __future__ import annotations

import pytest
import torch

from ctd_scale.graph import table as table_module
from ctd_scale.graph.table import EmbeddingTable, stochastically_rounded

NODES, DIM, RATE = 7, 3, 0.05
CPU = torch.device("cpu")


def table_and_copy() -> tuple[EmbeddingTable, torch.nn.Embedding]:
    table = EmbeddingTable(NODES, DIM, RATE, CPU, seed=0)
    return table, torch.nn.Embedding.from_pretrained(table.weight.clone(), freeze=False, sparse=True)


def loss_of(rows: torch.Tensor, step: int) -> torch.Tensor:
    return ((rows - step).sin() * torch.arange(1, DIM + 1)).sum()


def test_all_rows_is_adam() -> None:
    table, copy = table_and_copy()
    dense = copy.weight.detach().clone().requires_grad_()
    adam = torch.optim.Adam([dense], lr=RATE)
    everyone = torch.randperm(NODES)
    for step in range(20):
        route = table.route(everyone)
        rows = table.rows(route)
        table.update(route, *torch.autograd.grad(loss_of(rows, step), [rows]))
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
        route = table.route(some)
        rows = table.rows(route)
        table.update(route, *torch.autograd.grad(loss_of(rows, step), [rows]))
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
        route = of.route(nodes)
        rows = of.rows(route)
        of.update(route, *torch.autograd.grad(loss_of(rows, 1), [rows]))

    step(table)
    other = EmbeddingTable(NODES, DIM, RATE, CPU, seed=0)
    other.load_state_dicts([table.state_dict()])
    for _ in range(3):
        step(table)
        step(other)
    assert torch.equal(table.weight, other.weight)


def test_bfloat16_keeps_the_mean_of_what_it_rounds() -> None:
    values = torch.tensor([1.0 + 2**-10, -3.0 - 2**-9, 0.3]).repeat(50_000, 1)
    rounded = stochastically_rounded(values, torch.Generator().manual_seed(0)).float()
    assert set(rounded[:, 0].tolist()) == {1.0, 1.0 + 2**-7}
    error = rounded.std(dim=0) / len(rounded) ** 0.5
    assert ((rounded.mean(dim=0) - values[0]).abs() <= 4 * error).all()
    exact = torch.tensor([[0.5, -2.0, 0.0]])
    assert torch.equal(stochastically_rounded(exact, torch.Generator()).float(), exact)


def test_bfloat16_follows_small_updates_that_rounding_would_lose() -> None:
    table = EmbeddingTable(200, 50, 1e-4, CPU, seed=0, dtype=torch.bfloat16)
    table.weight.fill_(1.0)
    route = table.route(torch.arange(200))
    for _ in range(20):
        table.update(route, torch.ones(200, 50))  # Adam's step is the learning rate, an eightieth of a half unit here
    assert table.weight.float().mean().item() == pytest.approx(1 - 20e-4, abs=2e-4)


def test_parts_of_another_number_of_workers_are_taken_over() -> None:
    whole = EmbeddingTable(NODES, DIM, RATE, CPU, seed=0)
    halves = [EmbeddingTable(NODES, DIM, RATE, CPU, seed=0, rank=rank, world_size=2) for rank in range(2)]
    for rank, half in enumerate(halves):
        assert torch.equal(half.weight, whole.weight[rank::2])
    thirds = [EmbeddingTable(NODES, DIM, RATE, CPU, seed=1, rank=rank, world_size=3) for rank in range(3)]
    for rank, third in enumerate(thirds):
        assert not torch.equal(third.weight, whole.weight[rank::3])
        third.load_state_dicts([half.state_dict() for half in halves])
        assert torch.equal(third.weight, whole.weight[rank::3])


def test_the_compiled_loops_do_what_torch_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """What runs on the CPU against what runs elsewhere, on rows of more and of less than a cache line."""
    for dim in (DIM, 40):
        tables = [EmbeddingTable(50, dim, RATE, CPU, seed=0)]
        with monkeypatch.context() as patch:
            patch.setattr(table_module, "COMPILED_ON", None)
            tables.append(EmbeddingTable(50, dim, RATE, CPU, seed=0))
        torch.manual_seed(1)
        for _ in range(10):
            some, gradients = torch.randperm(50)[:40], torch.randn(40, dim)
            read = []
            for table in tables:
                route = table.route(some)
                read.append(table.rows(route))
                table.update(route, gradients)
            torch.testing.assert_close(read[0], read[1], rtol=1e-5, atol=1e-7)
        for name in ("weight", "first", "second"):
            theirs = tables[1].state_dict()[name]
            torch.testing.assert_close(tables[0].state_dict()[name], theirs, rtol=1e-5, atol=1e-7)
