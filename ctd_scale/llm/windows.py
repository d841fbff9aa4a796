"""Which part of which history goes into which optimizer step.

A window is n consecutive items of a user's training sequence plus the one that follows: the preference after each
of the n items is trained on its successor, all prefixes in one causal pass. The plan of an epoch depends on (seed,
epoch) alone, so that a resumed run sees what the uninterrupted one saw.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Int64
from numpy import ndarray

from ctd_scale.config import LLMConfig

# Of the places that are read, the share that may hold nothing.
MAX_PADDING = 0.04


@dataclass(frozen=True)
class Windows:
    """Windows as columns: inputs are `items[starts : starts + lengths]`, targets the same shifted by one.

    `firsts` is the first supervised input of the window (earlier ones are context only).
    """

    users: Int64[ndarray, "windows"]
    starts: Int64[ndarray, "windows"]
    lengths: Int64[ndarray, "windows"]
    firsts: Int64[ndarray, "windows"]
    answers: Bool[ndarray, "windows"]

    def __len__(self) -> int:
        return len(self.users)

    def take(self, index: Int64[ndarray, "picked"]) -> Windows:
        return Windows(*(getattr(self, name)[index] for name in self.__dataclass_fields__))


def training_windows(train_lengths: Int64[ndarray, "users"], config: LLMConfig, seed: int, epoch: int) -> Windows:
    """Cut every training sequence into windows of at most `max_history` inputs, at a random phase per user and epoch.

    Every prefix is supervised exactly once per epoch (of the latest `max_windows` windows, where that is set).
    Every `text_every`-th window also carries a text answer about its last target.
    """
    random = np.random.default_rng((seed, 10, epoch))
    size = config.max_history
    phases = random.integers(0, size, len(train_lengths))
    users, starts, lengths = [], [], []
    for user, length in enumerate(train_lengths.tolist()):
        inputs = length - 1  # the last item is a target only
        if inputs < 1:
            continue
        if inputs <= size:
            cuts = [0, inputs]
        else:
            first = int(phases[user]) or size
            cuts = [0, *range(first, inputs, size), inputs]
        if config.max_windows:
            cuts = cuts[-(config.max_windows + 1) :]
        users.extend([user] * (len(cuts) - 1))
        starts.extend(cuts[:-1])
        lengths.extend(np.diff(cuts).tolist())
    answers = random.integers(0, config.text_every, len(users)) == 0
    return Windows(
        np.array(users, np.int64),
        np.array(starts, np.int64),
        np.array(lengths, np.int64),
        np.zeros(len(users), np.int64),
        answers if config.text_weight > 0 else np.zeros(len(users), bool),
    )


def export_windows(train_lengths: Int64[ndarray, "users"], config: LLMConfig) -> Windows:
    """Windows that give every training prefix once, with at least half a window of context where there is that much.

    The condition that the diffusion model trains on must look like the one it meets when it serves: read after a
    real history, not after the two items that a window happens to begin with.
    """
    size, stride = config.max_history, max(1, config.max_history // 2)
    users, starts, lengths, firsts = [], [], [], []
    for user, length in enumerate(train_lengths.tolist()):
        inputs = length - 1
        done = 0
        if config.max_windows:
            done = max(0, inputs - config.max_windows * size)
        while done < inputs:
            end = min(inputs, done + (size if done == 0 else stride))
            start = max(0, end - size)
            users.append(user)
            starts.append(start)
            lengths.append(end - start)
            firsts.append(done - start)
            done = end
    return Windows(
        np.array(users, np.int64),
        np.array(starts, np.int64),
        np.array(lengths, np.int64),
        np.array(firsts, np.int64),
        np.zeros(len(users), bool),
    )


def plan_steps(
    sizes: Int64[ndarray, "windows"], batch_tokens: int, random: np.random.Generator
) -> list[Int64[ndarray, "picked"]]:
    """Window numbers of each optimizer step: equal shares of the shuffled windows, about `batch_tokens` tokens each.

    A step is a sample of all windows, whatever their length.
    """
    order = random.permutation(len(sizes))
    before = np.cumsum(sizes[order]) - sizes[order]
    steps = max(1, round(int(sizes.sum()) / batch_tokens))
    share = before * steps // max(1, int(sizes.sum()))
    return [part for part in np.split(order, np.flatnonzero(np.diff(share)) + 1) if len(part)]


def pack(sizes: Int64[ndarray, "rows"], parts: int) -> list[list[list[int]]]:
    """Row numbers laid into lines of nearly equal length, as many lines in each of so many parts.

    The shortest lines of which at most `MAX_PADDING` is padding, else those with the least: the longest rows are
    dealt first, each to the line that has the fewest tokens (LPT; Graham, 1969). Lines and parts may be empty where
    there are fewer rows than parts.
    """
    longest_first = np.argsort(-sizes, kind="stable").tolist()
    best: list[list[int]] = []
    least = np.inf
    lines = -(-len(sizes) // parts) * parts
    while lines >= parts and least > MAX_PADDING:
        dealt: list[list[int]] = [[] for _ in range(lines)]
        filled = [(0, line) for line in range(lines)]
        for row in longest_first:
            tokens, line = heapq.heappop(filled)
            dealt[line].append(row)
            heapq.heappush(filled, (tokens + int(sizes[row]), line))
        padding = 1 - float(sizes.sum()) / (lines * max(tokens for tokens, _ in filled))
        if padding < least:
            least, best = padding, [dealt[line] for _, line in sorted(filled, reverse=True)]
        lines = min(lines - parts, int(0.9 * lines) // parts * parts)
    each = len(best) // parts
    return [best[part * each : (part + 1) * each] for part in range(parts)]
