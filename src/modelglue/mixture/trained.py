"""A router that was learned, as it is kept: the gate, where it reads, and how it was found."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from modelglue.mixture.gates import Gate

Objective = Literal["best", "expected"]
Finite = Annotated[float, Field(allow_inf_nan=False)]


class HeldOut(BaseModel):
    """Mean scores on items that the router of each fold was not fitted on, and what the learned router gains over the reference."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    trained: Finite
    reference: Finite
    against: Literal["prompts", "best expert"]
    """The reference: the router from prompts, or where there is none, the expert with the highest mean for everything."""
    oracle: Finite
    """The best expert of every task."""
    difference: Finite
    interval: tuple[Finite, Finite]
    """95 %, paired over items."""

    @property
    def better(self) -> bool:
        """Whether the learned router beats the reference by more than chance."""
        return self.interval[0] > 0


class Training(BaseModel):
    """How a router from scores was found; part of the manifest."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    objective: Objective
    penalty: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    """Factor of the squared weights in the loss, chosen by cross-validation."""
    hidden: Annotated[int, Field(ge=1)] | None
    """Hidden units of an MLP."""
    seed: Annotated[int, Field(ge=0)]
    items: Annotated[int, Field(ge=1)]
    tasks: tuple[str, ...]
    held_out: HeldOut | None


@dataclass(frozen=True)
class TrainedRouter:
    """A gate with everything that it takes to use it."""

    gate: Gate
    encoder: Path
    """The folder of the model through which texts are read."""
    layer: int
    temperature: float
    training: Training
