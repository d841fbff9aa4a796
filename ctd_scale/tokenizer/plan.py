"""What the tokenizer stage will need."""

from __future__ import annotations

import torch

from ctd_scale.config import TokenizerConfig
from ctd_scale.estimates import Estimate, seconds_per_call
from ctd_scale.tokenizer.kway import KWayTokenizer, draw_mask
from ctd_scale.tokenizer.train import CHUNK, SIDES, _Losses


def plan_tokenizer(nodes: int, embed_dim: int, token_dim: int, config: TokenizerConfig, write: float) -> Estimate:
    """`nodes` users and items together; `write` seconds per byte on disk."""
    models = [_Losses(KWayTokenizer(embed_dim, token_dim, config.num_ways, config.hidden_dim)) for _ in SIDES]
    optimizer = torch.optim.AdamW([parameter for model in models for parameter in model.parameters()], fused=True)
    generator = torch.Generator().manual_seed(0)
    batch = torch.randn(config.batch_size, embed_dim, generator=generator)

    def step() -> None:
        masked = draw_mask((config.batch_size, embed_dim), config.mask_ratio, generator, torch.device("cpu"))
        optimizer.zero_grad(set_to_none=True)
        torch.stack([sum(model(batch, masked), torch.zeros(())) for model in models]).sum().backward()
        optimizer.step()

    stepping = seconds_per_call(step)
    rows = torch.randn(CHUNK, embed_dim)
    with torch.inference_mode():
        encoding = seconds_per_call(lambda: models[0].model.encode(rows)) / CHUNK
    token_bytes = 4.0 * nodes * config.num_ways * token_dim
    seconds = config.steps * stepping + 2 * nodes * encoding + 3 * token_bytes * write
    return Estimate(
        "train_tokenizer",
        seconds,
        4.0 * nodes * embed_dim,
        token_bytes,
        f"{config.steps:,} steps of {1000 * stepping:.0f} ms; tokens of {nodes:,} users and items",
    )
