"""Where stages run."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator

from ctd_scale.config_section import Count, Positive, Section


class StageResources(Section):
    """On which machines a stage runs; never part of what it learns."""

    num_workers: Positive = 1
    use_gpu: bool = False
    gpu_share: Annotated[float, Field(gt=0, le=1)] = Field(
        1.0, description="of a GPU, for each worker: small trainings, such as the trials of a search, share one"
    )
    threads_per_worker: Count = Field(0, description="0 = cores / workers")
    max_failures: Count = 2

    @model_validator(mode="after")
    def _one_gpu_each(self) -> StageResources:
        if self.num_workers > 1 and self.gpu_share < 1:
            raise ValueError(
                f"gpu_share={self.gpu_share} needs num_workers=1, got {self.num_workers}: NCCL does not join two "
                "workers on one GPU"
            )
        return self

    @property
    def num_gpus(self) -> float:
        """What Ray is asked for, for each worker."""
        return self.gpu_share if self.use_gpu else 0.0


class ResourcesConfig(Section):
    """One entry per Ray Train stage."""

    # Its products are small and its samplers need the other cores: more threads only get in their way.
    graph: StageResources = StageResources(threads_per_worker=1)
    tokenizer: StageResources = StageResources()
    history: StageResources = StageResources()
    llm: StageResources = StageResources()
    diffusion: StageResources = StageResources()
    baselines: StageResources = StageResources()
