"""The LLM as a Ray Serve deployment."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Callable
from typing import Any

import numpy as np
from jaxtyping import Float32, Int32
from numpy import ndarray
from ray.serve.handle import DeploymentHandle

from ctd_scale import environment
from ctd_scale.config_serving import ServingConfig
from ctd_scale.llm.inference import PreferenceModel
from ctd_scale.recommender import READ_FOR_PREFERENCE, load_preference
from ctd_scale.serving.release import Source
from ctd_scale.serving.step import PreparedStep, Versions, batched

# The reader of a version, and a history.
OfVersion = tuple[str, Int32[ndarray, "_"]]


class Preference(PreparedStep):
    """The LLM: what a user wants, as a vector and as a text. Another one is loaded beside the one that it has."""

    async def __init__(  # type: ignore[misc]
        self, config: ServingConfig, coordinator: DeploymentHandle
    ) -> None:
        super().__init__(environment.share_of_cores(config.max_replicas))
        self._models: Versions[str, PreferenceModel] = Versions(self._load)
        self._preferences = batched(config, self._preferences_of)
        self._texts = batched(config, self._texts_of)
        await self._keep_prepared(coordinator, self._load_for)

    async def _load_for(self, source: Source) -> None:
        await self._models.of(source.reader)

    async def preference(self, asked: OfVersion) -> Float32[ndarray, "cond_dim"]:
        """The preference after a history, by the LLM of a version."""
        return await self._preferences(asked)

    async def text(self, asked: OfVersion) -> str:
        """What the LLM of a version says after a history."""
        return await self._texts(asked)

    async def _preferences_of(self, asked: list[OfVersion]) -> list[Float32[ndarray, "cond_dim"]]:
        found: list[ndarray] = await self._compute(_each, asked, await self._models_of(asked), PreferenceModel.__call__)
        return found

    async def _texts_of(self, asked: list[OfVersion]) -> list[str]:
        found: list[str] = await self._compute(_each, asked, await self._models_of(asked), PreferenceModel.texts)
        return found

    async def _models_of(self, asked: list[OfVersion]) -> dict[str, PreferenceModel]:
        return {version: await self._models.of(version) for version in {version for version, _ in asked}}

    async def _load(self, reader: str) -> PreferenceModel:
        source: Source = await self._coordinator.source.remote(reader)
        return await asyncio.to_thread(_warm_preference, source)


def _each(asked: list[OfVersion], models: dict[str, PreferenceModel], read: Callable[..., Any]) -> list[Any]:
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
