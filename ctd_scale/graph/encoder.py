"""LightGCN (He et al., 2020): the mean over propagation layers. It has no weights but the layer-0 embeddings."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ctd_scale.graph import kernels


class WeightedSum(torch.autograd.Function):
    """A sparse CSR matrix times a dense one on the CPU. The gradient walks the same rows, so nothing is transposed."""

    @staticmethod
    def forward(ctx: Any, block: Tensor, values: Tensor) -> Tensor:
        ctx.parts = tuple(part.numpy() for part in (block.crow_indices(), block.col_indices(), block.values()))
        ctx.shape = values.shape
        out = values.new_empty(block.shape[0], values.shape[1])
        kernels.sum_sources(*ctx.parts, values.numpy(), out.numpy())
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, Tensor]:
        (gradient,) = gradients
        out = gradient.new_zeros(ctx.shape)
        kernels.sum_targets(*ctx.parts, gradient.contiguous().numpy(), out.numpy())
        return None, out


class LightGCN(nn.Module):
    """`e_v^(l+1) = sum_{w in N(v)} e_w^(l) / sqrt(d_v d_w)`; the output is the mean of layers 0 to num_layers."""

    def forward(
        self,
        layer0: Float[Tensor, "nodes embed_dim"],
        seeds: Float[Tensor, "seeds embed_dim"],
        blocks: Sequence[Tensor],
    ) -> Float[Tensor, "seeds embed_dim"]:
        """The encoded seeds. `seeds` are their rows of layer 0, its first; each block is a CSR matrix [targets, nodes].

        The caller cuts `seeds` out once: each cut costs a gradient of the size of all rows.
        """
        layer, total = layer0, seeds
        for block in blocks:
            # The same sum; with it a step on the CPU takes two thirds of the time.
            layer = WeightedSum.apply(block, layer) if layer.device.type == "cpu" else _convolution()(layer, block)
            total = total + layer[: len(seeds)]
        return total / (len(blocks) + 1)


@cache
def _convolution() -> nn.Module:
    """PyG's, without weights. Importing it takes seconds, and a worker on a CPU needs none."""
    from torch_geometric.nn import LGConv

    # The blocks carry their weights: normalisation needs the degrees of the whole graph, not of the sample.
    return LGConv(normalize=False)
