"""Layer-0 embeddings of all nodes, spread over the workers. A step reads, sends and updates only the rows it touched.

Every row has one owner: node v lies on worker `v % world_size`. A worker asks the owners for the rows of its minibatch
and sends their gradients back, so memory falls with the number of workers, and what is sent grows with the rows touched
and not with the table.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from jaxtyping import Float, Int
from torch import Tensor

from ctd_scale.graph import kernels

BETAS = (0.9, 0.999)
EPS = 1e-8
INITIAL_STD = 0.1
# Where Numba's loops read the rows and make the step, in one pass over them; torch's step needs ten.
COMPILED_ON = ("cpu", torch.float32)
# Initial values are drawn for so many nodes at a time, the same on every number of workers.
DRAWN_AT_ONCE = 65_536


@dataclass(frozen=True)
class Route:
    """Who owns the nodes of a minibatch: `order` sorts them by owner, `wanted` are the own rows that others ask for."""

    order: Tensor
    sent: list[int]
    received: list[int]
    wanted: Int[Tensor, "wanted"]


class EmbeddingTable:
    """This worker's rows with Adam's moments. Lazy: a row that no minibatch touched neither moves nor forgets.

    Memory: 12 bytes per own row and dimension, or 6 in bfloat16. What is stored in bfloat16 is rounded at random, up or
    down, so that the mean is right: rounding to the nearest would lose every small update.
    """

    def __init__(
        self,
        num_nodes: int,
        embed_dim: int,
        learning_rate: float,
        device: torch.device,
        *,
        seed: int,
        dtype: torch.dtype = torch.float32,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self._rank, self._world_size, self._seed = rank, world_size, seed
        self._learning_rate, self._step, self._num_nodes = learning_rate, 0, num_nodes
        self._compiled = (device.type, dtype) == COMPILED_ON
        own = len(range(rank, num_nodes, world_size))
        self.weight = torch.empty(own, embed_dim, device=device, dtype=dtype)
        self._first, self._second = torch.zeros_like(self.weight), torch.zeros_like(self.weight)
        generator = torch.Generator().manual_seed(seed)
        for start in range(0, num_nodes, DRAWN_AT_ONCE):
            count = min(DRAWN_AT_ONCE, num_nodes - start)
            drawn = torch.randn(count, embed_dim, generator=generator)[(rank - start) % world_size :: world_size]
            first = len(range(rank, start, world_size))
            self.weight[first : first + len(drawn)] = (INITIAL_STD * drawn).to(device, dtype)

    def route(self, nodes: Int[Tensor, "nodes"]) -> Route:
        """Tell the owners which of their rows are needed. `nodes` are distinct; every worker must call this."""
        if self._world_size == 1:
            return Route(torch.empty(0, dtype=torch.long), [len(nodes)], [len(nodes)], nodes)
        owner = nodes % self._world_size
        order = owner.argsort(stable=True)
        sizes = owner.bincount(minlength=self._world_size)
        asked = torch.empty_like(sizes)
        dist.all_to_all_single(asked, sizes)
        sent, received = sizes.tolist(), asked.tolist()
        wanted = _exchanged((nodes // self._world_size)[order], sent, received)
        return Route(order, sent, received, wanted)

    def rows(self, route: Route) -> Float[Tensor, "nodes embed_dim"]:
        """The rows of the route's nodes in float32, as a leaf whose gradient `update` takes."""
        if self._compiled:
            rows = self.weight.new_empty(len(route.wanted), self.weight.shape[1])
            kernels.gather_rows(route.wanted.numpy(), self.weight.numpy(), rows.numpy())
        else:
            rows = self.weight.index_select(0, route.wanted).float()
        if self._world_size > 1:
            by_owner = _exchanged(rows, route.received, route.sent)
            rows = torch.empty_like(by_owner)
            rows[route.order] = by_owner
        return rows.requires_grad_()

    @torch.no_grad()
    def update(self, route: Route, gradients: Float[Tensor, "nodes embed_dim"]) -> None:
        """One step of Adam (Kingma and Ba, 2015) with the mean of the workers' gradients, on the rows they touched."""
        rows = route.wanted
        if self._world_size > 1:
            parts = _exchanged(gradients[route.order], route.sent, route.received)
            rows, place = route.wanted.unique(return_inverse=True)
            gradients = parts.new_zeros(len(rows), parts.shape[1]).index_add_(0, place, parts).div_(self._world_size)
        self._step += 1
        size = self._learning_rate / (1 - BETAS[0] ** self._step)
        spread = (1 - BETAS[1] ** self._step) ** -0.5
        if self._compiled:
            columns = [column.numpy() for column in (self.weight, self._first, self._second)]
            numbers = [np.float32(number) for number in (*BETAS, *(1 - beta for beta in BETAS), size, spread, EPS)]
            kernels.adam_rows(rows.numpy(), gradients.numpy(), *columns, *numbers)
            return
        first = self._first[rows].float().lerp_(gradients, 1 - BETAS[0])
        second = self._second[rows].float().mul_(BETAS[1]).addcmul_(gradients, gradients, value=1 - BETAS[1])
        weight = self.weight[rows].float().sub_(size * first / (second.sqrt() * spread + EPS))
        generator = torch.Generator(rows.device).manual_seed(hash((self._seed, self._step, self._rank)) % 2**63)
        for column, values in ((self._first, first), (self._second, second), (self.weight, weight)):
            column[rows] = stochastically_rounded(values, generator) if column.dtype == torch.bfloat16 else values

    def state_dict(self) -> dict[str, Any]:
        """This worker's part."""
        return {"weight": self.weight, "first": self._first, "second": self._second, "step": self._step}

    def load_state_dicts(self, parts: list[dict[str, Any]]) -> None:
        """Take over what all workers of a run saved, in the order of their ranks; there may have been more or fewer."""
        self._step = parts[0]["step"]
        for rank, part in enumerate(parts):
            theirs = torch.arange(rank, self._num_nodes, len(parts))
            mine = (theirs % self._world_size == self._rank).nonzero().squeeze(1)
            rows = theirs[mine] // self._world_size
            for name, values in (("weight", self.weight), ("first", self._first), ("second", self._second)):
                values[rows.to(values.device)] = part[name][mine].to(values.device)


def _exchanged(values: Tensor, sent: list[int], received: list[int]) -> Tensor:
    """What the other workers sent here, by rank; `values` are sorted by the worker that they go to."""
    out = values.new_empty(sum(received), *values.shape[1:])
    dist.all_to_all_single(out, values.contiguous(), received, sent)
    return out


def stochastically_rounded(values: Float[Tensor, "*shape"], generator: torch.Generator) -> Float[Tensor, "*shape"]:
    """To bfloat16, up with the probability that keeps the mean: noise below the bits that stay, then cut."""
    bits = values.view(torch.int32)
    noise = torch.randint(0, 1 << 16, bits.shape, dtype=torch.int32, device=values.device, generator=generator)
    return ((bits + noise) & -(1 << 16)).view(torch.float32).to(torch.bfloat16)
