"""What replicas know of what the LLM said, and tell each other."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path

import numpy as np

from ctd_scale.artifacts import Run
from ctd_scale.config import RunConfig, validate_config
from ctd_scale.serving.coordinator import Coordinator
from ctd_scale.serving.known import Answers, Asked, Known, Shared
from ctd_scale.serving.release import Source


def said(*reads: str) -> Answers:
    """A preference for each history, told apart by its first number."""
    return {("preference", read.encode()): np.full(2, ord(read[0]), np.float32) for read in reads}


def names(answers: Answers) -> str:
    return b"".join(read for _, read in answers).decode()


def test_what_was_not_asked_for_the_longest_is_forgotten() -> None:
    known = Known()
    for question, preference in said(*"abc").items():
        known.learn(question, preference, limit=3)
    assert known.get(("preference", b"a")) is not None
    assert known.get(("text", b"a")) is None
    known.learn(("text", b"d"), "", limit=3)
    assert known.get(("preference", b"b")) is None
    assert known.get(("text", b"d")) == "", "to say nothing is an answer"
    assert names(known.kept) == "cad"
    assert set(known.untold) == set(known.kept), "what is forgotten is not told either"
    known.hear(7, said(*"ef"), limit=3)
    assert (names(known.kept), known.heard) == ("def", 7)
    never = Known()
    never.learn(("text", b"a"), "", limit=0)
    never.learn(("preference", b"a"), np.zeros(2, np.float32), limit=0)
    assert not never.kept
    assert not never.untold


def test_whoever_was_asked_about_last_comes_first() -> None:
    asked = Asked(limit=3)
    asked.add("u1", [])
    asked.add(None, ["i1", "i2"])
    asked.add("u2", [])
    asked.add("u1", [])
    assert list(asked.latest_first()) == [{"user_id": "u1"}, {"user_id": "u2"}, {"history": ("i1", "i2")}]
    asked.add("u3", [])
    assert list(asked.latest_first()) == [{"user_id": "u3"}, {"user_id": "u1"}, {"user_id": "u2"}]


def test_each_hears_what_the_others_said_once() -> None:
    shared = Shared("reader", limit=4)
    assert shared.exchange(said(*"ab"), 0) == (2, {}), "nobody is told what it said itself"
    count, news = shared.exchange(said("c"), 0)
    assert (count, names(news)) == (3, "ab")
    assert news["preference", b"b"][0] == ord("b")
    assert shared.exchange({}, 3) == (3, {})
    count, news = shared.exchange({}, 2)
    assert (count, names(news)) == (3, "c")
    shared.exchange(said(*"ade"), 3)
    count, news = shared.exchange({}, 0)
    assert (count, names(news)) == (6, "cade"), "the oldest is forgotten, what is said again is new"
    count, news = shared.exchange({}, 99)
    assert names(news) == "cade", "who has heard more knew another process"


def test_the_coordinator_shares_what_the_llm_said_that_is_served(tmp_path: Path) -> None:
    first = Source(Run(str(tmp_path), "run"), RunConfig(), "models", "first", "index", "version")

    async def shared() -> None:
        coordinator = Coordinator(first)
        await coordinator.share("first", said(*"ab"), 0)
        count, news = await coordinator.share("first", {}, 0)
        assert names(news) == "ab"
        few = validate_config({"serving": {"cached_preferences": 1}}, "test")
        await coordinator.publish(replace(first, reader="second", config=few))
        assert await coordinator.share("first", said("c"), count) == (count, {})
        assert await coordinator.share("second", said(*"de"), 0) == (2, {})
        _, news = await coordinator.share("second", {}, 0)
        assert names(news) == "e"
        await coordinator.publish(replace(first, reader="second", models="with another denoiser", config=few))
        _, news = await coordinator.share("second", {}, 0)
        assert names(news) == "e", "the same LLM says the same"

    asyncio.run(shared())
