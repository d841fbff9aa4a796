"""Full-catalogue ranking of withheld items, a chunk of users at a time: whatever gives scores is ranked alike."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
from jaxtyping import Float32, Float64, Int, Int32, Int64
from numpy import ndarray
from scipy import sparse

from ctd_scale.batches import InteractionLog, Split, read_table, write_table
from ctd_scale.metrics import summarise, target_ranks, top_k

# (user indices, their histories) -> scores [batch, items], higher is better.
Scorer = Callable[[ndarray, list[ndarray]], Float32[ndarray, "batch items"]]
TOP = 10
RARE = 5
CHUNK_ROWS = 4096
# Scores that are held at once: 256 MiB of float32, however large the catalogue is.
BLOCK_SCORES, BLOCK_ITEMS = 1 << 26, 1 << 16


@dataclass(frozen=True)
class Ranks:
    """Where each user's withheld item came (1-based, inf where it cannot come), and the first ten items shown."""

    ranks: Float64[ndarray, "users"]
    top: Int32[ndarray, "users 10"]
    seconds: float

    def gains(self, k: int = TOP) -> Float64[ndarray, "users"]:
        """NDCG@k of each user."""
        return ndcg_gains(self.ranks, k)

    def summary(self, num_items: int) -> dict[str, float]:
        """Metrics over the users, and the seconds that ranking took."""
        return {**summarise(self.ranks, self.top, num_items), "seconds": round(self.seconds, 3)}


