"""The knobs of the endpoint."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator

from ctd_scale.config_section import Count, NotNegative, Positive, PositiveFloat, Section


class ServingConfig(Section):
    """The HTTP endpoint and its replicas."""

    host: str = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65535)] = 8000
    min_replicas: Positive = 1
    max_replicas: Positive = 2
    upscale_delay_s: NotNegative = Field(10.0, description="more is asked than the replicas do for so long: one more")
    downscale_delay_s: NotNegative = Field(120.0, description="fewer would do for so long: one less")
    max_ongoing_requests: Positive = 16
    max_queued_requests: Positive = 256
    max_batch_size: Positive = 8
    batch_wait_ms: NotNegative = Field(
        0.0, description="what comes while a batch is computed is the next one; it waits so long for more"
    )
    request_timeout_s: PositiveFloat = 30.0
    body_timeout_s: PositiveFloat = Field(10.0, description="all of a body must arrive within so long")
    max_k: Positive = 500
    max_history: Positive = 500
    max_requests: Positive = Field(100, description="of one batch")
    max_body_bytes: Positive = 1_000_000
    cached_preferences: Count = Field(
        100_000, description="preferences and texts that each ingress replica keeps, by history"
    )
    swap_warm_up_s: NotNegative = Field(
        60.0, description="another LLM takes over when it has read, for so long at most, whoever was asked about lately"
    )
    recall_probe_s: NotNegative = Field(
        60.0, description="how often each ingress replica compares an approximate index with exact search; 0 = never"
    )
    target_p99_ms: NotNegative = Field(
        0.0,
        description="serve with the settings of the best NDCG@10 whose p99 behind the preference is no longer, by "
        "`ctd bench latency`; 0 = with those of the run",
    )
    shared_index: bool = Field(
        False,
        description="search what is not searched exactly in one deployment for each of retrieval.shards, which all "
        "ingress replicas ask, and not in every one of them",
    )
    access_log: bool = Field(True, description="a line of JSON for every request")

    @model_validator(mode="after")
    def _replicas_in_order(self) -> ServingConfig:
        if self.min_replicas > self.max_replicas:
            raise ValueError(
                f"serving.min_replicas={self.min_replicas} is above serving.max_replicas={self.max_replicas}"
            )
        return self
