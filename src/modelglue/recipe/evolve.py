"""mergekit-evolve's files, read unchanged: what is searched, and by which scores."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from modelglue.recipe.document import read_document
from modelglue.recipe.genome import GenomeDefinition


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class EvolveTask(_Part):
    """A task of lm-evaluation-harness, and what its score counts for."""

    name: Annotated[str, Field(min_length=1)]
    weight: Annotated[float, Field(allow_inf_nan=False)] = 1.0
    metric: Annotated[str, Field(min_length=1)] = "acc,none"
    """The harness's name of the score: metric and filter."""


def _named(value: Any) -> Any:
    return {"name": value} if isinstance(value, str) else value


class EvolvePlan(_Part):
    """An evolutionary search. The score of a candidate is the sum of weight x metric over its tasks."""

    genome: GenomeDefinition
    tasks: Annotated[tuple[Annotated[EvolveTask, BeforeValidator(_named)], ...], Field(min_length=1)]
    limit: Annotated[int, Field(ge=1, strict=True)] | None = None
    """Items of each task that are scored; default all."""
    num_fewshot: Annotated[int, Field(ge=0, strict=True)] | None = None
    shuffle: bool = False
    """Whether the items under `limit` are drawn instead of the first."""
    random_init: bool = False
    """Whether the search starts at a random vector instead of equal weights."""
    apply_chat_template: bool = True
    fewshot_as_multiturn: bool = True

    def score(self, metrics: Mapping[str, Mapping[str, float]]) -> float:
        """sum_k weight_k * metrics[task][metric]."""
        return sum(task.weight * metrics[task.name][task.metric] for task in self.tasks)


def read_evolve(source: str | Path | Mapping[str, Any]) -> EvolvePlan:
    """Read a mergekit-evolve file (or a mapping). RecipeError names every fault with file and line. Opens no model."""
    return read_document(source, EvolvePlan)
