"""What the coordinator says is served, when a replica cannot load what should be, and when all is closed."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path

import pytest

from ctd_scale.artifacts import ArtifactError, Run
from ctd_scale.config import RunConfig
from ctd_scale.serving import coordinator as module
from ctd_scale.serving.coordinator import Coordinator
from ctd_scale.serving.release import Source


def coordinates(source: Source) -> Coordinator:
    """Over a run that is not there, whose changes are not looked for."""
    coordinator = Coordinator(source)
    coordinator._look_again = float("inf")
    return coordinator


def test_what_is_refused_gives_way_to_what_was_there_before(tmp_path: Path) -> None:
    first = Source(Run(str(tmp_path), "run"), RunConfig(), "first", "reader", "index", "first")

    async def served() -> None:
        coordinator = Coordinator(first)
        second = await coordinator.publish(replace(first, models="second", version="second"))
        await coordinator.refuse(second, "it is damaged")
        now = await coordinator.current(None)
        assert (now.models, now.instead_of) == ("first", "it is damaged")
        assert now.number > second.number, "a replica that has it already goes back"
        with pytest.raises(ArtifactError, match="second is not served any more"):
            await coordinator.source("second")
        await coordinator.refuse(second, "said by another replica, later")
        assert await coordinator.current(second) == now, "who has the refused one brings it in vain"
        third = await coordinator.publish(replace(first, models="third", version="third"))
        assert await coordinator.current(None) == third
        await coordinator.refuse(second, "said too late")
        assert await coordinator.current(None) == third
        # The same models with other settings.
        fourth = await coordinator.publish(replace(third, config=RunConfig(seed=9), number=0))
        await coordinator.refuse(fourth, "it does not fit")
        now = await coordinator.current(None)
        assert (now.models, now.config, now.instead_of) == ("third", third.config, "it does not fit")
        assert now.number > fourth.number
        await coordinator.refuse(now, "its catalogue was changed, and cannot be read")
        assert await coordinator.current(None) == now, "there is nothing to go back to"

    asyncio.run(served())


def test_a_source_is_served_when_every_endpoint_that_is_alive_has_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, now = Source(Run(str(tmp_path), "run"), RunConfig(), "first", "reader", "index", "first"), [100.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])

    async def served() -> None:
        coordinator = coordinates(first)
        second = await coordinator.publish(replace(first, config=RunConfig(seed=9)))
        assert not await coordinator.serves(second), "nobody has said anything yet"
        await coordinator.follow("a", second.number, False)
        await coordinator.follow("b", first.number, False)
        assert not await coordinator.serves(second)
        await coordinator.follow("b", second.number + 1, False)
        assert await coordinator.serves(second)
        await coordinator.follow("c", first.number, False)
        now[0] += module.GONE_S + 1
        await coordinator.follow("a", second.number, False)
        assert await coordinator.serves(second), "c is not there any more"

    asyncio.run(served())


def test_a_source_can_be_asked_about_when_every_step_that_is_alive_has_tried_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, now = Source(Run(str(tmp_path), "run"), RunConfig(), "first", "reader", "index", "first"), [100.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])

    async def prepared() -> None:
        coordinator = Coordinator(first)
        second = await coordinator.publish(replace(first, reader="another"))
        assert not await coordinator.prepared(second), "nobody has said anything yet"
        assert await coordinator.next_after("llm", second.number) is None
        assert await coordinator.next_after("shard", first.number) == second
        assert not await coordinator.prepared(second)
        assert not await coordinator.serves(second), "these are no endpoints"
        now[0] += module.GONE_S + 1
        await coordinator.next_after("llm", second.number)
        assert await coordinator.prepared(second), "the shard is not there any more"
        assert (await coordinator.source("another")) == second

    asyncio.run(prepared())


def test_all_is_closed_when_every_endpoint_that_is_alive_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, now = Source(Run(str(tmp_path), "run"), RunConfig(), "first", "reader", "index", "first"), [100.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])

    async def closed() -> None:
        coordinator = coordinates(source)
        assert await coordinator.follow("a", 0, False) == (0, False)
        assert await coordinator.follow("b", 0, False) == (0, False)
        assert not await coordinator.close()
        assert await coordinator.follow("a", 0, False) == (0, True)
        assert await coordinator.follow("a", 0, True) == (0, True)
        assert not await coordinator.close(), "b may still answer somebody"
        now[0] += module.GONE_S + 1
        assert await coordinator.follow("a", 0, True) == (0, True)
        assert await coordinator.close(), "b is not there any more"

    asyncio.run(closed())


def test_what_another_application_served_is_not_taken_up(tmp_path: Path) -> None:
    """As where `args` of a Serve config name another run, while replicas of the former application still answer."""
    first = Source(Run(str(tmp_path), "run"), RunConfig(), "first", "reader", "index", "first", application="a")
    other = replace(first, models="other", version="other", application="b")

    async def served() -> None:
        coordinator = coordinates(other)
        assert await coordinator.current(replace(first, number=5)) == other
        later = replace(other, version="changed", number=5)
        assert await coordinator.current(later) == later, "its own have gone on while it was away"
        published = await coordinator.publish(replace(first, application=""))
        assert (published.number, published.application) == (6, "b")

    asyncio.run(served())
    again = replace(first, version="changed", changes=3, number=2)
    assert first.as_started == again.as_started != other.as_started


def test_replicas_that_serve_an_earlier_version_are_counted(tmp_path: Path) -> None:
    first = Source(Run(str(tmp_path), "run"), RunConfig(), "first", "reader", "index", "first")

    async def counted() -> None:
        coordinator = coordinates(first)
        await coordinator.publish(replace(first, version="second"))
        await coordinator.follow("one", 1, False)
        await coordinator.follow("other", 0, False)
        assert "ctd_replicas_behind 1.0" in (await coordinator.metrics()).splitlines()

    asyncio.run(counted())
