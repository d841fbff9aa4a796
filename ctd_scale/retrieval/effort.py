"""How far an engine looks, as a multiple of what its calibration chose."""

from __future__ import annotations

import math
from dataclasses import replace

from ctd_scale.retrieval.dense import DenseIndex
from ctd_scale.retrieval.remote import RemoteIndex
from ctd_scale.retrieval.segments import PartialIndex, SegmentedIndex
from ctd_scale.retrieval.tree_index import TreeIndex


def has_effort(index: DenseIndex) -> bool:
    """Whether the engine searches more or less of itself; an exact one searches all."""
    if isinstance(index, PartialIndex):
        return has_effort(index.index)
    if isinstance(index, SegmentedIndex):
        return any(map(has_effort, index.segments))
    return isinstance(index, TreeIndex | RemoteIndex)


def with_effort(index: DenseIndex, effort: float) -> DenseIndex:
    """The same index searching `effort` times as many leaves, at least one and at most all; what has none as it is."""
    if isinstance(index, PartialIndex):
        return replace(index, index=with_effort(index.index, effort))
    if isinstance(index, SegmentedIndex):
        return replace(index, segments=[with_effort(segment, effort) for segment in index.segments])
    if isinstance(index, RemoteIndex):
        return replace(index, effort=index.effort * effort)
    if effort == 1 or not isinstance(index, TreeIndex):
        return index
    leaves = min(index.settings.leaves, max(1, math.ceil(index.settings.leaves_to_search * effort)))
    return replace(index, settings=replace(index.settings, leaves_to_search=leaves))
