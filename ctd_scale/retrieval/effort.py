"""How far an engine looks, as a multiple of what its calibration chose."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from typing import Any

from ctd_scale.retrieval.dense import DenseIndex


def has_effort(index: DenseIndex) -> bool:
    """Whether the engine searches more or less of itself; an exact one searches all."""
    return hasattr(getattr(index, "settings", None), "leaves_to_search")


def with_effort(index: DenseIndex, effort: float) -> DenseIndex:
    """The same index searching `effort` times as many leaves, at least one and at most all; what has none as it is."""
    if effort == 1 or not has_effort(index):
        return index
    tuned: Any = copy.copy(index)
    leaves = math.ceil(tuned.settings.leaves_to_search * effort)
    tuned.settings = replace(tuned.settings, leaves_to_search=min(tuned.settings.leaves, max(1, leaves)))
    found: DenseIndex = tuned
    return found
