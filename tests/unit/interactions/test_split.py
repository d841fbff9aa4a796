"""The split at two times that are the same for all users, and targets of some users alone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from ctd_scale.batches import SPLITS, Catalogue, InteractionLog
from ctd_scale.interactions import split
from ctd_scale.interactions.split import time_cuts, withheld_users

USERS, ITEMS = 40, 15


def random_log(cuts: tuple[int, int] | None) -> InteractionLog:
    random = np.random.default_rng(0)
    lengths = random.integers(0, 12, USERS)
    times = [np.sort(random.integers(0, 1000, length)) for length in lengths]
    names = [str(item) for item in range(ITEMS)]
    return InteractionLog(
        np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        random.integers(0, ITEMS, lengths.sum()).astype(np.int32),
        [str(user) for user in range(USERS)],
        Catalogue(names, names, [""] * ITEMS),
        np.concatenate(times).astype(np.int64),
        cuts,
    )


def test_every_part_is_what_a_plain_filter_gives() -> None:
    cuts = (700, 850)
    log = random_log(cuts)
    assert log.times is not None
    found = {name: set(log.split_users(name).tolist()) for name in SPLITS}
    assert found["validation"] != found["test"]
    for user in range(USERS):
        own = slice(int(log.offsets[user]), int(log.offsets[user + 1]))
        rows = list(zip(log.times[own].tolist(), log.items[own].tolist(), strict=True))
        training = [item for time, item in rows if time < cuts[0]]
        assert log.train_sequence(user).tolist() == training
        assert log.train_lengths()[user] == len(training)
        for name, start, end in (("validation", *cuts), ("test", cuts[1], np.inf)):
            within = [item for time, item in rows if start <= time < end]
            assert (user in found[name]) == bool(training and within)
            if user in found[name]:
                assert log.history(user, name).tolist() == [item for time, item in rows if time < start]  # type: ignore[arg-type]
                assert log.targets(np.array([user]), name).tolist() == within[:1]  # type: ignore[arg-type]
    for name, cut in zip(SPLITS, cuts, strict=True):
        known = {user: older_than(log, user, cut) for user in range(USERS)}
        assert log.known_lengths(name).tolist() == [len(items) for items in known.values()]
        assert edges(log.known_edges(name)) == [(user, item) for user in known for item in known[user]]
    assert edges(log.train_edges()) == edges(log.known_edges("validation"))


def older_than(log: InteractionLog, user: int, cut: int) -> list[int]:
    assert log.times is not None
    own = slice(int(log.offsets[user]), int(log.offsets[user + 1]))
    return log.items[own][log.times[own] < cut].tolist()


def edges(found: tuple[np.ndarray, np.ndarray]) -> list[tuple[int, int]]:
    users, items = found
    return list(zip(users.tolist(), items.tolist(), strict=True))


def test_in_leave_one_out_all_but_the_test_target_is_known_by_then() -> None:
    log = random_log(None)
    asked = set(log.split_users("test").tolist())
    assert asked < set(range(USERS)), "some have too few"
    everything = {user: log.full_history(user).tolist() for user in range(USERS)}
    for name, targets in (("validation", 2), ("test", 1)):
        known = {user: items[: -targets or None] if user in asked else items for user, items in everything.items()}
        assert edges(log.known_edges(name)) == [(user, item) for user in known for item in known[user]]
        for user in asked:
            assert log.history(user, name).tolist() == known[user]


def test_of_some_users_the_validation_target_is_unknown_of_the_others_it_is_known() -> None:
    log = random_log(None)
    users = log.split_users("validation")
    some = users[::3]
    expected = {user: log.known_lengths("test")[user] for user in range(USERS)}
    expected |= {user: len(log.history(user, "validation")) for user in some.tolist()}
    before = log.known_lengths("test").tolist()
    assert log.lengths_known_beside(some).tolist() == list(expected.values())
    assert log.lengths_known_beside(users).tolist() == log.train_lengths().tolist()
    assert log.known_lengths("test").tolist() == before, "it is not changed"


@pytest.mark.parametrize("cuts", [None, (700, 850)])
def test_of_some_users_nothing_is_withheld(cuts: tuple[int, int] | None) -> None:
    whole = random_log(cuts)
    log = replace(whole, withheld=withheld_users(whole, 9))
    assert log.withheld is not None
    chosen = set(log.withheld.tolist())
    assert len(chosen) == 9
    for name in SPLITS:
        assert set(log.split_users(name).tolist()) == chosen & set(whole.split_users(name).tolist())
        for user in log.split_users(name).tolist():
            assert log.history(user, name).tolist() == whole.history(user, name).tolist()
    for user in range(USERS):
        training = whole.full_history(user) if cuts is None and user not in chosen else whole.train_sequence(user)
        assert log.train_sequence(user).tolist() == training.tolist()
    assert withheld_users(whole, USERS).tolist() == sorted(
        {user for name in SPLITS for user in whole.split_users(name).tolist()}
    )


@pytest.mark.parametrize("cuts", [None, (700, 850)])
def test_a_saved_log_is_split_alike(cuts: tuple[int, int] | None, tmp_path: Path) -> None:
    log = replace(random_log(cuts), withheld=withheld_users(random_log(cuts), 9))
    log.save(tmp_path)
    loaded = InteractionLog.load(tmp_path)
    assert loaded.cuts == cuts
    for name in SPLITS:
        np.testing.assert_array_equal(loaded.split_users(name), log.split_users(name))


@pytest.mark.parametrize("withheld", [0.05, 0.2])
def test_cuts_withhold_the_share_that_was_asked_for(withheld: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(split, "CHUNK", 1000)
    random = np.random.default_rng(0)
    times = (1e15 + 1e14 * random.beta(2, 5, 50_000)).astype(np.int64)
    validation, test = time_cuts(times, withheld)
    assert (times >= test).mean() == pytest.approx(withheld, abs=1e-3)
    assert ((times >= validation) & (times < test)).mean() == pytest.approx(withheld, abs=1e-3)


def test_cuts_of_few_distinct_times() -> None:
    times = np.repeat([10, 20, 30], [80, 10, 10])
    assert time_cuts(times, 0.1) == (11, 21)
    assert time_cuts(np.full(5, 7), 0.1) == (8, 8), "all of it is training"
