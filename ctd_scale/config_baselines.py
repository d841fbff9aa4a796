"""The knobs of the baselines: one strict model each."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from ctd_scale.config_section import HOW_IT_WORKS, EpochsConfig, Fraction, NotNegative, Positive, PositiveFloat, Section


class ItemKNNConfig(Section):
    """Item-kNN."""

    neighbors: Positive = 100
    shrinkage: NotNegative = 0.0


class TrainedBaseline(EpochsConfig):
    """What every trained baseline has."""

    embed_dim: Positive = 64


class MatrixFactorizationConfig(TrainedBaseline):
    """BPR-MF."""

    batch_size: Positive = 2048
    l2: NotNegative = Field(1e-4, description="on the rows that a step touched")


class SequentialConfig(TrainedBaseline):
    """SASRec: the sequence model whose filter has no share."""

    num_blocks: Positive = 2
    num_heads: Positive = 1
    max_history: Positive = 50
    dropout: Fraction = 0.5
    alpha: Fraction = Field(0.0, description="share of the frequency filter beside the attention")
    low_frequencies: Positive = Field(3, description="how many frequencies, the constant first, pass the filter as is")


class BSARecConfig(SequentialConfig):
    """BSARec."""

    alpha: Fraction = 0.7


class DiscreteConfig(TrainedBaseline):
    """P5 and TIGER; layers, history and precision are those of `llm`."""

    epochs: Positive = 20
    batch_size: Positive = Field(64, description="histories per optimizer step, all workers together")
    learning_rate: PositiveFloat = 5e-4
    symbol_learning_rate: PositiveFloat = 2e-3
    validate_every: Positive = 1
    validation_users: Positive = 1000
    patience: Positive = 3
    beams: Positive = 50
    inference_batch: Annotated[Positive, HOW_IT_WORKS] = 64


class BaselinesConfig(Section):
    """What the chain is compared with."""

    item_knn: ItemKNNConfig = ItemKNNConfig()
    bpr_mf: MatrixFactorizationConfig = MatrixFactorizationConfig()
    sasrec: SequentialConfig = SequentialConfig()
    bsarec: BSARecConfig = BSARecConfig()
    p5_random: DiscreteConfig = DiscreteConfig()
    p5_sequential: DiscreteConfig = DiscreteConfig()
    p5_collaborative: DiscreteConfig = DiscreteConfig()
    tiger: DiscreteConfig = DiscreteConfig()
