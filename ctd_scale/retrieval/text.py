"""The match set of a text: the items whose title and category it names, by BM25.

Which words count is decided once, when the index is built: a word outside the vocabulary matches nothing.
"""

from __future__ import annotations

import copy
import json
import logging
import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

# Where JAX is installed, bm25s computes with it on import, and JAX then keeps most of a GPU's memory to itself.
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import bm25s
import numpy as np
from bm25s.stopwords import STOPWORDS_EN
from jaxtyping import Int32
from numpy import ndarray
from scipy.sparse import csc_matrix, csr_matrix

from ctd_scale.batches import Catalogue
from ctd_scale.retrieval.postings import Postings, best_documents, postings_of

# The constant part of a generated answer: it says nothing about any item.
ANSWER_TEMPLATE = "The user might like products, such as"

FACTS = "facts.json"

KEPT_TEXTS = 1 << 14  # whose matches are kept; a list of 20 takes a few hundred bytes

# bm25s sets its logger to DEBUG, past whatever level the root logger has.
logging.getLogger("bm25s").setLevel(logging.WARNING)


@dataclass(frozen=True)
class Matcher:
    """The items of each word, and what came later: by word, the impact on each item; and the built items of which the
    postings are out of date."""

    numbers: Mapping[str, int]
    postings: Postings
    altered: Int32[ndarray, "altered"]
    later: Mapping[str, Mapping[int, float]]

    def match(self, text: str, limit: int) -> Int32[ndarray, "matches"]:
        """The at most `limit` items of highest score above 0, best first, ties by index; not to be written to."""
        asked = Counter(words(text))
        numbers = {word: self.numbers[word] for word in asked if word in self.numbers}
        ids, sums = np.zeros(0, np.int32), np.zeros(0, np.float32)
        if numbers and limit > 0:
            known = np.array(sorted((number, asked[word]) for word, number in numbers.items()), np.int64)
            # Laid out as where it is compiled: another layout would be compiled anew, while somebody waits.
            asked_of = np.ascontiguousarray(known[:, 0]), known[:, 1].astype(np.float32)
            ids, sums = best_documents(*asked_of, self.postings, limit + len(self.altered))
        if self.later or len(self.altered):
            ids, sums = self._with_later(asked, ids, sums)
        ids = ids[: max(0, limit)].copy()
        ids.setflags(write=False)
        return ids

    def _with_later(self, asked: Mapping[str, int], ids: ndarray, sums: ndarray) -> tuple[ndarray, ndarray]:
        later: dict[int, float] = {}
        for word, n in asked.items():
            for item, impact in self.later.get(word, {}).items():
                later[item] = later.get(item, 0.0) + n * impact
        current = ~np.isin(ids, self.altered)
        ids = np.concatenate([ids[current], np.fromiter(later, np.int32)])
        sums = np.concatenate([sums[current], np.fromiter(later.values(), np.float32)])
        best = np.lexsort((ids, -sums))
        return ids[best], sums[best]


