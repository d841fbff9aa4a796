"""The best documents of a few words, compiled by Numba; untyped here because Numba derives the types.

Postings are columns of a sparse matrix: the documents of word w are `ids[offsets[w] : offsets[w + 1]]`, ascending, and
`impacts` says how much the word adds to the score of each. They are read by windows of neighbouring documents, whose
sums stay in the processor's first cache, the most promising window first. In each, the words that together cannot
lift a document into the list as it is by then are added only to documents that have another word (MaxScore; Turtle and
Flood, 1995, with a bound for every window: Mallia, Ottaviano et al., 2017). The list is that of the full sum.
"""

from __future__ import annotations

import heapq
from typing import NamedTuple

import numba
import numpy as np

compiled = numba.njit(nogil=True, cache=True)

WINDOW = 1 << 14  # documents; their sums take 64 kB
LONG = 8  # a word with more postings than that in a window, on average, has its windows found once and for all
LOOK_UP = 24  # postings that are read in the time of one search for a document
SLACK = 1 - 1e-5  # what rounding may take away from a sum


class Postings(NamedTuple):
    """The matrix, and where each window begins in the words that have many postings."""

    offsets: np.ndarray  # [words + 1]
    ids: np.ndarray  # [postings]
    impacts: np.ndarray  # [postings]
    maxima: np.ndarray  # [words] the largest impact of a word
    rows: np.ndarray  # [words] the row of a word in the tables that follow; -1: it has few postings
    starts: np.ndarray  # [rows, windows + 1] how many of its postings lie before a window
    highest: np.ndarray  # [rows, windows] the largest impact within


