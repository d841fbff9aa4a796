"""The match set of a text: the items whose title and category it names, by BM25.

Which words count is decided once, when the index is built: a word outside the vocabulary matches nothing.
"""

from __future__ import annotations

import logging
import re
from pathlib import Path

import bm25s
import numpy as np
from bm25s.stopwords import STOPWORDS_EN
from jaxtyping import Float32, Int32
from numpy import ndarray

from ctd_scale.batches import Catalogue
from ctd_scale.retrieval.postings import best_documents

# The constant part of a generated answer: it says nothing about any item.
ANSWER_TEMPLATE = "The user might like products, such as"

# bm25s sets its logger to DEBUG, past whatever level the root logger has.
logging.getLogger("bm25s").setLevel(logging.WARNING)


class TextIndex:
    """BM25 over "title category"."""

    def __init__(self, bm25: bm25s.BM25) -> None:
        self._bm25 = bm25
        postings = bm25.scores
        self._offsets, self._ids, self._impacts = postings["indptr"], postings["indices"], postings["data"]
        starts = np.minimum(self._offsets[:-1], max(0, len(self._impacts) - 1))
        self._maxima = np.maximum.reduceat(self._impacts, starts) if len(self._impacts) else np.zeros(len(starts))
        self._size = int(postings["num_docs"])
        self._maxima = np.where(np.diff(self._offsets) > 0, self._maxima, 0).astype(np.float32)

    @classmethod
    def build(cls, catalogue: Catalogue, stop_text: str = ANSWER_TEMPLATE) -> TextIndex:
        """Index a catalogue. The words of `stop_text` never match; English stop words match only a title that
        has no other word, such as "It".

        Raises ValueError: the catalogue is empty.
        """
        if not len(catalogue):
            raise ValueError("the catalogue has no items; rerun prepare_interactions")
        silent = set(words(stop_text))
        stop = silent.union(STOPWORDS_EN)
        # An item without a word still is a document: it holds the empty word, which no text contains.
        # Numbers are given in order of appearance, so that the same catalogue gives the same files.
        vocabulary: dict[str, int] = {"": 0}
        documents: list[list[int]] = []
        for title, category in zip(catalogue.titles, catalogue.categories, strict=True):
            of_title = words(title)
            kept = [word for word in of_title if word not in stop] or [w for w in of_title if w not in silent]
            kept += [word for word in words(category) if word not in stop]
            documents.append([vocabulary.setdefault(word, len(vocabulary)) for word in kept or [""]])
        bm25 = bm25s.BM25(method="lucene", backend="numpy")  # lucene: a shared word always scores above 0
        bm25.index((documents, vocabulary), show_progress=False)
        return cls(bm25)

    def save(self, folder: Path) -> None:
        self._bm25.save(folder, show_progress=False)

    @classmethod
    def load(cls, folder: Path) -> TextIndex:
        """Read what `save` wrote; the postings stay on disk, memory-mapped."""
        return cls(bm25s.BM25.load(folder, mmap=True, show_progress=False, verbosity=0))

    def warm_up(self) -> None:
        """Compile what `matches` needs, so that no request waits for it."""
        self._best(np.zeros(1, np.int64), np.ones(1, np.float32), 1, np.zeros(self._size, np.float32))

    def matches(self, texts: list[str], limit: int) -> list[Int32[ndarray, "matches"]]:
        """For each text the at most `limit` items of highest BM25 score above 0, best first, ties by index.

        Empty for a text without a known word, such as ''.
        """
        scores = np.zeros(self._size, np.float32)
        return [self._match(text, limit, scores) for text in texts]

    def _match(self, text: str, limit: int, scores: Float32[ndarray, "items"]) -> Int32[ndarray, "matches"]:
        known = [number for word in words(text) if (number := self._bm25.vocab_dict.get(word)) is not None]
        if not known or limit < 1:
            return np.empty(0, dtype=np.int32)
        numbers, counts = np.unique(np.array(known, np.int64), return_counts=True)
        return self._best(numbers, counts.astype(np.float32), limit, scores)

    def _best(self, numbers: ndarray, counts: ndarray, limit: int, scores: ndarray) -> Int32[ndarray, "matches"]:
        best: Int32[ndarray, "matches"] = best_documents(
            numbers, counts, self._offsets, self._ids, self._impacts, self._maxima, scores, limit
        )
        return best


def words(text: str) -> list[str]:
    """Lower-case words in order; an apostrophe joins ("Schindler's" is one word), anything else separates."""
    return re.findall(r"\w+", re.sub("['\u2019]", "", text.casefold()))
