"""The chain as Ray Serve deployments: one per step, and the ingress that calls them in order.

A request that comes alone runs exactly what `Recommender.recommend` runs for one history; requests that arrive
together share a batch, which changes the last bits of a score and nothing else.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from fastapi import FastAPI
from jaxtyping import Float32, Int32
from numpy import ndarray
from ray import serve
from ray.serve.handle import DeploymentHandle, DeploymentResponse

from ctd_scale.artifacts import Artifact, ArtifactError, Run
from ctd_scale.batches import InteractionLog, Ranking, load_rankings
from ctd_scale.config import RunConfig, ServingConfig
from ctd_scale.recommender import (
    Pool,
    Recommendation,
    answers,
    excluded_items,
    load_artifacts,
    load_density,
    load_preference,
    load_retrieve,
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


class Denoise(Step):
    """The diffusion model. One thread: it is small, and the LLM needs the cores."""

    def __init__(self, run: Run, digests: Mapping[str, str], config: RunConfig) -> None:
        super().__init__(threads=1)
        self._model = load_density(load_release(run, digests), config)
        _configure_batches(config.serving, self.draws)

    @serve.batch  # type: ignore[untyped-decorator]
    async def draws(self, preferences: list[Float32[ndarray, "cond_dim"]]) -> list[Float32[ndarray, "draws cond_dim"]]:
        return list(await self._compute(self._model.draws, np.stack(preferences)))

    async def errors(self, preference: Float32[ndarray, "cond_dim"], pool: Pool) -> Float32[ndarray, "1 pool"]:
        return await self._compute(self._model.errors, preference[None], pool.vectors)


class Retrieve(Step):
    """The hybrid retriever: candidates, and their final order."""

    def __init__(self, run: Run, digests: Mapping[str, str], config: RunConfig) -> None:
        super().__init__(threads=1)
        self._step = load_retrieve(load_release(run, digests), config)
        if self._step.retriever.text is not None:
            self._step.retriever.text.warm_up()

    async def pool(
        self,
        preference: Float32[ndarray, "cond_dim"],
        draws: Float32[ndarray, "draws cond_dim"],
        text: str,
        excluded: Int32[ndarray, "_"],
    ) -> Pool:
        return await self._compute(self._step.pool, preference[None], draws[None], [text], [excluded])

    async def rank(
        self, pool: Pool, errors: Float32[ndarray, "1 pool"] | None, ranking: Ranking, k: int
    ) -> tuple[Int32[ndarray, "1 k"], Float32[ndarray, "1 k"]]:
        return await self._compute(self._step.rank, pool, errors, ranking, k)

    async def similar(self, item: int, k: int) -> tuple[Int32[ndarray, "k"], Float32[ndarray, "k"]]:
        return await self._compute(self._step.similar, item, k)

    async def find(self, query: str, k: int) -> Int32[ndarray, "_"]:
        return await self._compute(self._step.find, query, k)


@serve.ingress()
class App:
    """The endpoint: the same calls in the same order as `Recommender.recommend`."""

    def __init__(
        self,
        run: Run,
        digests: Mapping[str, str],
        config: RunConfig,
        preference: DeploymentHandle,
        denoise: DeploymentHandle,
        retrieve: DeploymentHandle,
        telemetry: DeploymentHandle,
    ) -> None:
        artifacts = load_release(run, digests)
        log = InteractionLog.load(artifacts["interactions"].path)
        self._catalogue, self._directory = log.catalogue, Directory(log)
        self._ranking = load_rankings(artifacts["ranking"].path)["full_text"]
        self.version = version_of(artifacts)
        self._config, self._max_history = config.serving, config.llm.max_history
        self._preference, self._denoise, self._retrieve = preference, denoise, retrieve
        self._telemetry, self._records = telemetry, list[Record]()
        self._known: OrderedDict[bytes, Float32[ndarray, "cond_dim"]] = OrderedDict()
        self._warm = False
        log_requests(config.serving.access_log)

    def __serve_build_asgi_app__(self) -> FastAPI:
        return make_api(self, self._config)

    async def ready(self) -> None:
        """Once through all steps, whatever they answer; at once where that has been done."""
        if not self._warm:
            await self._recommend(np.zeros(1, np.int32), 1, np.zeros(0, np.int32), explain=False, seconds={})
            self._warm = True

    async def recommend(self, request: RecommendRequest) -> Answered:
        history, excluded = self._resolved(request)
        seconds: dict[str, float] = {}
        recommendation = await self._recommend(history, request.k, excluded, explain=request.explain, seconds=seconds)
        return Answered(response_object(self.version, recommendation, self._catalogue), seconds)

    async def picture(self, request: RecommendRequest) -> dict[str, Any]:
        history, excluded = self._resolved(request)
        preference = await self._preference_after(history, {})
        draws = await _result(self._denoise.draws.remote(preference))
        pool: Pool = await _result(self._retrieve.pool.remote(preference, draws, "", excluded))
        nearest = np.argsort(-pool.cosines[0], kind="stable")[: request.k]
        nearest = nearest[pool.ids[0, nearest] >= 0]
        units = [each / np.linalg.norm(each, axis=1, keepdims=True) for each in (preference[None], draws)]
        points = flattened(np.concatenate([*units, pool.vectors[0, nearest]]))
        kinds = ["preference"] + ["draw"] * len(draws) + ["item"] * len(nearest)
        items = [None] * (1 + len(draws)) + pool.ids[0, nearest].tolist()
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
        ids, cosines = await _result(self._retrieve.similar.remote(self._directory.item(item_id), k))
        found = ids >= 0
        items = ranked_items(ids[found].tolist(), cosines[found].tolist(), self._catalogue)
        return {"version": self.version, "items": items}

    async def find(self, query: str, k: int) -> dict[str, Any]:
        ids = await _result(self._retrieve.find.remote(query, k))
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
        with _timed("preference", seconds):
            preference = await _result(self._preference.preference.remote(history))
        self._known[read] = preference
        while len(self._known) > self._config.cached_preferences:
            self._known.popitem(last=False)
        return preference

    async def _recommend(
        self,
        history: Int32[ndarray, "_"],
        k: int,
        excluded: Int32[ndarray, "_"],
        *,
        explain: bool,
        seconds: dict[str, float],
    ) -> Recommendation:
        preference, text, errors = await self._preference_after(history, seconds), "", None
        if explain:
            with _timed("text", seconds):
                text = await _result(self._preference.text.remote(history))
        with _timed("draws", seconds):
            draws = await _result(self._denoise.draws.remote(preference))
        with _timed("retrieve", seconds):
            pool = await _result(self._retrieve.pool.remote(preference, draws, text, excluded))
        if self._ranking.error:
            with _timed("error", seconds):
                errors = await _result(self._denoise.errors.remote(preference, pool))
        with _timed("rank", seconds):
            ids, scores = await _result(self._retrieve.rank.remote(pool, errors, self._ranking, k))
        return answers(ids, scores, [text])[0]


@contextmanager
def _timed(stage: str, seconds: dict[str, float]) -> Iterator[None]:
    started = time.perf_counter()
    yield
    seconds[stage] = time.perf_counter() - started


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