def postings_of(offsets: np.ndarray, ids: np.ndarray, impacts: np.ndarray, documents: int) -> Postings:
    """Find the windows of a matrix with so many documents. The tables take at most an eighth of the matrix."""
    offsets = offsets.astype(np.int64)
    windows = max(1, -(-documents // WINDOW))
    lengths = np.diff(offsets)
    long = np.flatnonzero(lengths > LONG * windows)
    rows = np.full(len(lengths), -1, np.int32)
    rows[long] = np.arange(len(long))
    maxima = np.zeros(len(lengths), np.float32)
    starts, highest = np.zeros((len(long), windows + 1), np.int32), np.zeros((len(long), windows), np.float32)
    find_windows(offsets, ids, impacts, maxima, rows, starts, highest)
    return Postings(offsets, ids, impacts, maxima, rows, starts, highest)


@compiled
def find_windows(offsets, ids, impacts, maxima, rows, starts, highest):  # type: ignore[no-untyped-def]
    for word in range(len(rows)):
        for posting in range(offsets[word], offsets[word + 1]):
            maxima[word] = max(maxima[word], impacts[posting])
        if rows[word] >= 0:
            windows_of_word(offsets, ids, impacts, word, starts[rows[word]], highest[rows[word]])


@compiled
def windows_of_word(offsets, ids, impacts, word, starts, highest):  # type: ignore[no-untyped-def]
    first, window = offsets[word], 0
    for posting in range(first, offsets[word + 1]):
        while window < ids[posting] // WINDOW:
            window += 1
            starts[window] = posting - first
        highest[window] = max(highest[window], impacts[posting])
    starts[window + 1 :] = offsets[word + 1] - first


@compiled
def best_documents(words, counts, postings, limit):  # type: ignore[no-untyped-def]
    """The `limit` documents of highest summed impact above 0, best first, ties by number; and these sums.

    `counts` says how often each (distinct) word is asked for.
    """
    offsets, ids, impacts, maxima, rows, starts_of, highest_of = postings
    order = np.argsort(-maxima[words] * counts, kind="mergesort")
    words, counts = words[order], counts[order]
    windows = highest_of.shape[1]
    starts, bounds = np.zeros((len(words), windows + 1), np.int64), np.zeros((len(words), windows), np.float32)
    for place in range(len(words)):
        word = words[place]
        if rows[word] >= 0:
            starts[place], bounds[place] = starts_of[rows[word]], highest_of[rows[word]]
        else:
            windows_of_word(offsets, ids, impacts, word, starts[place], bounds[place])
        starts[place] += offsets[word]
        bounds[place] *= counts[place]
    together = bounds.sum(axis=0)
    best = [(np.float32(0), np.int64(0)) for _ in range(0)]  # a heap of (sum, -document), the worst in front
    least = np.float32(0)
    met, scores = np.empty(WINDOW + 1, np.uint64), np.zeros(WINDOW, np.float32)
    rest = np.zeros(len(words) + 1, np.float32)  # what the words from a place on can add at most
    for window in np.argsort(-together, kind="mergesort"):
        if together[window] == 0 or together[window] < least * SLACK:
            break
        for place in range(len(words) - 1, -1, -1):
            rest[place] = rest[place + 1] + bounds[place, window]
        needed = len(words)
        while needed > 1 and rest[needed - 1] < least * SLACK:
            needed -= 1
        base = np.uint64(window * WINDOW)
        for place in range(needed):
            for posting in range(starts[place, window], starts[place, window + 1]):
                scores[np.uint64(ids[posting]) - base] += impacts[posting] * counts[place]
        number = 0
        for place in range(needed):
            read = ids[starts[place, window] : starts[place, window + 1]]
            number = meet(read, base, scores, (least - rest[needed]) * SLACK, met, number)
        for place in range(needed, len(words)):
            start, stop = starts[place, window], starts[place, window + 1]
            if stop - start > number:
                number = keep_hopeful(met, number, scores, (least - rest[place]) * SLACK)
            add_to_met(met[:number], base, scores, ids[start:stop], impacts[start:stop], counts[place])
        for document in met[:number]:
            score = -scores[document]
            scores[document] = 0
            if score < least:
                continue
            entry = (score, -np.int64(document + base))
            if len(best) < limit:
                heapq.heappush(best, entry)
            elif entry > best[0]:
                heapq.heapreplace(best, entry)
            least = best[0][0] if len(best) == limit else least
    documents, sums = np.empty(len(best), np.int32), np.empty(len(best), np.float32)
    for place in range(len(best) - 1, -1, -1):
        sums[place], document = heapq.heappop(best)
        documents[place] = -document
    return documents, sums


@compiled
def meet(ids, base, scores, least, met, number):  # type: ignore[no-untyped-def]
    """Note each of these documents of a window that has at least this sum, once: from here on it is kept below zero.
    All others are back at zero. Without a branch, since which of the two comes next cannot be foretold."""
    for posting in range(len(ids)):
        document = np.uint64(ids[posting]) - base
        score = scores[document]
        hopeful = score > 0 and score >= least
        met[number] = document
        number += hopeful
        scores[document] = -score if hopeful else min(score, np.float32(0))
    return number


@compiled
def keep_hopeful(met, number, scores, least):  # type: ignore[no-untyped-def]
    """Forget what is below `least`, leaving the others in front; returns how many these are."""
    kept = 0
    for place in range(number):
        document = met[place]
        hopeful = -scores[document] >= least
        met[kept] = document
        kept += hopeful
        scores[document] = scores[document] if hopeful else np.float32(0)
    return kept


@compiled
def add_to_met(met, base, scores, ids, impacts, count):  # type: ignore[no-untyped-def]
    """Add a word to the documents that were met, and to no others."""
    if len(met) * LOOK_UP > len(ids):
        for posting in range(len(ids)):
            document = np.uint64(ids[posting]) - base
            score = scores[document]
            scores[document] = score - impacts[posting] * count if score < 0 else score
        return
    for document in met:
        posting = np.searchsorted(ids, document + base)
        if posting < len(ids) and ids[posting] == document + base:
            scores[document] -= impacts[posting] * count
