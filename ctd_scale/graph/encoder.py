"""LightGCN (He et al., 2020): the mean over propagation layers. It has no weights but the layer-0 embeddings."""

from __future__ import annotations

from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor, nn
from torch_geometric.nn import LGConv

# One hop as tensors: edge_index [2, messages] (source, target positions), weights [messages], number of targets.
BlockTensors = tuple[Tensor, Tensor, int]


class LightGCN(nn.Module):
    """`e_v^(l+1) = sum_{w in N(v)} e_w^(l) / sqrt(d_v d_w)`; the output is the mean of layers 0 to num_layers."""

    def __init__(self) -> None:
        super().__init__()
        # The blocks carry their weights: normalisation needs the degrees of the whole graph, not of the sample.
        self.conv = LGConv(normalize=False)

    def forward(
        self, layer0: Float[Tensor, "nodes embed_dim"], blocks: Sequence[BlockTensors], num_seeds: int
    ) -> Float[Tensor, "seeds embed_dim"]:
        """The encoded seeds, which are the first of the nodes."""
        layer, total = layer0, layer0[:num_seeds]
        for edge_index, weights, num_targets in blocks:
            layer = self.conv(layer, edge_index, weights)[:num_targets]
            total = total + layer[:num_seeds]
        return total / (len(blocks) + 1)
