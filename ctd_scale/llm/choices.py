"""Which word may come next where a text must be the answer about some item of the catalogue."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jaxtyping import Int32, Int64
from numpy import ndarray

# Fewer answers than this are looked through again rather than remembered.
SMALL = 1000


class Begun(NamedTuple):
    """The answers that begin with the words said so far: rows low to high of the sorted table, `said` words long."""

    low: int
    high: int
    said: int


class AnswerChoices:
    """All answers in lexicographic order, so that those with a common beginning lie together (a trie without nodes).

    Greedy decoding over it names only items that exist. Memory: 4 bytes per item and word of the longest answer.
    """

    def __init__(self, answers: Int32[ndarray, "answer_ids"], offsets: Int64[ndarray, "offsets"]) -> None:
        lengths = np.diff(offsets)
        words = np.full((len(lengths), int(lengths.max(initial=0))), -1, np.int32)
        items = np.repeat(np.arange(len(lengths)), lengths)
        words[items, np.arange(len(answers)) - np.repeat(offsets[:-1], lengths)] = answers
        order = np.lexsort(words.T[::-1])
        self._columns: Int32[ndarray, "words items"] = np.ascontiguousarray(words[order].T)
        self._known: dict[Begun, tuple[Int32[ndarray, "choices"], Int64[ndarray, "bounds"]]] = {}

    @classmethod
    def of(
        cls,
        answers: Int32[ndarray, "answer_ids"],
        offsets: Int64[ndarray, "offsets"],
        items: Int64[ndarray, "shortlist"],
    ) -> AnswerChoices:
        """The answers of these items alone, of a table of many."""
        parts = [answers[offsets[item] : offsets[item + 1]] for item in items.tolist()]
        return cls(np.concatenate(parts), np.cumsum([0, *map(len, parts)]))

    def start(self) -> Begun:
        return Begun(0, self._columns.shape[1], 0)

    def words(self, begun: Begun) -> Int32[ndarray, "choices"]:
        """The words that some answer goes on with, ascending."""
        return self._branches(begun)[0]

    def after(self, begun: Begun, choice: int) -> Begun:
        """What is left once the `choice`-th of `words` was said."""
        low, high = self._branches(begun)[1][choice : choice + 2].tolist()
        return Begun(low, high, begun.said + 1)

    def _branches(self, begun: Begun) -> tuple[Int32[ndarray, "choices"], Int64[ndarray, "bounds"]]:
        if begun not in self._known:
            column = self._columns[begun.said, begun.low : begun.high]
            starts = np.flatnonzero(np.diff(column, prepend=-2))
            found = column[starts], begun.low + np.append(starts, len(column))
            if begun.high - begun.low < SMALL:
                return found
            self._known[begun] = found  # near the root: many rows, met by every answer
        return self._known[begun]
