"""Discrete item ids: every item as a short word over a small alphabet, and the trie of the words that exist.

`p5_random`, `p5_sequential`: decimal numbers, in random order, or in that in which users meet the items (P5, Geng et
al., 2022; indexing of Hua et al., 2023). `p5_collaborative`: clusters of clusters of items that are chosen together.
`tiger`: residual quantisation of the title's text (Rajput et al., 2023), a last symbol telling apart what is equal.
"""

from __future__ import annotations

import json
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float, Int
from numpy import ndarray
from scipy.cluster.vq import kmeans2
from scipy.sparse import csr_matrix, diags
from scipy.sparse.linalg import eigsh
from scipy.spatial.distance import cdist

from ctd_scale.artifacts import write_text
from ctd_scale.baselines.matrix import interaction_matrix
from ctd_scale.batches import InteractionLog

SYMBOLS, FACTS = "symbols.npy", "codes.json"
DIGITS = 10
ITERATIONS = 20


@dataclass(frozen=True)
class Codes:
    """`symbols[i]` is the word of item i, all of one length. Where the alphabet is that of the LLM's text, `digits`:
    symbol s is the digit s; otherwise every symbol is new to the LLM."""

    symbols: Int[ndarray, "items length"]
    alphabet: int
    digits: bool = False

    @property
    def length(self) -> int:
        return int(self.symbols.shape[1])

    def save(self, folder: Path) -> None:
        np.save(folder / SYMBOLS, self.symbols.astype(np.int32))
        write_text(folder / FACTS, json.dumps({"alphabet": self.alphabet, "digits": self.digits}) + "\n")

    @classmethod
    def load(cls, folder: Path) -> Codes:
        facts = json.loads((folder / FACTS).read_text())
        return cls(np.load(folder / SYMBOLS).astype(np.int64), facts["alphabet"], facts["digits"])


def random_codes(num_items: int, seed: int) -> Codes:
    """A number per item, in random order."""
    return Codes(_decimal(np.random.default_rng((seed, 60)).permutation(num_items)), DIGITS, digits=True)


def sequential_codes(log: InteractionLog) -> Codes:
    """Numbers in the order in which the training sequences, one user after the other, first name the items."""
    _, items = log.train_edges()
    named, first = np.unique(items, return_index=True)
    order = np.concatenate([named[np.argsort(first)], np.setdiff1d(np.arange(log.num_items), named)])
    numbers = np.empty(log.num_items, np.int64)
    numbers[order] = np.arange(log.num_items)
    return Codes(_decimal(numbers), DIGITS, digits=True)


def collaborative_codes(log: InteractionLog, seed: int) -> Codes:
    """Spectral clusters of the co-occurrence graph, spectral clusters within each of them, and the place therein."""
    chosen = interaction_matrix(log).astype(np.float64)
    branches = max(2, round(log.num_items ** (1 / 3)))
    random = np.random.default_rng((seed, 61))
    _, outer = _kmeans(spectral_vectors(chosen, branches, random), branches, random)
    inner = np.zeros_like(outer)
    for cluster in np.unique(outer):
        members = np.flatnonzero(outer == cluster)
        _, inner[members] = _kmeans(spectral_vectors(chosen[:, members], branches, random), branches, random)
    return _disambiguated([outer, inner], [branches, branches])


def semantic_codes(vectors: Float[ndarray, "items dim"], seed: int, levels: int = 3, size: int = 256) -> Codes:
    """Residual k-means: each level quantises what the levels before it left."""
    random, left, parts = np.random.default_rng((seed, 62)), np.array(vectors, np.float64), []
    size = min(size, len(vectors))
    for _ in range(levels):
        centres, nearest = _kmeans(left, size, random)
        left -= centres[nearest]
        parts.append(nearest)
    return _disambiguated(parts, [size] * levels)


def spectral_vectors(chosen: csr_matrix, rank: int, random: np.random.Generator) -> Float[ndarray, "items rank"]:
    """The leading eigenvectors of `D^-1/2 A D^-1/2`, A = how many users chose both items (the diagonal included), as
    unit rows (Ng, Jordan and Weiss, 2001). An item that nobody chose is zero."""
    num_items = chosen.shape[1]
    degree = np.asarray(chosen.T @ (chosen @ np.ones(num_items))).ravel()
    scaled = chosen @ diags(1 / np.sqrt(np.maximum(degree, 1)))
    if num_items <= rank + 1:  # too few for the iterative solver
        vectors = np.linalg.eigh((scaled.T @ scaled).toarray())[1][:, -rank:]
    else:
        _, vectors = eigsh(scaled.T @ scaled, k=rank, v0=random.standard_normal(num_items))
    vectors = np.where(degree[:, None] > 0, vectors, 0)
    return np.asarray(vectors / np.linalg.norm(vectors, axis=1, keepdims=True).clip(1e-12))


