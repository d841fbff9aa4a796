"""Discrete ids: every item has one of its own, and the beam search finds what looking at all items finds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.cluster.vq import kmeans2
from scipy.sparse import csr_matrix

from ctd_scale.baselines.codes import (
    Codes,
    CodeTrie,
    collaborative_codes,
    random_codes,
    semantic_codes,
    sequential_codes,
    spectral_vectors,
    spread_out,
)
from ctd_scale.baselines.discrete import DiscreteLM, discrete_task, make_codes, valid_share
from ctd_scale.baselines.names import DISCRETE
from ctd_scale.batches import Catalogue, InteractionLog
from ctd_scale.config import RunConfig, validate_config
from ctd_scale.config_baselines import DiscreteConfig

ITEMS = 37


def random_log(users: int = 50) -> InteractionLog:
    """Two groups of users, of whom each chooses within one half of the catalogue; the last item is nobody's."""
    random = np.random.default_rng(0)
    lengths = random.integers(4, 10, users)
    half = (ITEMS - 1) // 2
    items = [random.integers(0, half, length) + half * (user % 2) for user, length in enumerate(lengths)]
    titles = [f"title {item % 9}" for item in range(ITEMS)]
    return InteractionLog(
        np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        np.concatenate(items).astype(np.int32),
        [str(user) for user in range(users)],
        Catalogue([str(item) for item in range(ITEMS)], titles, [""] * ITEMS),
    )


def all_codes() -> dict[str, Codes]:
    vectors = np.random.default_rng(0).standard_normal((ITEMS, 5)).astype(np.float32)
    vectors[10:14] = vectors[9]  # five items that nothing tells apart
    return {
        "random": random_codes(ITEMS, 0),
        "sequential": sequential_codes(random_log()),
        "collaborative": collaborative_codes(random_log(), 0),
        "semantic": semantic_codes(vectors, 0, levels=2, size=4),
    }


@pytest.mark.parametrize("name", ["random", "sequential", "collaborative", "semantic"])
def test_every_item_has_a_word_of_its_own_and_the_trie_knows_exactly_these(name: str) -> None:
    codes = all_codes()[name]
    assert len(np.unique(codes.symbols, axis=0)) == ITEMS
    assert 0 <= codes.symbols.min() <= codes.symbols.max() < codes.alphabet
    trie, nodes = CodeTrie(codes), np.zeros(ITEMS, np.int64)
    for level in range(codes.length):
        allowed = trie.allowed(nodes)
        for item in range(ITEMS):
            begun = (codes.symbols[:, :level] == codes.symbols[item, :level]).all(axis=1)
            assert set(np.flatnonzero(allowed[item])) == set(codes.symbols[begun, level])
            wrong = np.setdiff1d(np.arange(codes.alphabet), codes.symbols[begun, level])
            assert (trie.step(np.full(len(wrong), nodes[item]), wrong) == -1).all()
        nodes = trie.step(nodes, codes.symbols[:, level])
    np.testing.assert_array_equal(trie.item(nodes), np.arange(ITEMS))
    assert trie.item(trie.step(np.array([-1]), np.array([0])))[0] == -1


def test_two_items_of_one_code_are_refused() -> None:
    with pytest.raises(ValueError, match="same code"):
        CodeTrie(Codes(np.array([[1, 2], [0, 1], [1, 2]]), 3))


def test_sequential_numbers_follow_the_training_sequences() -> None:
    log, codes = random_log(), sequential_codes(random_log())
    numbers = codes.symbols @ 10 ** np.arange(codes.length)[::-1]
    first = list(dict.fromkeys(np.concatenate([log.train_sequence(user) for user in range(log.num_users)]).tolist()))
    assert numbers[first].tolist() == list(range(len(first)))
    assert sorted(numbers) == list(range(ITEMS))


def test_items_that_are_chosen_together_share_a_cluster() -> None:
    log = random_log()
    outer = collaborative_codes(log, 0).symbols[:, 0]
    chosen = np.unique(log.train_edges()[1])
    half = (ITEMS - 1) // 2
    assert not set(outer[chosen[chosen < half]]) & set(outer[chosen[chosen >= half]])


@pytest.mark.parametrize("rank", [3, ITEMS - 1])
def test_spectral_vectors_are_the_leading_ones_of_the_plain_matrix(rank: int) -> None:
    log = random_log()
    users, items = log.train_edges()
    chosen = np.zeros((log.num_users, ITEMS))
    chosen[users, items] = 1
    together = chosen.T @ chosen
    root = np.sqrt(np.maximum(together.sum(axis=1), 1))
    values, vectors = np.linalg.eigh(together / root / root[:, None])
    space = vectors[:, np.argsort(values)[-rank:]] * (chosen.any(axis=0)[:, None])
    lengths = np.linalg.norm(space, axis=1, keepdims=True)
    found = spectral_vectors(csr_matrix(chosen), rank, np.random.default_rng(0))
    # Within the space the axes may differ; angles between items may not.
    np.testing.assert_allclose((found @ found.T) * lengths * lengths.T, space @ space.T, atol=1e-6)


def test_residual_quantisation_leaves_less_at_every_level() -> None:
    vectors = np.random.default_rng(0).standard_normal((200, 6)).astype(np.float32)
    spread = []
    for levels in (1, 2, 3):
        codes = semantic_codes(vectors, 0, levels=levels, size=8)
        _, group = np.unique(codes.symbols[:, :-1], axis=0, return_inverse=True)
        means = np.stack([vectors[group.ravel() == each].mean(axis=0) for each in range(group.max() + 1)])
        spread.append(float(((vectors - means[group.ravel()]) ** 2).mean()))
    assert spread[0] > 2 * spread[1] > 4 * spread[2]


