"""What preparing the interactions will need, from how long it took to look at them."""

from __future__ import annotations

from ctd_scale.batches import InteractionLog
from ctd_scale.config import InteractionsConfig
from ctd_scale.estimates import Estimate
from ctd_scale.interactions.parts import count_parts
from ctd_scale.interactions.sources import find_source

# Checking, dividing, sorting and writing take about this many times as long as reading two columns, with two processes
# at it (50M rows of Parquet: 58 s to read, 94 s to prepare).
TIMES_READING = 1.6
STARTING_SECONDS = 5.0
# The process itself, its ids and titles, the rows of one part; then the files that are sorted aside, and the log.
BASE_BYTES = 500e6
BYTES_PER_ID = 200.0
BYTES_PER_SORTED_ROW = 100.0
SCRATCH_BYTES_PER_ROW = 60.0
LOG_BYTES_PER_ROW = 12.0


def plan_interactions(log: InteractionLog, config: InteractionsConfig, reading: float) -> Estimate:
    """`reading` seconds were spent on the two columns of ids."""
    rows, ids, paths = len(log.items), log.num_users + log.num_items, find_source(config).interactions
    return Estimate(
        "prepare_interactions",
        STARTING_SECONDS + TIMES_READING * reading,
        BASE_BYTES + BYTES_PER_ID * ids + BYTES_PER_SORTED_ROW * rows / count_parts(paths),
        (SCRATCH_BYTES_PER_ROW + LOG_BYTES_PER_ROW) * rows + 60.0 * ids,
        f"{rows:,} rows of {len(paths)} file(s); rough, from {reading:.1f} s to read ids",
    )