class CodeTrie:
    """Which symbols may follow, and which item a whole word is. Nodes are numbered level by level, 0 is the root."""

    def __init__(self, codes: Codes) -> None:
        order = np.lexsort(codes.symbols.T[::-1])
        rows = codes.symbols[order]
        if len(rows) > 1 and (rows[1:] == rows[:-1]).all(axis=1).any():
            raise ValueError("two items have the same code")
        node, first = np.zeros(len(rows), np.int64), 0
        parents: list[ndarray] = []
        symbols: list[ndarray] = []
        children: list[ndarray] = []
        for level in range(codes.length):
            key = node * codes.alphabet + rows[:, level]
            distinct, child = np.unique(key, return_inverse=True)
            first += 1 if level == 0 else len(parents[-1])
            parents.append(distinct // codes.alphabet)
            symbols.append(distinct % codes.alphabet)
            children.append(first + np.arange(len(distinct)))
            node = first + child
        self._parent, self._symbol, self._child = map(np.concatenate, (parents, symbols, children))
        self._starts = np.searchsorted(self._parent, np.arange(int(self._child[-1]) + 2))
        self._edges = self._parent * codes.alphabet + self._symbol  # ascending
        self._leaf = first
        self._items = order
        self.alphabet = codes.alphabet

    def allowed(self, nodes: Int[ndarray, "rows"]) -> Bool[ndarray, "rows alphabet"]:
        """The symbols with which some item's word goes on."""
        counts = self._starts[nodes + 1] - self._starts[nodes]
        rows = np.repeat(np.arange(len(nodes)), counts)
        edges = np.arange(len(rows)) - np.repeat(np.cumsum(counts) - counts, counts) + self._starts[nodes][rows]
        out = np.zeros((len(nodes), self.alphabet), bool)
        out[rows, self._symbol[edges]] = True
        return out

    def step(self, nodes: Int[ndarray, "rows"], symbols: Int[ndarray, "rows"]) -> Int[ndarray, "rows"]:
        """The node after a symbol; -1 where no word goes on like that."""
        wanted = np.where(nodes < 0, -1, nodes * self.alphabet + symbols)
        place = np.minimum(np.searchsorted(self._edges, wanted), len(self._edges) - 1)
        return np.where(self._edges[place] == wanted, self._child[place], -1)

    def item(self, nodes: Int[ndarray, "rows"]) -> Int[ndarray, "rows"]:
        """The item of a node at the end of a word; -1 stays -1."""
        return np.where(nodes < 0, -1, self._items[np.maximum(nodes - self._leaf, 0)])


def _decimal(numbers: ndarray) -> ndarray:
    length = len(str(max(1, len(numbers) - 1)))
    return np.stack([numbers // 10**place % 10 for place in reversed(range(length))], axis=1)


def _disambiguated(parts: list[ndarray], sizes: list[int]) -> Codes:
    """Levels with alphabets of their own, and a last one that counts the items that are alike in all of them."""
    together = np.stack(parts, axis=1)
    _, group = np.unique(together, axis=0, return_inverse=True)
    group = group.ravel()
    order = np.argsort(group, kind="stable")
    starts = np.searchsorted(group[order], np.arange(group.max() + 1))
    place = np.empty(len(group), np.int64)
    place[order] = np.arange(len(group)) - starts[group[order]]
    offsets = np.concatenate([[0], np.cumsum(sizes)])
    symbols = np.concatenate([together, place[:, None]], axis=1) + offsets
    return Codes(symbols, int(offsets[-1] + place.max() + 1))


def _kmeans(vectors: ndarray, count: int, random: np.random.Generator) -> tuple[ndarray, ndarray]:
    """(centres, which of them is nearest to each row); rows that are alike need no more centres than there are."""
    distinct, group = np.unique(vectors, axis=0, return_inverse=True)
    if len(distinct) <= count:
        return distinct, group.ravel()
    with warnings.catch_warnings():  # an empty cluster is no fault: its symbol is not used
        warnings.filterwarnings("ignore", "One of the clusters is empty")
        first = spread_out(vectors, count, random)
        centres, nearest = kmeans2(vectors, first, iter=ITERATIONS, minit="matrix", rng=random)
    return centres, nearest.astype(np.int64)


def spread_out(
    vectors: Float[ndarray, "rows dim"], count: int, random: np.random.Generator
) -> Float[ndarray, "count dim"]:
    """The first centres of k-means++ (Arthur and Vassilvitskii, 2007): each a row, drawn by its squared distance from
    the nearest of those before it. What `kmeans2(minit="++")` draws, which measures all distances again for each."""
    centres = [vectors[random.integers(len(vectors))]]
    nearest = np.full(len(vectors), np.inf)
    while len(centres) < count:
        nearest = np.minimum(nearest, cdist(centres[-1][None], vectors, "sqeuclidean")[0])
        shares = np.cumsum(nearest / nearest.sum())
        centres.append(vectors[np.searchsorted(shares, random.uniform())])
    return np.stack(centres)
