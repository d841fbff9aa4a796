"""Of whom items are withheld, and where a log is cut when the same times hold for all users."""

from __future__ import annotations

from datetime import datetime, timezone

import numpy as np
from jaxtyping import Int64
from numpy import ndarray

from ctd_scale.batches import MIN_SPLIT_LENGTH, SPLITS, InteractionLog
from ctd_scale.interactions.schema import BadInputError

# The cut is made at one of so many equal steps between the first and the last time; of ten years one is 80 minutes.
STEPS = 1 << 16
CHUNK = 1 << 20
# Of the years 1 to 9999, which dates have.
FIRST_SECOND, LAST_SECOND = -62_135_596_800, 253_402_300_800


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


def require_targets(log: InteractionLog) -> None:
    """Raises BadInputError where nobody has a target in one of the splits."""
    for split in SPLITS:
        if len(log.split_users(split)):
            continue
        if log.cuts is None:
            raise BadInputError(
                f"none of {log.num_users:,} users has {MIN_SPLIT_LENGTH} interactions (the most is "
                f"{int(np.diff(log.offsets).max())}), so there is nothing to hold out; give longer histories"
            )
        raise BadInputError(
            f"none of {log.num_users:,} users was active before {as_date(log.cuts[0])} and in the {split} period "
            f"(from {as_date(log.cuts[SPLITS.index(split)])}); use interactions.split='leave_one_out' or another "
            "interactions.withheld_fraction"
        )


def as_date(microseconds: int) -> str:
    """ISO 8601, UTC; of what is in no calendar, the seconds."""
    if not FIRST_SECOND <= microseconds / 1e6 < LAST_SECOND:
        return f"{microseconds / 1e6:g} s after 1970 (were the times given in milliseconds?)"
    return datetime.fromtimestamp(microseconds / 1e6, tz=timezone.utc).isoformat(timespec="seconds")