class TextIndex:
    """BM25 over "title category", and over items that were added or altered since it was built. What it found for the
    latest texts is kept: an LLM says the same to many, and to one who asks again."""

    def __init__(self, bm25: bm25s.BM25, silent: set[str], mean_length: float) -> None:
        self._bm25, self._silent, self._stop, self._mean_length = bm25, silent, _stop(silent), mean_length
        scores = bm25.scores
        self._size = int(scores["num_docs"])
        self._postings = postings_of(scores["indptr"], scores["indices"], scores["data"], self._size)
        self._search_by(Matcher(bm25.vocab_dict, self._postings, np.zeros(0, np.int32), {}))

    def _search_by(self, matcher: Matcher) -> None:
        self._matcher = matcher
        # Not of a method of this class: a cycle would never be freed, as what a server holds is not looked through.
        self._match = lru_cache(KEPT_TEXTS)(matcher.match)

    @classmethod
    def build(cls, catalogue: Catalogue, stop_text: str = ANSWER_TEMPLATE) -> TextIndex:
        """Index a catalogue. The words of `stop_text` never match; English stop words match only a title that
        has no other word, such as "It".

        Raises ValueError: the catalogue is empty.
        """
        if not len(catalogue):
            raise ValueError("the catalogue has no items; rerun prepare_interactions")
        silent = set(words(stop_text))
        stop = _stop(silent)
        # An item without a word still is a document: it holds the empty word, which no text contains.
        # Numbers are given in order of appearance, so that the same catalogue gives the same files.
        vocabulary: dict[str, int] = {"": 0}
        documents = [
            [vocabulary.setdefault(word, len(vocabulary)) for word in _kept(title, category, silent, stop) or [""]]
            for title, category in zip(catalogue.titles, catalogue.categories, strict=True)
        ]
        bm25 = bm25s.BM25(method="lucene", backend="numpy")  # lucene: a shared word always scores above 0
        bm25.index((documents, vocabulary), show_progress=False)
        return cls(bm25, silent, float(np.mean([len(document) for document in documents])))

    @property
    def counts(self) -> csc_matrix:
        """What each word adds to the score of each item [items, words]; the columns are those of `describe`."""
        words = len(self._postings.offsets) - 1
        return csc_matrix((self._postings.impacts, self._postings.ids, self._postings.offsets), (self._size, words))

    def describe(self, titles: Sequence[str], categories: Sequence[str]) -> csr_matrix:
        """Rows as in `counts` for items that the index need not have; words that it does not know are left out."""
        rows = [
            {self._bm25.vocab_dict[word]: value for word, value in each.items() if word in self._bm25.vocab_dict}
            for each in map(self._impacts_of, titles, categories)
        ]
        offsets = np.cumsum([0, *map(len, rows)])
        numbers = np.array([number for row in rows for number in row], np.int64)
        values = np.array([value for row in rows for value in row.values()], np.float32)
        return csr_matrix((values, numbers, offsets), (len(rows), len(self._postings.offsets) - 1))

    def with_items(self, items: Int32[ndarray, "items"], titles: Sequence[str], categories: Sequence[str]) -> TextIndex:
        """The same index in which these items, built ones or later ones, have these words. Words keep the weights that
        they had when it was built."""
        made = copy.copy(self)
        altered = items[items < self._size].astype(np.int32)
        later: dict[str, dict[int, float]] = {}
        for item, title, category in zip(items.tolist(), titles, categories, strict=True):
            for word, impact in self._impacts_of(title, category).items():
                later.setdefault(word, {})[item] = impact
        made._search_by(replace(self._matcher, altered=altered, later=later))
        return made

    def _impacts_of(self, title: str, category: str) -> dict[str, float]:
        """BM25 as bm25s has it (Lucene's, k1 = 1.5, b = 0.75), with the frequencies of the built index."""
        counts = Counter(_kept(title, category, self._silent, self._stop))
        length = 1.5 * (0.25 + 0.75 * counts.total() / self._mean_length)
        return {word: self._idf(word) * count / (length + count) for word, count in counts.items()}

    def _idf(self, word: str) -> float:
        number = self._bm25.vocab_dict.get(word)
        offsets = self._postings.offsets
        often = 0 if number is None else int(offsets[number + 1] - offsets[number])
        return float(np.log1p((self._size - often + 0.5) / (often + 0.5)))

    def save(self, folder: Path) -> None:
        """Write what was built."""
        self._bm25.save(folder, show_progress=False)
        facts = {"silent": sorted(self._silent), "mean_length": self._mean_length}
        (folder / FACTS).write_text(json.dumps(facts) + "\n")

    @classmethod
    def load(cls, folder: Path) -> TextIndex:
        """Read what `save` wrote; the postings stay on disk, memory-mapped."""
        if not (folder / FACTS).is_file():
            raise ValueError(f"{folder} has no {FACTS}: it was built by an older version; rerun build_index")
        facts = json.loads((folder / FACTS).read_text())
        bm25 = bm25s.BM25.load(folder, mmap=True, show_progress=False, verbosity=0)
        return cls(bm25, set(facts["silent"]), float(facts["mean_length"]))

    def warm_up(self) -> None:
        """Compile what `matches` needs, so that no request waits for it."""
        best_documents(np.zeros(1, np.int64), np.ones(1, np.float32), self._postings, 1)

    def matches(self, texts: list[str], limit: int) -> list[Int32[ndarray, "matches"]]:
        """For each text the at most `limit` items of highest BM25 score above 0, best first, ties by index; not to be
        written to.

        Empty for a text without a known word, such as ''.
        """
        return [self._match(text, limit) for text in texts]


def _stop(silent: set[str]) -> set[str]:
    return silent.union(STOPWORDS_EN)


def _kept(title: str, category: str, silent: set[str], stop: set[str]) -> list[str]:
    """The words by which an item is found."""
    of_title = words(title)
    kept = [word for word in of_title if word not in stop] or [word for word in of_title if word not in silent]
    return kept + [word for word in words(category) if word not in stop]


def words(text: str) -> list[str]:
    """Lower-case words in order; an apostrophe joins ("Schindler's" is one word), anything else separates."""
    return re.findall(r"\w+", re.sub("['\u2019]", "", text.casefold()))
