"""Who has what, and nothing else: enough to plan with, in a fraction of the time that preparing takes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ctd_scale.batches import Catalogue, InteractionLog
from ctd_scale.config import InteractionsConfig
from ctd_scale.interactions.reading import pieces_of, read_piece
from ctd_scale.interactions.schema import BadInputError, as_text
from ctd_scale.interactions.sequences import k_core
from ctd_scale.interactions.sources import find_source, resolve_columns
from ctd_scale.interactions.split import require_targets, withheld_users


def sketch_log(config: InteractionsConfig) -> InteractionLog:
    """The log that `prepare_interactions` would make, but for its order, times, titles, and rows that are bad in other
    ways than an id; of a split at two times, which are not read, with the targets of `leave_one_out`. Ids are counted,
    not kept. Raises BadInputError as that does, or where nothing is left.

    Memory: about 30 bytes per row and the distinct ids.
    """
    source = find_source(config)
    columns = resolve_columns(source)
    known = pa.concat_arrays(list(_column(source.items, "item", columns))).unique().drop_null()
    user_parts, item_parts = [], []
    for users, items in zip(
        _column(source.interactions, "user", columns), _column(source.interactions, "item", columns), strict=True
    ):
        user_parts.append(users.dictionary_encode())
        item_parts.append(pc.index_in(items, value_set=known).fill_null(-1))
    encoded = pa.chunked_array(user_parts).unify_dictionaries().combine_chunks() if user_parts else None
    if encoded is None:
        raise BadInputError(f"{', '.join(source.interactions)}: no interactions (0 rows)")
    users = np.asarray(encoded.indices.fill_null(-1), np.int64)
    items = np.concatenate([np.asarray(part, np.int64) for part in item_parts])
    good = (users >= 0) & (items >= 0)
    users, items = users[good], items[good]
    num_users, num_items = len(encoded.dictionary), len(known)
    limits = config.min_user_interactions, config.min_item_interactions
    kept_users, kept_items = k_core(lambda: [(users, items)], num_users, num_items, *limits)
    core = kept_users[users] & kept_items[items]
    users, items = users[core], items[core]
    if config.min_item_interactions > 1:
        items, num_items = (np.cumsum(kept_items) - 1)[items], int(kept_items.sum())
    users = (np.cumsum(kept_users) - 1)[users]
    if not len(users):
        raise BadInputError("no interactions are left to plan with; `ctd data` says what became of the rows")
    lengths = np.bincount(users)
    names = [""] * num_items
    log = InteractionLog(
        np.concatenate([[0], np.cumsum(lengths)]),
        items[np.argsort(users, kind="stable")].astype(np.int32),
        [""] * len(lengths),
        Catalogue(names, names, names),
    )
    if config.split == "leave_one_out":
        require_targets(log)
    return replace(log, withheld=withheld_users(log, config.withheld_users)) if config.withheld_users else log


def _column(paths: Sequence[str], name: str, columns: dict[str, str]) -> Iterator[pa.Array]:
    """One column of all files as text, in batches."""
    for piece in pieces_of(paths):
        for batch in read_piece(piece, {name: columns[name]}):
            yield as_text(batch.column(name))