def test_the_first_centres_are_those_that_scipy_draws() -> None:
    vectors = np.random.default_rng(0).standard_normal((300, 5))
    vectors[100:] = vectors[:200] * 10
    expected, nearest = kmeans2(vectors, 16, iter=3, minit="++", rng=np.random.default_rng(1))
    first = spread_out(vectors, 16, np.random.default_rng(1))
    found, found_nearest = kmeans2(vectors, first, iter=3, minit="matrix")
    np.testing.assert_array_equal(found_nearest, nearest)
    np.testing.assert_allclose(found, expected, rtol=1e-12)


@pytest.mark.parametrize("name", ["random", "semantic"])
def test_what_was_saved_is_read(name: str, tmp_path: Path) -> None:
    codes = all_codes()[name]
    codes.save(tmp_path)
    found = Codes.load(tmp_path)
    np.testing.assert_array_equal(found.symbols, codes.symbols)
    assert (found.alphabet, found.digits, found.length) == (codes.alphabet, codes.digits, codes.length)


@pytest.fixture
def model(backbone: Path) -> DiscreteLM:
    from ctd_scale.llm.backbone import load_causal_lm

    torch.manual_seed(0)
    codes = all_codes()["semantic"]
    made = DiscreteLM(load_causal_lm(backbone), np.array([5, 6, 7]), codes, DiscreteConfig(beams=ITEMS), max_history=4)
    torch.nn.init.normal_(made.symbols, std=0.5)
    torch.nn.init.normal_(made.places, std=0.3)
    return made.eval()


def log_probability(model: DiscreteLM, history: np.ndarray, item: int) -> float:
    """Of one item's word after the history, symbol by symbol, everything read anew."""
    symbols = model.codes.symbols[history].ravel().tolist()
    total = 0.0
    for symbol in model.codes.symbols[item].tolist():
        states, _ = model.read(model.embed(torch.tensor([symbols])))
        total += float(model.logits(states[0, -1]).log_softmax(dim=0)[symbol])
        symbols.append(symbol)
    return total


@torch.inference_mode()
def test_the_beam_search_finds_what_looking_at_all_items_finds(model: DiscreteLM) -> None:
    """Wide enough it is exact; histories of unlike length, one longer than may be read."""
    histories = [np.array([3]), np.array([1, 30]), np.array([2, 4, 8, 16, 32]), np.array([9])]
    scores = model.score(np.zeros(4, np.int64), histories).numpy()
    for row, history in zip(scores, histories, strict=True):
        expected = [log_probability(model, history[-4:], item) for item in range(ITEMS)]
        np.testing.assert_allclose(row, expected, atol=1e-4)
    model.config = model.config.model_copy(update={"beams": 6})
    narrow = model.score(np.zeros(4, np.int64), histories).numpy()
    assert (np.isfinite(narrow).sum(axis=1) == 6).all()
    finite = np.isfinite(narrow)
    np.testing.assert_allclose(narrow[finite], scores[finite], atol=1e-4)


@torch.inference_mode()
def test_in_half_precision_the_search_finds_nearly_the_same(model: DiscreteLM) -> None:
    histories = [np.array([3]), np.array([1, 30]), np.array([2, 4, 8, 16])]
    whole = model.score(np.zeros(3, np.int64), histories).numpy()
    model.half_precision = True
    half = model.score(np.zeros(3, np.int64), histories).numpy()
    assert 0 < np.abs(half - whole).max() < 0.05 * whole.std()


@torch.inference_mode()
def test_without_the_trie_every_word_may_be_written(model: DiscreteLM) -> None:
    """As many beams as there are words: then each item is among them once, and the rest is nothing."""
    histories, words = [np.array([3, 5]), np.array([7])], model.codes.alphabet**model.codes.length
    for _, items, _ in model.searched(histories, constrained=True):
        assert (np.sort(items, axis=1) == np.arange(ITEMS)).all()
    model.config = model.config.model_copy(update={"beams": words})
    for _, items, _ in model.searched(histories, constrained=False):
        assert items.shape == (1, words)
        assert np.sort(items[items >= 0]).tolist() == list(range(ITEMS))
    assert valid_share(model, histories) == pytest.approx(ITEMS / words)


def test_the_loss_is_that_of_every_item_after_its_prefix(model: DiscreteLM) -> None:
    """One causal pass over padded rows against each prefix by itself."""
    rows = [np.array([3, 1, 4]), np.array([20, 30])]
    length = model.codes.length
    symbols = np.full((2, 3 * length), -1)
    for row, items in zip(symbols, rows, strict=True):
        row[: len(items) * length] = model.codes.symbols[items].ravel()
    with torch.inference_mode():
        got = float(model(torch.from_numpy(symbols)))
        expected = -sum(
            log_probability(model, items[:end], int(items[end])) for items in rows for end in range(1, len(items))
        )
    assert got == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("name", DISCRETE)
def test_a_task_reads_the_windows_of_the_llm_stage(name: str, backbone: Path) -> None:
    values: dict[str, Any] = {
        "llm": {"backbone": str(backbone), "num_hidden_layers": 1, "max_history": 3},
        "baselines": {name: {"batch_size": 8}},
    }
    config: RunConfig = validate_config(values, source="test")
    log = random_log()
    task = discrete_task(log, config, name, make_codes(name, log, config))
    assert isinstance(task.model, DiscreteLM)
    total = 0
    for rows in task.steps(0):
        batch = task.collate(rows, np.random.default_rng(0))
        assert batch[0].shape[1] <= 4 * task.model.codes.length
        total += task.supervised(batch)
    assert total == np.maximum(log.train_lengths() - 1, 0).sum() * task.model.codes.length
