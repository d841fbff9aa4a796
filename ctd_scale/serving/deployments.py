"""The chain as Ray Serve deployments: one per step, and the ingress that calls them in order.

A request that comes alone runs exactly what `Recommender.recommend` runs for one history; requests that arrive
together share a batch, which changes the last bits of a score and nothing else.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
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
from ctd_scale.serving.api import make_api
from ctd_scale.serving.schema import Directory, RecommendRequest, response_object


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
    ) -> None:
        artifacts = load_release(run, digests)
        log = InteractionLog.load(artifacts["interactions"].path)
        self._catalogue, self._directory = log.catalogue, Directory(log)
        self._ranking = load_rankings(artifacts["ranking"].path)["full_text"]
        self._version = version_of(artifacts)
        self._config = config.serving
        self._preference, self._denoise, self._retrieve = preference, denoise, retrieve

    def __serve_build_asgi_app__(self) -> FastAPI:
        return make_api(self.answer, self._version, self._config)

    async def answer(self, request: RecommendRequest) -> dict[str, Any]:
        """The response object of one request. Raises RequestError, and BackPressureError where a queue is full."""
        history = self._directory.history(user_id=request.user_id, history=request.history)
        recommendation = await self._recommend(
            history, request.k, exclude_seen=request.exclude_seen, explain=request.explain
        )
        return response_object(self._version, recommendation, self._catalogue)

    async def _recommend(
        self, history: Int32[ndarray, "_"], k: int, *, exclude_seen: bool, explain: bool
    ) -> Recommendation:
        preference = await _result(self._preference.preference.remote(history))
        text = await _result(self._preference.text.remote(history)) if explain else ""
        draws = await _result(self._denoise.draws.remote(preference))
        (excluded,) = excluded_items([history], exclude_seen)
        pool = await _result(self._retrieve.pool.remote(preference, draws, text, excluded))
        errors = await _result(self._denoise.errors.remote(preference, pool)) if self._ranking.error else None
        ids, scores = await _result(self._retrieve.rank.remote(pool, errors, self._ranking, k))
        return answers(ids, scores, [text])[0]


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
