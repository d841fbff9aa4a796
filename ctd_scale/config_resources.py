"""Where stages run."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from ctd_scale.config_section import Positive, Section


class StageResources(Section):
    """On which machines a stage runs; never part of what it learns."""

    num_workers: Positive = 1
    use_gpu: bool = False
    threads_per_worker: Annotated[int, Field(ge=0)] = Field(0, description="0 = cores / workers")
    max_failures: Annotated[int, Field(ge=0)] = 2


class ResourcesConfig(Section):
    """One entry per Ray Train stage."""

    # Its products are small and its samplers need the other cores: more threads only get in their way.
    graph: StageResources = StageResources(threads_per_worker=1)
    tokenizer: StageResources = StageResources()
    llm: StageResources = StageResources()
    diffusion: StageResources = StageResources()
    baselines: StageResources = StageResources()
