"""What a search may choose: named parameters, the unit cube that optimisers see, and one canonical form per choice."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import ArrayLike

from modelglue.errors import UserError
from modelglue.search.item_response import Floats

#: what numbers are rounded to where they are compared and stored
_DECIMALS = 6
#: below this sum of a simplex's coordinates all shares are equal
_NO_SUM = 1e-8
#: a softmax simplex reaches from -5 to 5 in its logits
_LOGITS = 10.0


@dataclass(frozen=True)
class When:
    """A condition: the parameter counts only where another, earlier one has one of these values."""

    parameter: str
    values: tuple[Any, ...]


@dataclass(frozen=True)
class Float:
    """A number from `low` to `high`; `log` spreads the unit interval evenly over its logarithm."""

    name: str
    low: float
    high: float
    log: bool = False
    when: When | None = None

    @property
    def width(self) -> int:
        return 1

    def check(self) -> str | None:
        if not (math.isfinite(self.low) and math.isfinite(self.high) and self.low <= self.high):
            return f"from {self.low} to {self.high}; allowed are finite bounds, the lower one first"
        return f"from {self.low} on a logarithmic scale; allowed is a lower bound above 0" if self.log and self.low <= 0 else None

    def at(self, x: Floats) -> float:
        u = float(x[0])
        if self.log:
            value = math.exp(math.log(self.low) + u * (math.log(self.high) - math.log(self.low)))
        else:
            value = self.low + u * (self.high - self.low)
        return min(max(round(value, _DECIMALS), self.low), self.high) + 0.0

    def of(self, value: Any) -> list[float]:
        low, high, number = (math.log(v) if self.log else v for v in (self.low, self.high, float(value)))
        return [(number - low) / (high - low) if high > low else 0.5]


@dataclass(frozen=True)
class Int:
    """A whole number from `low` to `high`, both included; each has an equal share of the unit interval."""

    name: str
    low: int
    high: int
    when: When | None = None

    @property
    def width(self) -> int:
        return 1

    def check(self) -> str | None:
        return None if self.low <= self.high else f"from {self.low} to {self.high}; allowed are bounds, the lower one first"

    def at(self, x: Floats) -> int:
        count = self.high - self.low + 1
        return self.low + min(int(float(x[0]) * count), count - 1)

    def of(self, value: Any) -> list[float]:
        return [(int(value) - self.low + 0.5) / (self.high - self.low + 1)]


@dataclass(frozen=True)
class Choice:
    """One of several values."""

    name: str
    values: tuple[Any, ...]
    when: When | None = None

    @property
    def width(self) -> int:
        return 1

    def check(self) -> str | None:
        return None if self.values and len(set(self.values)) == len(self.values) else "needs values, each named once"

    def at(self, x: Floats) -> Any:
        return self.values[min(int(float(x[0]) * len(self.values)), len(self.values) - 1)]

    def of(self, value: Any) -> list[float]:
        return [(self.values.index(value) + 0.5) / len(self.values)]


def Bool(name: str, when: When | None = None) -> Choice:  # noqa: N802 - reads like the other kinds of parameters
    """Yes or no."""
    return Choice(name, (False, True), when)


@dataclass(frozen=True)
class Simplex:
    """`size` shares from 0 that sum to 1: coordinates divided by their sum (equal shares below 1e-8), or their softmax."""

    name: str
    size: int
    softmax: bool = False
    when: When | None = None

    @property
    def width(self) -> int:
        return self.size

    def check(self) -> str | None:
        return None if self.size >= 1 else f"of {self.size} shares; allowed is 1 or more"

    def at(self, x: Floats) -> list[float]:
        if self.softmax:
            raised = np.exp(_LOGITS * (x - x.max()))
            shares = raised / raised.sum()
        else:
            total = float(x.sum())
            if total < _NO_SUM:
                shares = np.full(self.size, 1 / self.size)
            else:  # rounded shares stay what they are, though their sum is not exactly 1
                shares = x if abs(total - 1) <= self.size * 10**-_DECIMALS else x / total
        return [round(float(share), _DECIMALS) + 0.0 for share in shares]

    def of(self, value: Any) -> list[float]:
        shares = np.asarray(value, dtype=np.float64)
        if not self.softmax:
            return [float(share) for share in shares / max(float(shares.sum()), _NO_SUM)]
        logits = np.log(np.maximum(shares, 1e-300)) / _LOGITS
        return [float(u) for u in np.clip(1 + logits - logits.max(), 0, 1)]


Parameter: TypeAlias = Float | Int | Choice | Simplex
#: parameter name -> value; parameters whose condition does not hold are left out
Params: TypeAlias = Mapping[str, Any]


@dataclass(frozen=True)
class Space:
    """Parameters in order, each a coordinate of the unit cube (a simplex as many as it has shares)."""

    parameters: tuple[Parameter, ...]

    def __post_init__(self) -> None:
        faults = []
        seen: set[str] = set()
        for parameter in self.parameters:
            if parameter.name in seen:
                faults.append(f"{parameter.name}: is named twice")
            if (fault := parameter.check()) is not None:
                faults.append(f"{parameter.name}: {fault}")
            if parameter.when is not None and parameter.when.parameter not in seen:
                faults.append(f"{parameter.name}: depends on '{parameter.when.parameter}', which does not come before it")
            seen.add(parameter.name)
        if not self.parameters:
            faults.append("there is nothing to search")
        if faults:
            raise UserError(f"search space: {'; '.join(faults)}.")

    @property
    def dimensions(self) -> int:
        """Coordinates of the unit cube."""
        return sum(parameter.width for parameter in self.parameters)

    def from_unit_cube(self, x: ArrayLike) -> dict[str, Any]:
        """The parameters at a point [dimensions] of the cube; coordinates outside are taken to its border."""
        point = np.clip(np.asarray(x, dtype=np.float64), 0.0, 1.0)
        if point.shape != (self.dimensions,):
            raise UserError(f"a point of shape {list(point.shape)} in a search space of {self.dimensions} dimensions.")
        params: dict[str, Any] = {}
        start = 0
        for parameter in self.parameters:
            if _active(parameter, params):
                params[parameter.name] = parameter.at(point[start : start + parameter.width])
            start += parameter.width
        return params

    def to_unit_cube(self, params: Params) -> Floats:
        """A point [dimensions] of the cube that gives these parameters; what is not named stands in the middle."""
        coordinates: list[float] = []
        for parameter in self.parameters:
            value = params.get(parameter.name)
            coordinates += [0.5] * parameter.width if value is None else parameter.of(value)
        point: Floats = np.clip(np.array(coordinates), 0.0, 1.0)
        return point

    def canonical(self, params: Params) -> dict[str, Any]:
        """The same choice in its one form: numbers on the grid of 1e-6, shares that sum to 1, nothing that does not count."""
        return self.from_unit_cube(self.to_unit_cube(params))

    def grid(self, steps: int) -> list[dict[str, Any]]:
        """Every combination of `steps` values per number and of all values of choices, in order; a simplex in steps of 1 / steps."""
        found: list[dict[str, Any]] = [{}]
        for parameter in self.parameters:
            found = [
                {**params, parameter.name: value} if _active(parameter, params) else params
                for params in found
                for value in (_values(parameter, steps) if _active(parameter, params) else [None])
            ]
        return found


def _active(parameter: Parameter, params: Params) -> bool:
    when = parameter.when
    return when is None or params.get(when.parameter) in when.values


def _values(parameter: Parameter, steps: int) -> Sequence[Any]:
    if isinstance(parameter, Choice):
        return parameter.values
    if isinstance(parameter, Int):
        every = range(parameter.low, parameter.high + 1)
        return every if len(every) <= steps else sorted({parameter.at(np.array([u])) for u in np.linspace(0, 1, steps)})
    if isinstance(parameter, Float):
        return [parameter.at(np.array([u])) for u in (np.linspace(0, 1, steps) if steps > 1 else [0.5])]
    return [[round(part / steps, _DECIMALS) for part in parts] for parts in _compositions(steps, parameter.size)]


def _compositions(total: int, parts: int) -> list[list[int]]:
    if parts == 1:
        return [[total]]
    return [[first, *rest] for first in range(total, -1, -1) for rest in _compositions(total - first, parts - 1)]
