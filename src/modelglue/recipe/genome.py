"""mergekit-evolve's genome: a flat vector of numbers becomes the recipe of a merge.

The vector is an array [layer groups, models, parameter sets, parameters]: for every group of layers and every model one value of each
parameter for each filter, and one for what no filter matches.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray
from pydantic import BaseModel, ConfigDict, Field, model_validator

from modelglue.errors import UserError
from modelglue.recipe.schema import FORMAT

Floats: TypeAlias = NDArray[np.float64]
GenomeMethod: TypeAlias = Literal["linear", "task_arithmetic", "ties", "dare_ties", "slerp"]

_PARAMETERS: Mapping[str, tuple[str, ...]] = {
    "linear": ("weight",),
    "task_arithmetic": ("weight",),
    "ties": ("weight", "density"),
    "dare_ties": ("weight", "density"),
    "slerp": ("t",),
}
_TASK_VECTORS = ("task_arithmetic", "ties", "dare_ties")
#: methods that divide by the weights unless the genome says otherwise
_NORMALISED = ("linear", "ties", "dare_ties")
#: stands for a density of 0, which no method takes: about nothing is kept
_LEAST_DENSITY = 1e-6


class GenomeDefinition(BaseModel):
    """What is searched: the models, the method, and how finely its parameters vary over layers and tensors."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    models: Annotated[tuple[Annotated[str, Field(min_length=1)], ...], Field(min_length=1)]
    merge_method: GenomeMethod
    base_model: Annotated[str, Field(min_length=1)] | None = None
    tokenizer_source: Annotated[str, Field(min_length=1)] | None = None
    layer_granularity: Annotated[int, Field(strict=True)] = 0
    """Layers per group; 0 (or less): one group for the whole model."""
    normalize: bool | None = None
    allow_negative_weights: bool = False
    filters: tuple[Annotated[str, Field(min_length=1)], ...] | None = None
    smooth: bool = False
    """Whether parameters run linearly from group to group instead of jumping."""

    @model_validator(mode="after")
    def _fits_together(self) -> GenomeDefinition:
        faults = []
        if self.merge_method in _TASK_VECTORS and self.base_model is None:
            faults.append(f"{self.merge_method} needs a base_model")
        if self.merge_method == "slerp":
            if len(self.models) < 2:
                faults.append("slerp needs two models or more")
            faults += [f"slerp knows no {key}" for key in ("smooth", "filters") if getattr(self, key)]
        elif self.merge_method in _TASK_VECTORS and set(self.models) <= {self.base_model}:
            faults.append("no model differs from the base_model")
        if len(set(self.models)) < len(self.models):
            faults.append("a model stands there twice")
        if faults:
            raise ValueError("; ".join(faults))
        return self

    @property
    def parameters(self) -> tuple[str, ...]:
        """The parameters of the method that are searched, in their order in the vector."""
        return _PARAMETERS[self.merge_method]

    @property
    def normalised(self) -> bool:
        return self.merge_method in _NORMALISED if self.normalize is None else self.normalize

    @property
    def merged(self) -> tuple[int, ...]:
        """Positions of the models that take part: the base has no task vector."""
        return tuple(
            number for number, model in enumerate(self.models) if self.merge_method not in _TASK_VECTORS or model != self.base_model
        )


@dataclass(frozen=True, eq=False)
class Decoded:
    """What a vector means: values [groups, models, sets] by parameter; for slerp the two models and t of every group instead."""

    values: Mapping[str, Floats]
    pairs: tuple[tuple[int, int], ...] = ()
    """slerp: (first, second) of every group, the one with the larger gene first; it is the base of the slice."""
    t: tuple[float, ...] = ()


