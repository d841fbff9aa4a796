"""What preparing the interactions will need, from how long it took to look at them."""

from __future__ import annotations

from ctd_scale.batches import InteractionLog
from ctd_scale.config import InteractionsConfig
from ctd_scale.estimates import Estimate
from ctd_scale.interactions.sources import find_source

# Checking, sorting and hashing take about this many times as long as reading two columns (3M rows of Parquet: 2.2 s to
# read, 22 s to prepare, of which Ray needs eight to start).
TIMES_READING = 6.0
BYTES_PER_ROW = 250.0
STARTING_SECONDS = 8.0


def plan_interactions(log: InteractionLog, config: InteractionsConfig, reading: float) -> Estimate:
    """`reading` seconds were spent on the two columns of ids."""
    rows = len(log.items)
    return Estimate(
        "prepare_interactions",
        STARTING_SECONDS + TIMES_READING * reading,
        BYTES_PER_ROW * rows,
        12.0 * rows + 60.0 * (log.num_users + log.num_items),
        f"{rows:,} rows of {len(find_source(config).interactions)} file(s); rough, from {reading:.1f} s to read ids",
    )
