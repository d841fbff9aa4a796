"""The LLM as a Ray Serve deployment."""

from __future__ import annotations

import asyncio
import gc
import os
from collections.abc import Callable
from typing import Any

import numpy as np
from jaxtyping import Float32, Int32
from numpy import ndarray
from ray import serve
from ray.serve.handle import DeploymentHandle

from ctd_scale.config_serving import ServingConfig
from ctd_scale.llm.inference import PreferenceModel
from ctd_scale.recommender import READ_FOR_PREFERENCE, load_preference
from ctd_scale.serving.release import Source
from ctd_scale.serving.step import PreparedStep, Versions, configure_batches


class Preference(PreparedStep):
    """The LLM: what a user wants, as a vector and as a text. Another one is loaded beside the one that it has."""

    async def __init__(  # type: ignore[misc]
        self, config: ServingConfig, coordinator: DeploymentHandle
    ) -> None:
        super().__init__(max(1, (os.cpu_count() or 1) // config.max_replicas))
        self._models: Versions[str, PreferenceModel] = Versions(self._load)
        configure_batches(config, self.preference, self.text)
        await self._keep_prepared(coordinator, self._load_for)

    async def _load_for(self, source: Source) -> None:
        await self._models.of(source.reader)

    @serve.batch  # type: ignore[untyped-decorator]
    async def preference(self, asked: list[tuple[str, Int32[ndarray, "_"]]]) -> list[Float32[ndarray, "cond_dim"]]:
        """The preference after each history, by the LLM of its version."""
        return await self._compute(_each, asked, await self._models_of(asked), PreferenceModel.__call__)

    @serve.batch  # type: ignore[untyped-decorator]
    async def text(self, asked: list[tuple[str, Int32[ndarray, "_"]]]) -> list[str]:
        """What the LLM of each version says after a history."""
        return await self._compute(_each, asked, await self._models_of(asked), PreferenceModel.texts)

    async def _models_of(self, asked: list[tuple[str, ndarray]]) -> dict[str, PreferenceModel]:
        return {version: await self._models.of(version) for version in {version for version, _ in asked}}

    async def _load(self, reader: str) -> PreferenceModel:
        source: Source = await self._coordinator.source.remote(reader)
        return await asyncio.to_thread(_warm_preference, source)


def _each(asked: list[tuple[str, ndarray]], models: dict[str, PreferenceModel], read: Callable[..., Any]) -> list[Any]:
    """What `read` gives for each history by the model of its version."""
    found: list[Any] = [None] * len(asked)
    for version, model in models.items():
        places = [place for place, (of, _) in enumerate(asked) if of == version]
        for place, answer in zip(places, read(model, [asked[place][1] for place in places]), strict=True):
            found[place] = answer
    return found


def _warm_preference(source: Source) -> PreferenceModel:
    model = load_preference(source.artifacts(READ_FOR_PREFERENCE), source.config)
    for warm in (model, model.texts):  # the first call allocates: no request should wait for it
        warm([np.zeros(1, np.int32)])
    gc.freeze()  # as where a release is opened: it knows all titles
    return model
