"""LightGCN (He et al., 2020): layer-0 embeddings and the mean over propagation layers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch_geometric.nn import LGConv

# One hop as tensors: edge_index [2, messages] (source, target positions), weights [messages], number of targets.
BlockTensors = tuple[Tensor, Tensor, int]


class LightGCN(nn.Module):
    """`e_v^(l+1) = sum_{w in N(v)} e_w^(l) / sqrt(d_v d_w)`; the output is the mean of layers 0 to num_layers."""

    def __init__(self, num_nodes: int, embed_dim: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(num_nodes, embed_dim)
        nn.init.normal_(self.embedding.weight, std=0.1)
        # The blocks carry their weights: normalisation needs the degrees of the whole graph, not of the sample.
        self.conv = LGConv(normalize=False)

    def forward(
        self, nodes: Int[Tensor, "nodes"], blocks: Sequence[BlockTensors], num_seeds: int
    ) -> tuple[Float[Tensor, "seeds embed_dim"], Float[Tensor, "seeds embed_dim"]]:
        """Encoded seeds, and their layer-0 rows (for the L2 term)."""
        layer = self.embedding(nodes)
        rows = layer[:num_seeds]
        total = rows
        for edge_index, weights, num_targets in blocks:
            layer = self.conv(layer, edge_index, weights)[:num_targets]
            total = total + layer[:num_seeds]
        return total / (len(blocks) + 1), rows

    @torch.no_grad()
    def layer0(self) -> Float[Tensor, "nodes embed_dim"]:
        return self.embedding.weight.detach().cpu()
