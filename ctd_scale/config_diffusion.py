"""The knobs of the denoiser: its objective, its training and how it is asked."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from ctd_scale.config_section import HOW_IT_WORKS, Count, Fraction, NotNegative, Positive, PositiveFloat, Section

HEADS = 4  # of the attention to the latest items


class DiffusionConfig(Section):
    """Contrastive denoising diffusion over item vectors (method: diffusion)."""

    prediction_type: Literal["sample", "epsilon", "v_prediction"] = "sample"
    beta_schedule: Literal["linear", "squaredcos_cap_v2", "exponential"] = "squaredcos_cap_v2"
    num_train_timesteps: Positive = 1000
    hidden_dim: Positive = 256
    num_blocks: Positive = 2
    dropout: Fraction = 0.1
    condition_dropout: Fraction = 0.1
    condition_items: Count = Field(0, description="latest items that the denoiser attends to beside the preference")
    denoising_weight: NotNegative = 1.0
    min_snr: NotNegative = Field(
        0.0, description="the denoising loss weighs a timestep by its SNR, at most by this (Min-SNR: 5); 0 = all alike"
    )
    contrastive_weight: NotNegative = 0.5
    contrastive_negatives: Literal["uniform", "popularity", "in_batch", "hard"] = Field(
        "uniform", description="whose denoising error should be larger than the positive's"
    )
    num_contrasted: Positive = Field(1, description="how many of the negatives are contrasted")
    recommendation_weight: NotNegative = 0.1
    num_negatives: Positive = 64
    temperature: PositiveFloat = 0.1
    epochs: Positive = 20
    batch_size: Positive = Field(
        128, description="preferences per step, all workers together; with millions of them, or a GPU, take more"
    )
    learning_rate: PositiveFloat = 2e-3
    weight_decay: NotNegative = 1e-4
    ema_decay: Fraction = 0.995
    checkpoint_every_steps: Annotated[Positive, HOW_IT_WORKS] = 1000
    sampling_steps: Positive = Field(8, description="denoiser calls of a draw; with `distilled` those of its teacher")
    sampler: Literal["ddim", "dpmsolver++", "distilled"] = Field(
        "ddim", description="`distilled`: one call of a student that is taught where DDIM ends"
    )
    distill_steps: Positive = Field(1000, description="optimizer steps of that student")
    guidance: NotNegative = Field(1.0, description="classifier-free guidance weight; 1 = none")
    num_draws: Positive = 32
    draw_temperature: PositiveFloat = Field(0.1, description="tau of the log-sum-exp over draws")
    error_candidates: Positive = Field(100, description="how many candidates the denoiser's error ranks")
    error_evaluations: Positive = Field(8, description="common (timestep, noise) pairs of the error")

    @model_validator(mode="after")
    def _heads_share_the_hidden_vector(self) -> DiffusionConfig:
        if self.condition_items and self.hidden_dim % HEADS:
            raise ValueError(
                f"diffusion.hidden_dim={self.hidden_dim} is no multiple of {HEADS}, the heads that attend to "
                f"diffusion.condition_items={self.condition_items} items"
            )
        return self

    @model_validator(mode="after")
    def _contrasted_are_negatives(self) -> DiffusionConfig:
        if self.num_contrasted > self.num_negatives:
            raise ValueError(
                f"diffusion.num_contrasted={self.num_contrasted} is above diffusion.num_negatives={self.num_negatives}"
            )
        return self
