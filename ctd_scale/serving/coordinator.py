"""What all replicas of an application share, in a process of its own."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

from ctd_scale.artifacts import ArtifactError
from ctd_scale.serving.known import Answers, Shared
from ctd_scale.serving.middleware import Record, Staged
from ctd_scale.serving.probe import Probe
from ctd_scale.serving.release import Source, changed, serving_log
from ctd_scale.serving.step import KEPT_VERSIONS
from ctd_scale.serving.telemetry import Telemetry

# How soon a change of the catalogue is seen, in a folder and behind a URL.
LOOK_S, LOOK_AFAR_S = 0.2, 5.0
# A replica that has said nothing for so long is not there any more.
GONE_S = 5.0


@dataclass(frozen=True)
class Replica:
    """What a replica said last: the number of the source that it serves, or can be asked about, and whether it has
    answered all that was asked."""

    said: float
    number: int
    done: bool = False


class Coordinator:
    """What all replicas share: the version that is served, the counts of what was asked, and whether it ends. One
    process."""

    def __init__(self, source: Source) -> None:
        self._sources, self._before = [source], source
        self._telemetry = Telemetry()
        self._closing, self._endpoints, self._steps = False, dict[str, Replica](), dict[str, Replica]()
        self._look_again, self._said = 0.0, ""
        self._shared = Shared(source.reader, source.config.serving.cached_preferences)

    async def current(self, known: Source | None) -> Source:
        """What is to be served. Whoever asks brings what it serves: after a failure this process knows no more than
        what it was started with, and learns the rest from them; but not from replicas of an application that this one
        takes the place of."""
        served = self._sources[-1]
        if known is not None and known.application == served.application and known.number > served.number:
            self._keep(known)
        await self._look_for_changes()
        return self._sources[-1]

    async def _look_for_changes(self) -> None:
        """Take up what `ctd index` did to the catalogue; what cannot be read is logged once, and the rest goes on."""
        now, served = time.monotonic(), self._sources[-1]
        if now < self._look_again:
            return
        self._look_again = now + (LOOK_S if served.run.is_local else LOOK_AFAR_S)
        try:
            source = await asyncio.to_thread(changed, served)
        except (ValueError, OSError) as error:
            if str(error) != self._said:
                serving_log.exception("the catalogue's changes cannot be served")
            self._said = str(error)
            return
        self._said = ""
        if source is not served and served is self._sources[-1]:
            self._keep(replace(source, number=served.number + 1))

    async def publish(self, source: Source) -> Source:
        """Serve this from now on."""
        self._before = self._sources[-1]
        self._keep(replace(source, number=self._before.number + 1, application=self._before.application))
        return self._sources[-1]

    async def refuse(self, refused: Source, why: str) -> None:
        """A replica cannot load this: what was served before it was published goes on, for replicas, too, that start
        later."""
        if refused.number == self._sources[-1].number and not refused.same_but_for_changes(self._before):
            self._sources = [replace(self._before, number=refused.number + 1, instead_of=why)]

    async def source(self, version: str) -> Source:
        """Where a reader lies, or what is searched. Raises ArtifactError where it is served no more."""
        for source in reversed(self._sources):
            if version in (source.reader, source.searched):
                return source
        raise ArtifactError(f"version {version} is not served any more")

    async def next_after(self, step: str, number: int) -> Source | None:
        """What a replica that the endpoints ask is to load next, if anything. Each asks over and over, and says of
        which source it has loaded its part."""
        self._steps[step] = Replica(time.monotonic(), number)
        return self._sources[-1] if self._sources[-1].number > number else None

    async def prepared(self, source: Source) -> bool:
        """Whether all of them can be asked about this source, or have tried in vain."""
        self._steps = _alive(self._steps)
        return _all_have(self._steps, source)

    async def serves(self, source: Source) -> bool:
        """Whether every endpoint serves this source by now, or one that came after it."""
        self._endpoints = _alive(self._endpoints)
        return _all_have(self._endpoints, source)

    async def close(self) -> bool:
        """The endpoints are to refuse what comes from now on; whether all have heard of it and answered the rest."""
        self._closing, self._endpoints = True, _alive(self._endpoints)
        return all(endpoint.done for endpoint in self._endpoints.values())

    async def follow(self, endpoint: str, number: int, done: bool) -> tuple[int, bool]:
        """The number of what is to be served, and whether the endpoints are to close. Each asks over and over, and says
        what it serves and whether it has closed."""
        self._endpoints[endpoint] = Replica(time.monotonic(), number, done)
        await self._look_for_changes()
        return self._sources[-1].number, self._closing

    async def share(self, reader: str, said: Answers, heard: int) -> tuple[int, Answers]:
        """What a replica has asked the LLM, for what the others have (see `Shared.exchange`); of the one that is to be
        served."""
        current = self._sources[-1]
        if reader != current.reader:
            return heard, {}
        if reader != self._shared.reader:
            self._shared = Shared(reader, current.config.serving.cached_preferences)
        return self._shared.exchange(said, heard)

    async def observe(self, records: Sequence[Record | Staged | Probe]) -> None:
        """Count these requests, and what was probed."""
        self._telemetry.observe(records)

    async def metrics(self, records: Sequence[Record | Staged | Probe] = ()) -> str:
        """Everything counted, these included, in Prometheus' text format."""
        self._telemetry.observe(records)
        self._endpoints, served = _alive(self._endpoints), self._sources[-1]
        behind = sum(endpoint.number < served.number for endpoint in self._endpoints.values())
        return self._telemetry.text(served.version, behind)

    def _keep(self, source: Source) -> None:
        """The latest source of each of the latest models."""
        others = [each for each in self._sources if each.models != source.models]
        self._sources = [*others, source][-KEPT_VERSIONS:]


def _alive(replicas: dict[str, Replica]) -> dict[str, Replica]:
    """Those that have said something lately."""
    since = time.monotonic() - GONE_S
    return {name: replica for name, replica in replicas.items() if replica.said > since}


def _all_have(replicas: dict[str, Replica], source: Source) -> bool:
    return bool(replicas) and all(replica.number >= source.number for replica in replicas.values())
