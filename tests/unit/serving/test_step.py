"""How versions are loaded beside each other, before they are asked for."""

from __future__ import annotations

import asyncio
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ctd_scale.artifacts import Run
from ctd_scale.config import RunConfig
from ctd_scale.serving import step as module
from ctd_scale.serving.coordinator import Coordinator
from ctd_scale.serving.release import Source
from ctd_scale.serving.step import Batches, PreparedStep, Versions


def test_what_is_there_is_given_while_another_is_loaded() -> None:
    async def given() -> None:
        may_end, loads = asyncio.Event(), list[str]()

        async def load(version: str) -> str:
            loads.append(version)
            if version == "large":
                await may_end.wait()
            return version.upper()

        versions = Versions(load)
        assert await versions.of("small") == "SMALL"
        large, again = (asyncio.create_task(versions.of("large")) for _ in range(2))
        await asyncio.sleep(0)
        assert await asyncio.wait_for(versions.of("small"), 1) == "SMALL"
        assert not large.done()
        may_end.set()
        assert (await large, await again) == ("LARGE", "LARGE")
        assert loads == ["small", "large"], "whoever comes meanwhile waits for the same"
        await versions.of("small")
        await versions.of("third")
        await versions.of("small")
        assert loads == ["small", "large", "third"], "the one that was not asked for the longest has gone"

    asyncio.run(given())


class Remote:
    """A coordinator as a handle of Ray Serve asks it."""

    def __init__(self, coordinator: Coordinator) -> None:
        self._coordinator = coordinator

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._coordinator, name)
        return type("Method", (), {"remote": staticmethod(method)})


class Loads(PreparedStep):
    """A step that can load all versions but "damaged", and is away once."""

    def __init__(self) -> None:
        super().__init__(threads=1)
        self.tried: list[str] = []

    async def start(self, coordinator: Any) -> None:
        await self._keep_prepared(coordinator, self._load_for)

    async def _load_for(self, source: Source) -> None:
        self.tried.append(source.version)
        if source.version == "damaged":
            raise ValueError("it is damaged")
        if source.version == "second" and self.tried.count("second") == 1:
            raise asyncio.TimeoutError


def test_a_step_loads_what_is_served_next_by_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PREPARE_S", 0.001)
    first = Source(Run(str(tmp_path), "run"), RunConfig(), "models", "reader", "index", "first")

    async def prepared(coordinator: Coordinator, source: Source) -> None:
        while not await coordinator.prepared(source):
            await asyncio.sleep(0.001)

    async def followed() -> None:
        coordinator, step = Coordinator(first), Loads()
        await step.start(Remote(coordinator))
        for version, tried in (("second", 2), ("damaged", 1)):
            source = await coordinator.publish(replace(first, version=version))
            assert not await coordinator.prepared(source)
            await asyncio.wait_for(prepared(coordinator, source), 10)
            assert step.tried.count(version) == tried
        assert step.tried == ["first", "second", "second", "damaged"]

    asyncio.run(followed())


def test_there_is_never_room_for_more_than_two() -> None:
    async def given() -> None:
        most, there = [0], weakref.WeakSet[object]()

        class Model:
            pass

        async def load(_: str) -> Model:
            made = Model()
            there.add(made)
            most[0] = max(most[0], len(there))
            return made

        versions = Versions(load)
        for version in "abcd":
            await versions.of(version)
        assert most == [2]

    asyncio.run(given())


def test_what_comes_while_others_are_computed_is_the_next_batch() -> None:
    async def asked() -> None:
        may_end, batches = asyncio.Event(), list[list[int]]()

        async def compute(numbers: list[int]) -> list[int]:
            batches.append(numbers)
            await may_end.wait()
            if 7 in numbers:
                raise ValueError("seven")
            return [10 * number for number in numbers]

        ask = Batches(compute, most=3, wait_s=0.0)
        waiting = [asyncio.create_task(ask(0))]
        for number in range(1, 7):
            await asyncio.sleep(0)
            waiting.append(asyncio.create_task(ask(number)))
        await asyncio.sleep(0)
        waiting[2].cancel()
        await asyncio.sleep(0)
        may_end.set()
        found = await asyncio.gather(*waiting, return_exceptions=True)
        assert batches == [[0], [1, 3], [4, 5, 6]], "who has given up is left out"
        assert [each for each in found if isinstance(each, int)] == [0, 10, 30, 40, 50, 60]
        with pytest.raises(ValueError, match="seven"):
            await ask(7)
        assert await ask(8) == 80, "it goes on"

    asyncio.run(asked())


def test_it_waits_for_company_where_it_is_told_to() -> None:
    async def asked() -> None:
        batches = list[list[int]]()

        async def compute(numbers: list[int]) -> list[int]:
            batches.append(numbers)
            return numbers

        ask = Batches(compute, most=8, wait_s=0.05)
        first = asyncio.create_task(ask(1))
        await asyncio.sleep(0.01)
        assert await ask(2) == 2
        assert await first == 1
        assert batches == [[1, 2]]

    asyncio.run(asked())
