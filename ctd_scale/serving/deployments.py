"""The chain as Ray Serve deployments: the LLM, and the ingress, which does what is behind it.

A request that comes alone runs exactly what `Recommender.recommend` runs for one history; requests that arrive
together share a batch, which changes the last bits of a score and nothing else.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections import OrderedDict
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from fastapi import FastAPI
from jaxtyping import Float32, Int32
from numpy import ndarray
from ray import serve
from ray.serve.exceptions import BackPressureError
from ray.serve.handle import DeploymentHandle, DeploymentResponse

from ctd_scale.artifacts import Artifact, ArtifactError, Run
from ctd_scale.batches import InteractionLog
from ctd_scale.config import RunConfig, ServingConfig
from ctd_scale.recommender import (
    Recommendation,
    excluded_items,
    load_artifacts,
    load_preference,
    load_rank,
    timed,
    version_of,
)
from ctd_scale.serving.api import Answered, make_api
from ctd_scale.serving.middleware import Record, access_log
from ctd_scale.serving.picture import flattened
from ctd_scale.serving.schema import Directory, RecommendRequest, ranked_items, response_object
from ctd_scale.serving.telemetry import CACHE_HIT

SEND_RECORDS_S = 0.5


def load_release(run: Run, digests: Mapping[str, str]) -> dict[str, Artifact]:
    """The run's artifacts, refused where they are no longer the ones that the server began with: a replica that
    starts late must not mix its answers with those of another model."""
    artifacts = load_artifacts(run)
    for name, artifact in artifacts.items():
        if artifact.digest != digests[name]:
            raise ArtifactError(f"{run.url}/{name} changed while it was served; restart `ctd serve`")
    return artifacts


class Step:
    """Computes on one thread of its own: calls take turns on the cores, and the event loop stays free to gather
    the next batch."""

    def __init__(self, threads: int) -> None:
        torch.set_num_threads(threads)
        self._thread = ThreadPoolExecutor(max_workers=1)

    async def _compute(self, function: Callable[..., Any], *arguments: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._thread, function, *arguments)


class Preference(Step):
    """The LLM: what a user wants, as a vector and as a text."""

    def __init__(self, run: Run, digests: Mapping[str, str], config: RunConfig) -> None:
        super().__init__(max(1, (os.cpu_count() or 1) // config.serving.max_replicas))
        self._model = load_preference(load_release(run, digests), config)
        _configure_batches(config.serving, self.preference, self.text)
        for warm in (self._model, self._model.texts):  # the first call allocates: no request should wait for it
            warm([np.zeros(1, np.int32)])

    @serve.batch  # type: ignore[untyped-decorator]
    async def preference(self, histories: list[Int32[ndarray, "_"]]) -> list[Float32[ndarray, "cond_dim"]]:
        return list(await self._compute(self._model, histories))

    @serve.batch  # type: ignore[untyped-decorator]
    async def text(self, histories: list[Int32[ndarray, "_"]]) -> list[str]:
        return await self._compute(self._model.texts, histories)


@dataclass(frozen=True)
class Order:
    """What the steps behind the preference need to know of a request."""

    preference: Float32[ndarray, "cond_dim"]
    text: str
    excluded: Int32[ndarray, "_"]
    k: int


@serve.ingress()
class App(Step):
    """The endpoint, and everything behind the preference: a denoiser and an index that is memory-mapped are cheap to
    have in every replica, and a call from one replica to another costs more than they compute. One thread: they are
    small, and the LLM needs the cores."""

    def __init__(
        self,
        run: Run,
        digests: Mapping[str, str],
        config: RunConfig,
        preference: DeploymentHandle,
        telemetry: DeploymentHandle,
    ) -> None:
        super().__init__(threads=1)
        artifacts = load_release(run, digests)
        log = InteractionLog.load(artifacts["interactions"].path)
        self._catalogue, self._directory = log.catalogue, Directory(log)
        self.version = version_of(artifacts)
        self._config, self._max_history = config.serving, config.llm.max_history
        self._rank = load_rank(artifacts, config)
        self._preference, self._telemetry = preference, telemetry
        self._records: list[Record] = []
        self._known: OrderedDict[bytes, Float32[ndarray, "cond_dim"]] = OrderedDict()
        self._warm, self._in_progress = False, 0
        _configure_batches(config.serving, self._ranked)
        if self._rank.retrieve.retriever.text is not None:
            self._rank.retrieve.retriever.text.warm_up()
        log_requests(config.serving.access_log)

    def __serve_build_asgi_app__(self) -> FastAPI:
        return make_api(self, self._config)

    async def ready(self) -> None:
        """Once through all steps, whatever they answer; at once where that has been done."""
        if not self._warm:
            preference = await _result(self._preference.preference.remote(np.zeros(1, np.int32)))
            await self._ranked(Order(preference, "", np.zeros(0, np.int32), 1))
            self._warm = True

    async def recommend(self, request: RecommendRequest) -> Answered:
        history, excluded = self._resolved(request)
        limit = self._config.max_ongoing_requests + self._config.max_queued_requests
        if self._in_progress >= limit:
            raise BackPressureError(num_queued_requests=self._in_progress, max_queued_requests=limit)
        self._in_progress += 1
        try:
            seconds: dict[str, float] = {}
            preference, text = await self._preference_after(history, seconds), ""
            if request.explain:
                with timed("text", seconds):
                    text = await _result(self._preference.text.remote(history))
            recommendation, behind = await self._ranked(Order(preference, text, excluded, request.k))
        finally:
            self._in_progress -= 1
        return Answered(response_object(self.version, recommendation, self._catalogue), seconds | behind)

    @serve.batch  # type: ignore[untyped-decorator]
    async def _ranked(self, orders: list[Order]) -> list[tuple[Recommendation, dict[str, float]]]:
        return await self._compute(self._rank_all, orders)

    def _rank_all(self, orders: list[Order]) -> list[tuple[Recommendation, dict[str, float]]]:
        """Answers to requests that came together, and the seconds of each part for all of them. The list for k is the
        beginning of that for a larger k."""
        seconds: dict[str, float] = {}
        found = self._rank(
            np.stack([order.preference for order in orders]),
            [order.text for order in orders],
            [order.excluded for order in orders],
            max(order.k for order in orders),
            seconds,
        )
        return [
            (replace(answer, items=answer.items[: order.k], scores=answer.scores[: order.k]), seconds)
            for answer, order in zip(found, orders, strict=True)
        ]

    async def picture(self, request: RecommendRequest) -> dict[str, Any]:
        history, excluded = self._resolved(request)
        preference = await self._preference_after(history, {})
        draws = await self._compute(self._rank.density.draws, preference[None])
        pool = await self._compute(self._rank.retrieve.pool, preference[None], draws, [""], [excluded])
        nearest = np.argsort(-pool.cosines[0], kind="stable")[: request.k]
        nearest = nearest[pool.ids[0, nearest] >= 0]
        units = [each / np.linalg.norm(each, axis=1, keepdims=True) for each in (preference[None], draws[0])]
        points = flattened(np.concatenate([*units, pool.vectors[0, nearest]]))
        kinds = ["preference"] + ["draw"] * len(draws[0]) + ["item"] * len(nearest)
        items = [None] * (1 + len(draws[0])) + pool.ids[0, nearest].tolist()
        named = [
            {} if item is None else {"item_id": self._catalogue.item_ids[item], "title": self._catalogue.titles[item]}
            for item in items
        ]
        places = zip(kinds, points.tolist(), named, strict=True)
        return {
            "version": self.version,
            "points": [{"kind": kind, "x": x, "y": y} | name for kind, (x, y), name in places],
        }

    async def similar(self, item_id: str, k: int) -> dict[str, Any]:
        ids, cosines = await self._compute(self._rank.retrieve.similar, self._directory.item(item_id), k)
        found = ids >= 0
        items = ranked_items(ids[found].tolist(), cosines[found].tolist(), self._catalogue)
        return {"version": self.version, "items": items}

    async def find(self, query: str, k: int) -> dict[str, Any]:
        ids = await self._compute(self._rank.retrieve.find, query, k)
        items = ranked_items(ids.tolist(), [1.0 / place for place in range(1, len(ids) + 1)], self._catalogue)
        return {"version": self.version, "items": items}

    async def metrics(self) -> str:
        self._send_records()
        text: str = await _result(self._telemetry.text.remote())
        return text

    def observe(self, record: Record) -> None:
        """Keep a record until the next sending, half a second later at most: a call per request would cost more than
        what it tells."""
        self._records.append(record)
        if len(self._records) == 1:
            asyncio.get_running_loop().call_later(SEND_RECORDS_S, self._send_records)

    def _send_records(self) -> None:
        if self._records:
            self._telemetry.observe.remote(self._records)
            self._records = []

    def _resolved(self, request: RecommendRequest) -> tuple[Int32[ndarray, "_"], Int32[ndarray, "_"]]:
        """The history of a request, and what may not come back. Raises RequestError."""
        history = self._directory.history(user_id=request.user_id, history=request.history)
        further = self._directory.excluded(
            items=request.exclude_items,
            categories=request.categories,
            exclude_categories=request.exclude_categories,
        )
        (excluded,) = excluded_items([history], request.exclude_seen, [further])
        return history, excluded

    async def _preference_after(
        self, history: Int32[ndarray, "_"], seconds: dict[str, float]
    ) -> Float32[ndarray, "cond_dim"]:
        """The preference, from the LLM or, where the same items were read before, from what it said then."""
        read = history[-self._max_history :].tobytes()
        if read in self._known:
            self._known.move_to_end(read)
            seconds[CACHE_HIT] = 0.0
            return self._known[read]
        with timed("preference", seconds):
            preference = await _result(self._preference.preference.remote(history))
        self._known[read] = preference
        while len(self._known) > self._config.cached_preferences:
            self._known.popitem(last=False)
        return preference


def log_requests(on: bool) -> None:
    """The access log of this replica, on its standard error."""
    if on and not access_log.handlers:
        access_log.addHandler(logging.StreamHandler())
        access_log.setLevel(logging.INFO)
        access_log.propagate = False


async def _result(response: DeploymentResponse) -> Any:
    """Await a step; where the request is given up, so is the step (Serve alone would let it run on)."""
    try:
        return await response
    except asyncio.CancelledError:
        response.cancel()
        raise


def _configure_batches(config: ServingConfig, *methods: Any) -> None:
    for method in methods:
        method.set_max_batch_size(config.max_batch_size)
        method.set_batch_wait_timeout_s(config.batch_wait_ms / 1000)