def rank_targets(
    log: InteractionLog,
    scorer: Scorer,
    split: Split,
    *,
    mask_seen: bool,
    chunk_users: int,
    users: Int64[ndarray, "users"] | None = None,
) -> Ranks:
    """Rank the split's withheld items, of some of its users or of all. Memory: scores of `chunk_users` users, or of
    fewer where the catalogue is so large that they were more than `BLOCK_SCORES`.

    With `mask_seen` the items of a user's history cannot come back; a target among them has rank inf.
    """
    started = time.perf_counter()
    users = log.split_users(split) if users is None else users
    chunk_users = max(1, min(chunk_users, BLOCK_SCORES // log.num_items))
    ranks, top = [np.zeros(0)], [np.zeros((0, TOP), np.int32)]
    for start in range(0, len(users), chunk_users):
        chunk = users[start : start + chunk_users]
        histories = [np.asarray(log.history(int(user), split)) for user in chunk]
        scores = np.array(scorer(chunk, histories), np.float32)
        if mask_seen:
            lengths = [len(history) for history in histories]
            scores[np.repeat(np.arange(len(chunk)), lengths), np.concatenate(histories)] = -np.inf
        ranks.append(target_ranks(scores, log.targets(chunk, split)))
        top.append(padded(top_k(scores, TOP)[0]))
    return Ranks(np.concatenate(ranks), np.concatenate(top), time.perf_counter() - started)


def validation_users(log: InteractionLog, limit: int, seed: int) -> Int64[ndarray, "users"]:
    """All users with a validation item, or `limit` of them at random: who chooses between epochs."""
    users = log.split_users("validation")
    if len(users) <= limit:
        return users
    return np.sort(np.random.default_rng((seed, 43)).choice(users, limit, replace=False))


def counted_ranks(
    vectors: Float32[ndarray, "items dim"],
    queries: Float32[ndarray, "users dim"],
    targets: Int[ndarray, "users"],
    excluded: Sequence[Int32[ndarray, "_"]],
) -> Float64[ndarray, "users"]:
    """The place of each target among all items by `query . vector`, equal ones in index order; inf where the target is
    excluded. What is better is counted, and no list is made."""
    blocks = [np.arange(start, min(start + BLOCK_ITEMS, len(vectors))) for start in range(0, len(vectors), BLOCK_ITEMS)]
    wanted = np.zeros((len(queries), 1), np.float32)
    for ids in blocks:
        mine = (targets >= ids[0]) & (targets <= ids[-1])
        if mine.any():  # by the same product as the others below: items of one vector must have one score
            wanted[mine, 0] = (queries @ vectors[ids[0] : ids[-1] + 1].T)[mine, targets[mine] - ids[0]]
    better = np.zeros(len(queries), np.int64)
    for ids in blocks:
        scores = queries @ vectors[ids[0] : ids[-1] + 1].T
        better += ((scores > wanted) | ((scores == wanted) & (ids < targets[:, None]))).sum(axis=1)
        for user, out in enumerate(excluded):
            out = np.unique(out[(out >= ids[0]) & (out <= ids[-1])])
            own = scores[user, out - ids[0]]
            better[user] -= int(((own > wanted[user]) | ((own == wanted[user]) & (out < targets[user]))).sum())
    gone = np.array([target in out for target, out in zip(targets.tolist(), excluded, strict=True)], bool)
    return np.where(gone, np.inf, better + 1.0)


def beyond_accuracy(log: InteractionLog, split: Split, ranks: Ranks) -> dict[str, float | None]:
    """What the first ten items are like, and whether rare ones are found, by the training interactions alone, so that
    it means the same for every model:

    - `diversity@10`: 1 - the mean cosine between two shown items, as sets of the users who chose them;
    - `popularity@10`: the mean share of the catalogue that was chosen less often than a shown item;
    - `rare_hr@10`: hit rate over the targets with fewer than `RARE` interactions; None where there are none.
    """
    users, items = log.train_edges()
    counts = np.bincount(items, minlength=log.num_items)
    below = np.searchsorted(np.sort(counts), counts) / log.num_items
    shown = ranks.top >= 0
    chosen = np.maximum(ranks.top, 0)
    rare = counts[log.targets(log.split_users(split), split)] < RARE
    return {
        "diversity@10": 1 - _mean_cosine(users, items, ranks.top, log.num_items),
        "popularity@10": float(below[chosen][shown].mean()) if shown.any() else None,
        "rare_hr@10": float((ranks.ranks[rare] <= TOP).mean()) if rare.any() else None,
    }


def _mean_cosine(users: ndarray, items: ndarray, top: Int32[ndarray, "rows 10"], num_items: int) -> float:
    """Mean over all rows and pairs of two shown items. The squared length of a sum of unit vectors is their number plus
    twice the sum over their pairs."""
    seen = sparse.csr_array((np.ones(len(items), np.float32), (items, users)), shape=(num_items, users.max() + 1))
    seen.data[:] = 1
    lengths = np.sqrt(np.maximum(seen.sum(axis=1), 1))
    seen = sparse.csr_array(seen / lengths[:, None])
    rows, places = np.nonzero(top >= 0)
    total, pairs = 0.0, 0
    for start in range(0, len(top), CHUNK_ROWS):
        mine = (rows >= start) & (rows < start + CHUNK_ROWS)
        some = rows[mine] - start
        chosen = top[rows[mine], places[mine]]
        picked = sparse.csr_array((np.ones(len(some), np.float32), (some, chosen)), shape=(CHUNK_ROWS, num_items))
        sums = picked @ seen
        # An item that nobody chose is like no other, itself included.
        known = np.bincount(some, weights=np.diff(seen.indptr)[chosen] > 0, minlength=CHUNK_ROWS)
        squared = np.asarray(sums.multiply(sums).sum(axis=1)).ravel()
        counted = np.bincount(some, minlength=CHUNK_ROWS)
        total += float((squared - known).sum()) / 2
        pairs += int((counted * (counted - 1) // 2).sum())
    return total / max(1, pairs)


def ndcg_gains(ranks: Float64[ndarray, "users"], k: int = TOP) -> Float64[ndarray, "users"]:
    """`1 / log2(rank + 1)` where the rank is at most k, else 0."""
    return np.where(ranks <= k, 1 / np.log2(ranks + 1), 0.0)


def padded(ids: Int32[ndarray, "batch k"]) -> Int32[ndarray, "batch 10"]:
    """Exactly ten columns, -1 where there are fewer items."""
    width = max(0, TOP - ids.shape[1])
    return np.pad(ids[:, :TOP], ((0, 0), (0, width)), constant_values=-1).astype(np.int32)


def save_ranks(users: ndarray, ranks: Mapping[str, Iterable[float]], file: Path) -> None:
    """One column of ranks per model, one row per user: what a comparison over the same users needs."""
    columns = {name: pa.array(np.asarray(values, np.float32)) for name, values in ranks.items()}
    write_table(pa.table({"user_index": pa.array(users), **columns}), file)


def load_ranks(file: Path) -> dict[str, Float32[ndarray, "users"]]:
    """What `save_ranks` wrote, `user_index` included."""
    table = read_table(file)
    return {name: table[name].to_numpy() for name in table.column_names}
