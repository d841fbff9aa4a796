"""Which epoch is kept: the one whose preferences rank the validation items best. And, where the LLM adds to what a
reader says, how much of it: it learned beside one that knew most answers already.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from jaxtyping import Int64
from numpy import ndarray
from safetensors.torch import load_file, save_file

from ctd_scale import training
from ctd_scale.batches import InteractionLog
from ctd_scale.config import LLMConfig
from ctd_scale.llm import zero
from ctd_scale.llm.collator import Collator, Row
from ctd_scale.ranking import counted_ranks, ndcg_gains

NUMBERS, WEIGHTS = "best.json", "best.safetensors"
SHARES = (1.0, 0.75, 0.5, 0.25)  # of W h that are tried, where a preference begins with what a reader says
PROJECTION = "head.project.weight"


@dataclass
class Best:
    """The best epoch so far, and NDCG@10 after every one that was `validated`, by the step at its end. The `weights`,
    fp32 masters of all that is trained, lie with rank 0 alone."""

    epoch: int = 0
    ndcg: float = -1.0
    share: float = 1.0
    weights: dict[str, torch.Tensor] = field(default_factory=dict)
    validated: dict[str, float] = field(default_factory=dict)

    @classmethod
    def of(cls, epoch: int, ndcg: float, model: torch.nn.Module, share: float = 1.0) -> Best:
        """The model as it is now, with so much of W; every rank must call this."""
        weights = zero.consolidate(model)
        if training.rank() == 0:
            weights[PROJECTION] = share * weights[PROJECTION]
        return cls(epoch, ndcg, share, weights if training.rank() == 0 else {})

    def facts(self) -> dict[str, float]:
        """What the manifest says of it."""
        ndcg = {"validation_ndcg@10": round(self.ndcg, 6)} if self.ndcg >= 0 else {}
        return {"best_epoch": self.epoch, "llm_share": self.share, **ndcg}

    def save(self, folder: Path) -> None:
        """Rank 0's part of a checkpoint."""
        numbers = {"epoch": self.epoch, "ndcg": self.ndcg, "share": self.share, "validated": self.validated}
        (folder / NUMBERS).write_text(json.dumps(numbers))
        if self.weights:
            save_file(self.weights, folder / WEIGHTS)

    @classmethod
    def load(cls, folder: Path) -> Best:
        """What `save` wrote; every rank must know the numbers."""
        kept = training.rank() == 0 and (folder / WEIGHTS).exists()
        return cls(**json.loads((folder / NUMBERS).read_text()), weights=load_file(folder / WEIGHTS) if kept else {})


def validation_ndcg(
    engine: Any,
    log: InteractionLog,
    collator: Collator,
    users: Int64[ndarray, "users"],
    config: LLMConfig,
    *,
    mask_seen: bool,
) -> tuple[float, float]:
    """NDCG@10 of the preference over these users' validation items among all items, and at which share of W h: the
    best of `SHARES` beside a reader, otherwise 1. Each worker ranks its part of the users, and every rank must call
    this."""
    rank, workers = training.rank(), training.world_size()
    most = -(-len(users) // workers)
    own = users[rank::workers]
    histories = [np.asarray(log.history(int(user), "validation")) for user in own]
    targets = log.targets(own, "validation")
    rows = [
        Row(history[-config.max_history :], targets[index : index + 1], user=int(own[index]))
        for index, history in enumerate(histories)
    ]
    order = np.argsort(collator.sizes(rows), kind="stable") if rows else np.zeros(0, np.int64)
    engine.eval()
    with torch.no_grad():
        queries = _preferences(engine, collator, rows, order, most, config.inference_batch)
        vectors, begun = zero.item_space(engine.module.head, [row.items for row in rows], config.inference_batch)
    engine.train()
    directions = F.normalize(vectors.float(), dim=1).cpu().numpy()
    excluded = [history if mask_seen else history[:0] for history in histories]
    shares = SHARES if engine.module.head.reader is not None else SHARES[:1]
    totals = torch.zeros(len(shares), dtype=torch.float64, device=vectors.device)
    if rows:
        for number, share in enumerate(shares):
            asked = queries if begun is None else begun + share * (queries - begun)
            totals[number] = float(ndcg_gains(counted_ranks(directions, asked, targets, excluded)).sum())
    if workers > 1:
        dist.all_reduce(totals)
    best = int(totals.argmax())
    return float(totals[best]) / len(users), shares[best]


def _preferences(
    engine: Any, collator: Collator, rows: Sequence[Row], order: ndarray, most: int, batch: int
) -> ndarray:
    """Of every row, in batches of like length. `most` is the number of rows that any worker has: under ZeRO 3 weights
    are gathered by all, so a worker that has fewer reads along."""
    device = next(engine.module.parameters()).device
    queries = np.zeros((len(rows), engine.module.head.project.out_features), np.float32)
    for start in range(0, most, batch):
        index = order[start : start + batch]
        some = [rows[each] for each in index] or [Row(np.zeros(1, np.int64), np.zeros(1, np.int64))]
        got = engine.module.preferences(collator(some).to(device)).cpu().numpy()
        queries[index] = got[: len(index)]
    return queries
