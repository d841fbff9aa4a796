"""Layer-0 embeddings of all nodes. A step reads, sends and updates only the rows that it touched."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Float, Int
from torch import Tensor

BETAS = (0.9, 0.999)
EPS = 1e-8


class EmbeddingTable:
    """Rows with Adam's moments. Lazy: a row that no minibatch touched neither moves nor forgets.

    Every worker holds the whole table: 12 bytes per node and dimension. Workers that begin with the same seed stay
    equal, because each applies the gradients of all.
    """

    def __init__(self, num_nodes: int, embed_dim: int, learning_rate: float, device: torch.device) -> None:
        self.weight = torch.empty(num_nodes, embed_dim, device=device).normal_(std=0.1)
        self._first, self._second = torch.zeros_like(self.weight), torch.zeros_like(self.weight)
        self._learning_rate, self._step = learning_rate, 0

    def rows(self, nodes: Int[Tensor, "nodes"]) -> Float[Tensor, "nodes embed_dim"]:
        """The rows of some nodes, as a leaf whose gradient `update` takes."""
        return self.weight[nodes].requires_grad_()

    @torch.no_grad()
    def update(self, nodes: Int[Tensor, "nodes"], gradients: Float[Tensor, "nodes embed_dim"]) -> None:
        """One step of Adam (Kingma and Ba, 2015) on the rows of `nodes`, which must be distinct."""
        self._step += 1
        first = self._first[nodes].lerp_(gradients, 1 - BETAS[0])
        second = self._second[nodes].mul_(BETAS[1]).addcmul_(gradients, gradients, value=1 - BETAS[1])
        self._first[nodes], self._second[nodes] = first, second
        size = self._learning_rate / (1 - BETAS[0] ** self._step)
        spread = second.sqrt_().div_((1 - BETAS[1] ** self._step) ** 0.5).add_(EPS)
        self.weight[nodes] -= first.div_(spread).mul_(size)

    def state_dict(self) -> dict[str, Any]:
        return {"weight": self.weight, "first": self._first, "second": self._second, "step": self._step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, values in (("weight", self.weight), ("first", self._first), ("second", self._second)):
            values.copy_(state[name])
        self._step = state["step"]


def mean_over_workers(
    nodes: Int[Tensor, "nodes"], gradients: Float[Tensor, "nodes embed_dim"]
) -> tuple[Int[Tensor, "all_nodes"], Float[Tensor, "all_nodes embed_dim"]]:
    """The mean of all workers' gradients, by node. What is sent grows with the rows touched, not with the table."""
    world_size = dist.get_world_size()
    sizes = torch.zeros(world_size, dtype=torch.long, device=nodes.device)
    sizes[dist.get_rank()] = len(nodes)
    dist.all_reduce(sizes)
    longest = int(sizes.max())
    padded_nodes, padded = nodes.new_zeros(longest), gradients.new_zeros(longest, gradients.shape[1])
    padded_nodes[: len(nodes)], padded[: len(nodes)] = nodes, gradients
    every_node = [torch.empty_like(padded_nodes) for _ in range(world_size)]
    every = [torch.empty_like(padded) for _ in range(world_size)]
    dist.all_gather(every_node, padded_nodes)
    dist.all_gather(every, padded)
    real = sizes.tolist()
    joined = torch.cat([part[:size] for part, size in zip(every_node, real, strict=True)])
    values = torch.cat([part[:size] for part, size in zip(every, real, strict=True)])
    touched, place = joined.unique(return_inverse=True)
    total = values.new_zeros(len(touched), values.shape[1]).index_add_(0, place, values)
    return touched, total / world_size
