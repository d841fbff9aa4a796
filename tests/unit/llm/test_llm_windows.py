"""Which prefixes are trained and exported, how batches are cut, and how many steps a schedule has."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ctd_scale.config import LLMConfig
from ctd_scale.llm.collator import Collator
from ctd_scale.llm.prompts import make_prompts
from ctd_scale.llm.train import make_plan, warmup_then_linear, window_row
from ctd_scale.llm.windows import MAX_PADDING, Windows, export_windows, pack, plan_steps, training_windows

LENGTHS = st.lists(st.integers(0, 40), min_size=1, max_size=6)
SIZES = st.integers(1, 12)


def supervised(windows: Windows) -> list[tuple[int, int]]:
    """(user, position of the last item read) of every preference that the windows ask for."""
    return [
        (int(user), position)
        for user, start, length, first in zip(
            windows.users, windows.starts, windows.lengths, windows.firsts, strict=True
        )
        for position in range(start + first, start + length)
    ]


def every_prefix(lengths: list[int]) -> list[tuple[int, int]]:
    """Of n items, n - 1 prefixes have a successor."""
    return [(user, position) for user, length in enumerate(lengths) for position in range(length - 1)]


@given(LENGTHS, SIZES, st.integers(0, 99), st.integers(0, 3))
def test_an_epoch_trains_every_prefix_exactly_once(lengths: list[int], size: int, seed: int, epoch: int) -> None:
    windows = training_windows(np.array(lengths), LLMConfig(max_history=size), seed, epoch)
    assert sorted(supervised(windows)) == every_prefix(lengths)
    assert windows.lengths.max(initial=0) <= size


@given(LENGTHS, SIZES)
def test_the_export_gives_every_prefix_exactly_once_after_a_real_history(lengths: list[int], size: int) -> None:
    windows = export_windows(np.array(lengths), LLMConfig(max_history=size))
    assert sorted(supervised(windows)) == every_prefix(lengths)
    assert windows.lengths.max(initial=0) <= size
    assert not windows.answers.any()
    for user, start, length, first in zip(windows.users, windows.starts, windows.lengths, windows.firsts, strict=True):
        assert start >= 0
        assert start + length < lengths[user], "the item after the window must exist"
        for position in range(start + first, start + length):
            assert position - start >= min(position, size // 2)


@given(LENGTHS, SIZES, st.integers(1, 3), st.integers(0, 9))
def test_max_windows_keeps_the_latest(lengths: list[int], size: int, count: int, seed: int) -> None:
    config = LLMConfig(max_history=size, max_windows=count)
    windows = training_windows(np.array(lengths), config, seed, 0)
    exported = export_windows(np.array(lengths), config)
    for user, length in enumerate(lengths):
        trained = sorted(position for owner, position in supervised(windows) if owner == user)
        assert trained == list(range(length - 1))[len(range(length - 1)) - len(trained) :]
        assert (windows.users == user).sum() <= count
        assert len(trained) >= min(length - 1, (count - 1) * size + 1)
        given_out = sorted(position for owner, position in supervised(exported) if owner == user)
        assert given_out == list(range(length - 1))[-count * size :]


def test_cuts_move_from_epoch_to_epoch_and_are_repeatable() -> None:
    lengths, config = np.full(20, 40), LLMConfig(max_history=10)
    starts = [training_windows(lengths, config, 0, epoch).starts.tolist() for epoch in range(3)]
    assert starts[0] != starts[1] != starts[2]
    assert training_windows(lengths, config, 0, 1).starts.tolist() == starts[1]
    assert training_windows(lengths, config, 1, 1).starts.tolist() != starts[1]


def test_a_share_of_the_windows_carries_an_answer() -> None:
    lengths = np.full(2000, 5)
    share = training_windows(lengths, LLMConfig(text_every=4), 0, 0).answers.mean()
    assert share == pytest.approx(0.25, abs=4.5 * (0.25 * 0.75 / 2000) ** 0.5)
    assert training_windows(lengths, LLMConfig(text_every=1), 0, 0).answers.all()
    assert not training_windows(lengths, LLMConfig(text_every=1, text_weight=0.0), 0, 0).answers.any()


# -- batches -------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(1, 30), min_size=1, max_size=60), st.integers(1, 120), st.integers(0, 9))
def test_steps_hold_every_window_once_and_equal_shares_of_tokens(
    sizes: list[int], batch_tokens: int, seed: int
) -> None:
    array = np.array(sizes)
    steps = plan_steps(array, batch_tokens, np.random.default_rng(seed))
    assert sorted(index for step in steps for index in step.tolist()) == list(range(len(sizes)))
    planned = max(1, round(sum(sizes) / batch_tokens))
    assert len(steps) <= planned
    for step in steps:
        assert array[step].sum() < sum(sizes) / planned + array[step].max()


def test_a_step_is_a_sample_of_all_lengths() -> None:
    sizes = np.random.default_rng(0).integers(10, 400, 4000)
    steps = plan_steps(sizes, 20_000, np.random.default_rng(1))
    assert len(steps) > 30
    means = np.array([sizes[step].mean() for step in steps])
    spread = sizes.std() / len(steps[0]) ** 0.5
    assert np.abs(means - sizes.mean()).max() < 4.5 * spread
    assert not np.array_equal(steps[0], plan_steps(sizes, 20_000, np.random.default_rng(2))[0])


@given(st.lists(st.integers(1, 300), min_size=1, max_size=80), st.integers(1, 7))
def test_lines_hold_every_row_once_in_parts_of_as_many(sizes: list[int], parts: int) -> None:
    packed = pack(np.array(sizes), parts)
    assert len(packed) == parts
    assert sorted(row for lines in packed for line in lines for row in line) == list(range(len(sizes)))
    assert len({len(lines) for lines in packed}) == 1
    longest = max(sum(sizes[row] for row in line) for lines in packed for line in lines)
    # Graham's bound for the longest line of as many.
    count = parts * len(packed[0])
    assert longest <= (4 / 3) * max(
        sum(sizes) / count, max(sizes), 2 * sorted(sizes)[-count - 1] if count < len(sizes) else 0
    )


@pytest.mark.parametrize("parts", [1, 2, 6])
def test_little_of_a_step_is_padding(parts: int) -> None:
    random = np.random.default_rng(0)
    for sizes in (random.integers(10, 200, 42), np.full(42, 20), random.geometric(0.02, 60) + 10):
        lines = [sum(int(sizes[row]) for row in line) for part in pack(sizes, parts) for line in part]
        assert 1 - sizes.sum() / (len(lines) * max(lines)) <= MAX_PADDING
    assert [len(line) for line in pack(np.full(12, 20), 2)[0]] == [1] * 6, "nothing to pack where all are equal"


# -- plan and schedule ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def collator(tiny_chain: Any, text_tokenizer: Any) -> Collator:
    return Collator(make_prompts(text_tokenizer, tiny_chain.log.catalogue, 6), tiny_chain.tokens.items)


@pytest.mark.parametrize(("epochs", "batch_tokens"), [(1, 300), (3, 500), (2, 10_000)])
def test_the_plan_says_how_many_steps_there_are(
    tiny_chain: Any, collator: Collator, epochs: int, batch_tokens: int
) -> None:
    config = LLMConfig(max_history=5, epochs=epochs, batch_tokens=batch_tokens)
    plan = make_plan(tiny_chain.log, collator, config, seed=0)
    steps = []
    for step in itertools.count():
        try:
            steps.append(plan.step(step))
        except IndexError:
            break
    assert len(steps) == plan.total_steps > 0
    # Each epoch, every training prefix of every user, with its successor.
    log = tiny_chain.log
    read: list[tuple[int, int, int]] = []
    for windows, numbers in steps:
        for row in (window_row(log, windows, int(number)) for number in numbers):
            read += [(row.user, int(item), int(target)) for item, target in zip(row.items, row.targets, strict=True)]
            assert row.answer_item in (-1, row.targets[-1])
    sequences = [log.train_sequence(user).tolist() for user in range(log.num_users)]
    expected = [(user, *pair) for user, sequence in enumerate(sequences) for pair in itertools.pairwise(sequence)]
    assert sorted(read) == sorted(expected * epochs)
    for parts in (1, 2, 5):
        facts = plan.facts(parts)
        batches = []
        for windows, numbers in steps:
            rows = [window_row(log, windows, int(number)) for number in numbers]
            for lines in pack(collator.sizes(rows), parts):
                if filled := [[rows[index] for index in line] for line in lines if line]:
                    batches.append(collator.packed(filled))
        assert facts["supervised"] == len(read) == sum(len(batch.targets) for batch in batches)
        padding = sum(int((batch.input_ids == collator.prompts.pad_id).sum()) for batch in batches)
        padding -= sum(len(batch.token_positions) for batch in batches)  # places kept for continuous tokens
        places = sum(batch.input_ids.numel() for batch in batches)
        assert facts["tokens"] == places - padding
        assert facts["padding_share"] == pytest.approx(padding / places, abs=1e-4)


def test_window_rows_ask_only_for_their_own_prefixes(tiny_chain: Any) -> None:
    log = tiny_chain.log
    windows = export_windows(log.train_lengths(), LLMConfig(max_history=5))
    rows = [window_row(log, windows, index) for index in range(len(windows))]
    assert any(row.first > 0 for row in rows)
    for row in rows:
        assert row.first + len(row.targets) == len(row.items)
        sequence = log.train_sequence(row.user).tolist()
        assert row.targets.tolist()[:-1] == row.items.tolist()[row.first + 1 :]
        assert (str(row.items.tolist())[1:-1] + f", {row.targets[-1]}") in str(sequence)


@given(st.integers(1, 3000), st.floats(0, 1))
def test_the_learning_rate_stays_positive_warms_up_and_ends_at_its_floor(total: int, share: float) -> None:
    factor = warmup_then_linear(LLMConfig(warmup_fraction=share), total)
    rates = np.array([factor(step) for step in range(total)])
    assert (rates > 0).all()
    assert rates.max() <= 1
    warmup = max(1, int(share * total))
    assert (np.diff(rates[warmup - 1 :]) <= 0).all()
    assert rates[0] == pytest.approx(1 / warmup)
    assert rates[-1] == pytest.approx(max(0.05, 1 / total))
    middle = total // 2
    if warmup <= middle:
        assert rates[middle] == pytest.approx(max(0.05, 1 - middle / total))