class Genome:
    """The genome of models with so many layers. UserError if the layers do not divide into groups."""

    def __init__(self, definition: GenomeDefinition, layers: int) -> None:
        step = definition.layer_granularity
        if layers < 1 or (step > 0 and layers % step):
            raise UserError(
                f"layer_granularity {step} does not divide the {layers} layers of the models; allowed are divisors of {layers}, or 0."
            )
        self.definition = definition
        self._step = step if step > 0 else layers
        groups = layers // self._step
        self.ranges: tuple[tuple[int, int], ...] = tuple((number * self._step, (number + 1) * self._step) for number in range(groups))
        """(first layer, layer behind the last) of every group."""
        sets = len(definition.filters or ()) + 1
        self.shape: tuple[int, int, int, int] = (groups, len(definition.models), sets, len(definition.parameters))

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    def start(self) -> Floats:
        """The vector where a search begins: all models alike (weight or t 1 / models), density 1."""
        genes = np.ones(self.shape)
        genes[..., 0] = 1 / self.shape[1]
        return genes.ravel()

    def decode(self, genotype: ArrayLike) -> Decoded:
        """Values of a vector [size] (or an array of `shape`): weights as they are or their absolute value, densities clipped to [0, 1].

        slerp takes per group the two models with the largest genes (the first on ties) and t = the second entry of their softmax, so
        t <= 1/2.
        """
        genes = np.asarray(genotype, dtype=np.float64)
        if genes.size != self.size or not np.isfinite(genes).all():
            raise UserError(f"a genotype of {genes.size} numbers; allowed are {self.size} finite ones, {list(self.shape)}.")
        genes = genes.reshape(self.shape)
        if self.definition.merge_method == "slerp":
            order = np.argsort(-genes[:, :, 0, 0], axis=1, kind="stable")[:, :2]
            pairs = tuple((int(first), int(second)) for first, second in order)
            gaps = [genes[group, first, 0, 0] - genes[group, second, 0, 0] for group, (first, second) in enumerate(pairs)]
            return Decoded({}, pairs, tuple(float(np.exp(-gap) / (1 + np.exp(-gap))) for gap in gaps))
        values = dict(zip(self.definition.parameters, np.moveaxis(genes, 3, 0), strict=True))
        if not self.definition.allow_negative_weights:
            values["weight"] = np.abs(values["weight"])
        if "density" in values:
            values["density"] = np.clip(np.abs(values["density"]), 0.0, 1.0)
        return Decoded(values)

    def recipe(self, genotype: ArrayLike, *, store: str | None = None) -> dict[str, Any]:
        """The recipe of a vector as plain data, in our dialect. mergekit-evolve writes bfloat16; here `store` says what, else the donor.

        One group is written as whole models, several as slices, `smooth` as gradients.
        """
        definition, found = self.definition, self.decode(genotype)
        value: dict[str, Any] = {"format": FORMAT, "method": definition.merge_method}
        if found.pairs:
            value["base"] = definition.base_model or definition.models[0]
            value["slices"] = [self._slerp_slice(group, pair, t) for group, (pair, t) in enumerate(zip(found.pairs, found.t, strict=True))]
        else:
            if definition.base_model is not None:
                value["base"] = definition.base_model
            if definition.smooth or len(self.ranges) == 1:
                value["models"] = self._entries(found.values, slice(None))
            else:
                value["slices"] = [
                    {"models": [{"layers": list(layers), **entry} for entry in self._entries(found.values, slice(group, group + 1))]}
                    for group, layers in enumerate(self.ranges)
                ]
            value["parameters"] = {"normalize": definition.normalised}
        if store is not None:
            value["dtype"] = {"store": store}
        source = definition.tokenizer_source
        if source is not None:
            value["tokenizer"] = {"source": source if source in ("union", "base") else {"model": source.removeprefix("model:")}}
        return value

    def _entries(self, values: Mapping[str, Floats], groups: slice) -> list[dict[str, Any]]:
        """The models with their parameters in some groups."""
        filters = [*(self.definition.filters or ()), None]
        found = []
        for model in self.definition.merged:
            entry: dict[str, Any] = {"model": self.definition.models[model]}
            for parameter, array in values.items():
                least = _LEAST_DENSITY if parameter == "density" else -np.inf
                points = [_setting(np.maximum(array[groups, model, number], least).tolist()) for number in range(len(filters))]
                entry[parameter] = points[0] if len(filters) == 1 else _clauses(filters, points)
            found.append(entry)
        return found

    def _slerp_slice(self, group: int, pair: tuple[int, int], t: float) -> dict[str, Any]:
        models = self.definition.models
        return {
            "base": models[pair[0]],
            "models": [{"model": models[pair[1]], "layers": list(self.ranges[group])}],
            "parameters": {"t": t},
        }


def _setting(points: Sequence[float]) -> Any:
    """One value, or a gradient."""
    return points[0] if len(points) == 1 else list(points)


def _clauses(filters: Sequence[str | None], points: Sequence[Any]) -> list[dict[str, Any]]:
    """One {filter, value} per filter, and one for the rest."""
    return [{"value": value} if text is None else {"filter": text, "value": value} for text, value in zip(filters, points, strict=True)]
