"""The average of weights along their way: what is kept of a training at a constant rate, whose last step is noise."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

# In step s nothing older than some s / 10 steps weighs much, so that the start is forgotten.
EARLY = 10


@torch.no_grad()
def update_average(average: Iterable[Tensor], weights: Iterable[Tensor], decay: float, step: int) -> None:
    """One step, the first is 1, of the exponential moving average: `a <- d a + (1 - d) w` in place, d = the smaller of
    `decay` and `step / (step + 10)`."""
    torch._foreach_lerp_(list(average), list(weights), 1.0 - min(decay, step / (step + EARLY)))
