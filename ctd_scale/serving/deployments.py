"""The ingress as a Ray Serve deployment: it asks the LLM, and does what is behind it.

A request that comes alone runs exactly what `Recommender.recommend` runs for one history; requests that arrive
together share a batch, which changes the last bits of a score and nothing else.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from logging.handlers import RotatingFileHandler
from pathlib import Path
from socket import gethostname
from typing import Any

import numpy as np
from fastapi import FastAPI
from jaxtyping import Float32, Int32
from numpy import ndarray
from ray import serve
from ray.serve.exceptions import BackPressureError
from ray.serve.handle import DeploymentHandle

from ctd_scale.config_serving import ServingConfig
from ctd_scale.recommender import Recommendation, excluded_items, timed
from ctd_scale.retrieval.boosts import Boosts
from ctd_scale.serving.api import Answered, make_api
from ctd_scale.serving.known import Asked
from ctd_scale.serving.middleware import Door, Record, Staged, access_log
from ctd_scale.serving.picture import flattened
from ctd_scale.serving.probe import Probe, Searched, keep_probing
from ctd_scale.serving.release import Release, Source, open_release, serving_log
from ctd_scale.serving.schema import RecommendRequest, RequestError, picture_object, ranked_items, response_object
from ctd_scale.serving.shards import Shards
from ctd_scale.serving.step import FOLLOW_S, TRANSIENT, Step, batched, result_of
from ctd_scale.serving.telemetry import cached

SEND_RECORDS_S = 0.5
SHARE_S = 1.0  # how soon a replica learns of what the LLM told another one
RETRY_S = 5.0  # until a catalogue that could not be loaded is tried again
MAX_ASKED = 10_000  # users or histories that a replica remembers to have been asked about
LOG_BYTES, LOG_FILES = 50_000_000, 4
MAX_SAID = 400  # characters of an error


@dataclass(frozen=True)
class Order:
    """What the steps behind the preference need to know of a request."""

    release: Release
    preference: Float32[ndarray, "cond_dim"]
    history: Int32[ndarray, "_"]
    text: str
    excluded: Int32[ndarray, "_"]
    k: int
    boosts: Boosts | None = None


Ranked = tuple[Recommendation, dict[str, float]]
# A history as the models read it, what may not come back, and what is to gain or lose.
Resolved = tuple[Int32[ndarray, "_"], Int32[ndarray, "_"], Boosts | None]


@serve.ingress()
class App(Step):
    """The endpoint, and everything behind the preference: a denoiser and an index that is memory-mapped are cheap to
    have in every replica, and a call from one replica to another costs more than they compute. One thread: they are
    small, and the LLM needs the cores.

    A request keeps to the release that it began with. The next one is loaded beside it, and takes its place when every
    replica of the LLM, and of the shards where there are any, has it too, and another LLM knows who is likely to ask.
    """

    async def __init__(  # type: ignore[misc]
        self,
        config: ServingConfig,
        preference: DeploymentHandle,
        coordinator: DeploymentHandle,
        shards: Sequence[DeploymentHandle] = (),
    ) -> None:
        super().__init__(threads=1)
        self._shards = Shards(shards, asyncio.get_running_loop(), config.request_timeout_s)
        self._config, self._preference, self._coordinator = config, preference, coordinator
        self._records: list[Record | Staged | Probe] = []
        self._asked = Asked(min(config.cached_preferences, MAX_ASKED))
        self._searched: Searched | None = None
        self._warm, self._in_progress, self._refused = False, 0, -1
        self.door = Door()
        self._ranked = batched(config, self._rank)
        self._release = await self._opened(await coordinator.current.remote(None))
        await self._share(self._release)  # a replica that load has called for begins with what the others know
        open_logs(self._release.source.run.root / "logs" / "serving", config.access_log)
        self._following = asyncio.create_task(self._follow())
        self._sharing = asyncio.create_task(self._keep_sharing())
        if every_s := config.recall_probe_s:
            probing = keep_probing(every_s, self._take_searched, self._compute, self.observe)
            self._probing = asyncio.create_task(probing)

    @property
    def version(self) -> str:
        return self._release.version

    @property
    def tuned(self) -> dict[str, float] | None:
        row = self._release.source.tuned
        return None if row is None else row.values()

    async def _follow(self) -> None:
        """Ask the coordinator what is to be served, tell it what is served here, and close the door where it says so.
        What is to be served is taken up beside that, which may take a while."""
        me, taking = uuid.uuid4().hex, None
        while True:
            await asyncio.sleep(FOLLOW_S)
            empty, served = self.door.closed and not self.door.inside, self._release.source.number
            try:
                number, self.door.closed = await self._coordinator.follow.remote(me, served, empty)
            except TRANSIENT:
                continue
            except Exception:  # whatever it is, this goes on
                serving_log.exception("still serving version %s", self.version)
                continue
            # Below what is served here: the coordinator has come back from a failure, and learns of it.
            if number not in (served, self._refused) and (taking is None or taking.done()):
                taking = asyncio.create_task(self._take_up())

    async def _take_up(self) -> None:
        """Serve what the coordinator says, as soon as all of it is there. A queue that is full or a process that is
        away is asked again, and so is a catalogue that cannot be loaded; models that cannot be loaded are not, and the
        coordinator is told."""
        source = self._release.source
        try:
            source = await self._coordinator.current.remote(source)
            if source.number > self._release.source.number and await self._can_be_asked(source):
                release = await self._opened(source, self._release)
                if source.reader != self._release.source.reader:
                    await self._warm_up(release)
                self._release = release
        except TRANSIENT:
            serving_log.exception("still serving version %s", self.version)
        except Exception as error:
            serving_log.exception("still serving version %s", self.version)
            if source.same_but_for_changes(self._release.source):  # what was deleted must not stay
                await asyncio.sleep(RETRY_S)
            else:
                self._refused = source.number
                self._coordinator.refuse.remote(source, _in_short(error))

    async def _can_be_asked(self, source: Source) -> bool:
        """Whether the LLM and the shards have this source; what they do not tell apart, they have."""
        served = self._release.source
        same = (source.reader, source.index) == (served.reader, served.index)
        return same or bool(await self._coordinator.prepared.remote(source))

    async def _warm_up(self, release: Release) -> None:
        """Let another LLM read whoever was asked about lately, the last ones first, while the other one answers: those
        are likely to be asked about again, and all at once it cannot read them."""
        await self._preference_after(release, np.zeros(1, np.int32), {})
        deadline = time.monotonic() + self._config.swap_warm_up_s
        asked = self._asked.latest_first()
        while time.monotonic() < deadline and (some := list(islice(asked, self._config.max_batch_size))):
            reads = [self._preference_after(release, read, {}) for read in _reads(release, some)]
            said = await asyncio.gather(*reads, return_exceptions=True)
            if any(isinstance(each, BaseException) for each in said):  # those are read when they are asked about
                await asyncio.sleep(FOLLOW_S)
            await self._share(release)

    async def _keep_sharing(self) -> None:
        while True:
            await asyncio.sleep(SHARE_S)
            try:
                await self._share(self._release)
            except Exception:  # whatever it is, this goes on
                serving_log.exception("what the LLM said is not shared")

    async def _share(self, release: Release) -> None:
        """Tell the other replicas what the LLM said, and hear what it said to them."""
        known = release.known
        said, known.untold = known.untold, {}
        try:
            heard, others = await self._coordinator.share.remote(release.source.reader, said, known.heard)
        except TRANSIENT:  # another time
            known.untold = said | known.untold
        else:
            known.hear(heard, others, self._config.cached_preferences)

    async def _opened(self, source: Source, before: Release | None = None) -> Release:
        await self._shards.load(source.index)
        return await asyncio.to_thread(open_release, source, before, self._shards.ask_of)

    def _take_searched(self) -> Searched | None:
        searched, self._searched = self._searched, None
        return searched

    def __serve_build_asgi_app__(self) -> FastAPI:
        return make_api(self, self._config, proxied=True)

    async def ready(self) -> None:
        """Once through all steps, whatever they answer; at once where that has been done."""
        if not self._warm:
            history = np.zeros(1, np.int32)
            preference = await self._preference_after(self._release, history, {})
            await self._ranked(Order(self._release, preference, history, "", history[:0], 1))
            self._warm = True

    @contextmanager
    def _admitted(self) -> Iterator[None]:
        """Whoever has to wait behind too many is refused."""
        limit = self._config.max_ongoing_requests + self._config.max_queued_requests
        if self._in_progress >= limit:
            raise BackPressureError(num_queued_requests=self._in_progress, max_queued_requests=limit)
        self._in_progress += 1
        try:
            yield
        finally:
            self._in_progress -= 1

    async def recommend(self, request: RecommendRequest) -> Answered:
        release, seconds = self._release, dict[str, float]()
        with self._admitted():
            history, excluded, boosts = await _resolved(release, request)
            self._asked.add(request.user_id, (request.history or [])[-release.source.config.llm.max_history :])
            preference = await self._preference_after(release, history, seconds)
            text = await self._said("text", release, history, seconds) if request.explain else ""
            order = Order(release, preference, history, text, excluded, request.k, boosts)
            recommendation, behind = await self._ranked(order)
        self._searched = Searched(release.version, release.rank.retrieve.retriever, preference)
        return Answered(response_object(release.version, recommendation, release.catalogue), seconds | behind)

    async def _rank(self, orders: list[Order]) -> list[Ranked]:
        found: list[Ranked] = await self._compute(self._rank_all, orders)
        return found

    def _rank_all(self, orders: list[Order]) -> list[Ranked]:
        """Answers to requests that came together, and the seconds of each part for all of them. The list for k is the
        beginning of that for a larger k."""
        found: dict[int, Ranked] = {}
        for version in {order.release.version for order in orders}:
            places = [place for place, order in enumerate(orders) if order.release.version == version]
            chosen, seconds = [orders[place] for place in places], dict[str, float]()
            answers = chosen[0].release.rank(
                np.stack([order.preference for order in chosen]),
                [order.history for order in chosen],
                [order.text for order in chosen],
                [order.excluded for order in chosen],
                max(order.k for order in chosen),
                seconds,
                [order.boosts for order in chosen],
            )
            for place, order, answer in zip(places, chosen, answers, strict=True):
                cut = replace(answer, items=answer.items[: order.k], scores=answer.scores[: order.k])
                found[place] = cut, seconds
        return [found[place] for place in range(len(orders))]

    async def picture(self, request: RecommendRequest) -> dict[str, Any]:
        release = self._release
        with self._admitted():
            history, excluded, _ = await _resolved(release, request)
            preference = await self._preference_after(release, history, {})
            draws = await self._compute(release.rank.density.draws, preference[None])
            near = partial(release.rank.retrieve.pool, draws=draws, histories=None)
            pool = await self._compute(near, preference[None], [""], [excluded])
        nearest = np.argsort(-pool.cosines[0], kind="stable")[: request.k]
        nearest = nearest[pool.ids[0, nearest] >= 0]
        units = [each / np.linalg.norm(each, axis=1, keepdims=True) for each in (preference[None], draws[0])]
        points = flattened(np.concatenate([*units, pool.vectors[0, nearest]]))
        return picture_object(release.version, points.tolist(), pool.ids[0, nearest].tolist(), release.catalogue)

    async def similar(self, item_id: str, k: int) -> dict[str, Any]:
        release = self._release
        with self._admitted():
            ids, cosines = await self._compute(release.rank.retrieve.similar, release.directory.item(item_id), k)
        found = ids >= 0
        items = ranked_items(ids[found].tolist(), cosines[found].tolist(), release.catalogue)
        return {"version": release.version, "items": items}

    async def find(self, query: str, k: int) -> dict[str, Any]:
        release = self._release
        with self._admitted():
            ids = await self._compute(release.rank.retrieve.find, query, k)
        items = ranked_items(ids.tolist(), [1.0 / place for place in range(1, len(ids) + 1)], release.catalogue)
        return {"version": release.version, "items": items}

    async def metrics(self) -> str:
        """Everything counted so far, by this replica too: its last records go with the question, not before it."""
        records, self._records = self._records, []
        text: str = await result_of(self._coordinator.metrics.remote(records))
        return text

    def observe(self, record: Record | Staged | Probe) -> None:
        """Keep a record until the next sending, half a second later at most: a call per request would cost more than
        what it tells."""
        self._records.append(record)
        if len(self._records) == 1:
            asyncio.get_running_loop().call_later(SEND_RECORDS_S, self._send_records)

    def _send_records(self) -> None:
        if self._records:
            self._coordinator.observe.remote(self._records)
            self._records = []

    async def _preference_after(
        self, release: Release, history: Int32[ndarray, "_"], seconds: dict[str, float]
    ) -> Float32[ndarray, "cond_dim"]:
        preference: Float32[ndarray, "cond_dim"] = await self._said("preference", release, history, seconds)
        return preference

    async def _said(
        self, question: str, release: Release, history: Int32[ndarray, "_"], seconds: dict[str, float]
    ) -> Any:
        """The preference or the text, from the LLM or, where the same items were read before, what it said then."""
        asked = question, history[-release.source.config.llm.max_history :].tobytes()
        if (known := release.known.get(asked)) is not None:
            seconds[cached(question)] = 0.0
            return known
        with timed(question, seconds):
            ask = getattr(self._preference, question)
            said = await result_of(ask.remote((release.source.reader, history)))
        release.known.learn(asked, said, self._config.cached_preferences)
        return said


async def _resolved(release: Release, request: RecommendRequest) -> Resolved:
    """What a request means; beside the event loop where all items are looked at for it. Raises RequestError."""
    if request.looks_at_all_items:
        return await asyncio.to_thread(_resolve, release, request)
    return _resolve(release, request)


def _resolve(release: Release, request: RecommendRequest) -> Resolved:
    directory = release.directory
    history = directory.history(user_id=request.user_id, history=request.history)
    further = directory.excluded(
        items=request.exclude_items,
        categories=request.categories,
        exclude_categories=request.exclude_categories,
        only_items=request.only_items,
        ranges=request.ranges,
    )
    (excluded,) = excluded_items([history], request.exclude_seen, [further])
    return release.read_as[history], excluded, directory.boosts(request.boosts)


def _reads(release: Release, whom: Sequence[dict[str, Any]]) -> Iterator[Int32[ndarray, "_"]]:
    """What the LLM reads of them; of users and items that this release does not know, nothing."""
    for each in whom:
        with suppress(RequestError):
            yield release.read_as[release.directory.history(**each)]


def _in_short(error: Exception) -> str:
    """One line of it: what failed in another process says where, too, and says so last."""
    said = " ".join(str(error).split())
    return f"{type(error).__name__}: {said if len(said) <= MAX_SAID else f'... {said[-MAX_SAID:]}'}"


def open_logs(folder: Path, requests: bool) -> None:
    """The logs of this replica: what went wrong, and a line of JSON for every request where it is wanted. They are
    bounded: the oldest lines go."""
    folder.mkdir(parents=True, exist_ok=True)
    wanted = {serving_log: "errors.log", **({access_log: "requests.jsonl"} if requests else {})}
    for log, name in wanted.items():
        if not log.handlers:
            file = folder / f"{gethostname()}-{os.getpid()}-{name}"  # nodes may share the folder, and count alike
            log.addHandler(RotatingFileHandler(file, maxBytes=LOG_BYTES, backupCount=LOG_FILES, encoding="utf-8"))
            log.setLevel(logging.INFO)
            log.propagate = False
