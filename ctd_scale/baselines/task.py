"""What the training loop needs to know of a baseline, and how samples become steps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from jaxtyping import Int64
from numpy import ndarray
from torch import Tensor

# Sequences of like length share a batch; they are sorted within so many batches of a shuffled order.
SORTED_BATCHES = 32


@dataclass(frozen=True)
class Task:
    """A model and its epochs.

    `model(*batch)` is the loss summed over the samples, `model.score(users, histories)` the scores [batch, items] of
    the whole catalogue. `steps(epoch)` gives the samples of each optimizer step, `collate` their tensors, whose first
    axis is cut among the workers; `supervised` counts what the summed loss is divided by. `groups` are the optimizer's
    (default: one of all parameters).
    """

    model: torch.nn.Module
    steps: Callable[[int], list[ndarray]]
    collate: Callable[[ndarray, np.random.Generator], tuple[Tensor, ...]]
    supervised: Callable[[tuple[Tensor, ...]], int]
    groups: list[dict[str, Any]] = field(default_factory=list)
    half_precision: bool = False


def in_order(count: int, batch_size: int, random: np.random.Generator) -> list[ndarray]:
    """All samples once, shuffled, `batch_size` at a time."""
    order = random.permutation(count)
    return [order[start : start + batch_size] for start in range(0, count, batch_size)]


def by_length(lengths: Int64[ndarray, "samples"], batch_size: int, random: np.random.Generator) -> list[ndarray]:
    """All samples once, shuffled, with samples of like length in a batch, the batches in shuffled order."""
    order = random.permutation(len(lengths))
    steps = []
    for start in range(0, len(order), SORTED_BATCHES * batch_size):
        part = order[start : start + SORTED_BATCHES * batch_size]
        part = part[np.argsort(lengths[part], kind="stable")]
        steps += [part[first : first + batch_size] for first in range(0, len(part), batch_size)]
    return [steps[number] for number in random.permutation(len(steps))]
