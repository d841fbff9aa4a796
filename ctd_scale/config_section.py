"""What every section of the configuration is made of, and what those share that are trained in whole epochs."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Positive = Annotated[int, Field(ge=1)]
Count = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0.0)]
NotNegative = Annotated[float, Field(ge=0.0)]


# Marks what says how a stage works and not what it makes: it may change between two runs, and in the middle of one.
HOW_IT_WORKS = "how it works"


class Section(BaseModel):
    """Base of every section: frozen, strict types, no unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False, protected_namespaces=())

    @classmethod
    def shaping(cls) -> list[str]:
        """The fields that shape what is made."""
        return [name for name, field in cls.model_fields.items() if HOW_IT_WORKS not in field.metadata]

    def shaping_values(self) -> dict[str, Any]:
        """Their values, as JSON has them, also those of sections within."""
        values = self.model_dump(mode="json")
        within = {name: getattr(self, name) for name in self.shaping()}
        return {
            name: each.shaping_values() if isinstance(each, Section) else values[name] for name, each in within.items()
        }


class EpochsConfig(Section):
    """Adam at a constant rate for so many epochs at most, and which of them is kept."""

    epochs: Positive = 200
    batch_size: Positive = Field(256, description="samples per optimizer step, all workers together")
    learning_rate: PositiveFloat = 1e-3
    weight_decay: NotNegative = Field(0.0, description="L2 within Adam, on all weights")
    validate_every: Positive = Field(2, description="epochs between two rankings of the validation items")
    validation_users: Count = Field(
        10_000, description="whose validation items choose the epoch that is kept; 0 = keep the last"
    )
    ema_decay: Fraction = Field(0.0, description="of the average of the weights that ranks and is kept; 0 = no average")
    patience: Positive = Field(5, description="stop after so many rankings that are not the best")
