"""Of whom items are withheld, and where a log is cut when the same times hold for all users."""

from __future__ import annotations

import numpy as np
from jaxtyping import Int64
from numpy import ndarray

from ctd_scale.batches import SPLITS, InteractionLog

# The cut is made at one of so many equal steps between the first and the last time; of ten years one is 80 minutes.
STEPS = 1 << 16
CHUNK = 1 << 20


def time_cuts(times: Int64[ndarray, "interactions"], withheld: float) -> tuple[int, int]:
    """(where validation begins, where test begins): each is to hold about the share `withheld` of all interactions.

    Memory: one chunk of times, however long the log is.
    """
    first, last = int(times.min()), int(times.max())
    width = max(1, -(-(last - first + 1) // STEPS))
    counts = np.zeros(STEPS, np.int64)
    for start in range(0, len(times), CHUNK):
        steps = (np.asarray(times[start : start + CHUNK]) - first) // width
        counts += np.bincount(steps, minlength=STEPS)
    # Interactions that are older than the beginning of each step.
    older = np.concatenate([[0], np.cumsum(counts)])
    validation, test = (int(np.abs(older - (1 - parts * withheld) * len(times)).argmin()) for parts in (2, 1))
    return first + validation * width, first + test * width


def withheld_users(log: InteractionLog, limit: int) -> Int64[ndarray, "withheld"]:
    """At most `limit` of the users that have a target, the same ones whatever the seed of a run: ranks over the same
    users can be compared."""
    users = np.union1d(*(log.split_users(split) for split in SPLITS))
    if len(users) <= limit:
        return users
    return np.sort(np.random.default_rng(0).choice(users, limit, replace=False))
