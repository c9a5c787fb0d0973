"""Parameter values that differ from layer to layer and from tensor to tensor.

A setting is a number (or a word), a gradient (a list of numbers, a piecewise linear curve over the layers), or a list of
{filter, value}, of which the first whose filter is a part of the tensor's name counts. Several levels may have a setting of one
parameter (a model, its slice, its module, the recipe); the first that yields a value wins, then the method's default.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from modelglue.checkpoint import Constant, ParameterSource
from modelglue.errors import did_you_mean
from modelglue.methods.registry import Method, Parameter

#: what evaluating a setting gives where none of its filters matches
NO_VALUE: Any = object()
#: characters of patterns, which filters are not
_PATTERN = "*^$[\\"
_CLAUSE_KEYS = ("filter", "value")


@dataclass(frozen=True)
class Clause:
    """One value, for the tensors whose names hold `filter`; a tuple is a gradient."""

    filter: str | None
    value: Any

    def matches(self, name: str) -> bool:
        return self.filter is None or self.filter == "*" or self.filter in name


@dataclass(frozen=True)
class Setting:
    """What a recipe says of one parameter at one level."""

    clauses: tuple[Clause, ...]

    @property
    def constant(self) -> bool:
        """Whether this is one value for every tensor of every layer."""
        return self.clauses[0].filter in (None, "*") and not isinstance(self.clauses[0].value, tuple)

    @property
    def total(self) -> bool:
        """Whether every tensor gets a value."""
        return any(clause.filter in (None, "*") for clause in self.clauses)

    def points(self) -> Iterator[Any]:
        """Every number or word in it."""
        for clause in self.clauses:
            if isinstance(clause.value, tuple):
                yield from clause.value
            else:
                yield clause.value

    def filters(self) -> Iterator[str]:
        for clause in self.clauses:
            if clause.filter not in (None, "*"):
                yield str(clause.filter)

    def at(self, name: str, t: float) -> Any:
        """The value for the tensor `name` at position `t` (0 to 1) among the layers, or NO_VALUE."""
        for clause in self.clauses:
            if clause.matches(name):
                return gradient_at(clause.value, t) if isinstance(clause.value, tuple) else clause.value
        return NO_VALUE


def gradient_at(points: Sequence[float], t: float) -> float:
    """The piecewise linear curve through equally spaced `points` at `t` in [0, 1]."""
    x = t * (len(points) - 1)
    low = math.floor(x)
    high = min(len(points) - 1, low + 1)
    share = x - low
    return (1 - share) * points[low] + share * points[high]


# -- reading --------------------------------------------------------------------------------------------------------------

#: where below a setting something is wrong, and what
Faults = list[tuple[tuple[str | int, ...], str]]


def read_setting(raw: Any) -> tuple[Setting, Faults]:
    """The setting that YAML means, and all that is wrong with its form. What single values may be is the parameter's to say."""
    faults: Faults = []
    if isinstance(raw, list) and raw and all(isinstance(item, dict) for item in raw):
        clauses = [_read_clause(item, (number,), faults) for number, item in enumerate(raw)]
    elif isinstance(raw, dict):
        clauses = [_read_clause(raw, (), faults)]
    else:
        clauses = [Clause(None, _read_value(raw, (), faults))]
    return Setting(tuple(clauses)), faults


def _read_clause(item: Mapping[str, Any], place: tuple[str | int, ...], faults: Faults) -> Clause:
    for key in item:
        if key not in _CLAUSE_KEYS:
            faults.append(((*place, key), f"unknown key.{did_you_mean(key, _CLAUSE_KEYS)} Allowed: {', '.join(_CLAUSE_KEYS)}."))
    given = item.get("filter")
    if given is not None and not isinstance(given, str):
        faults.append(((*place, "filter"), f"is {given!r}, allowed is a part of tensor names, as text."))
        given = str(given)
    if "value" not in item:
        faults.append((place, "'value' is required and missing."))
        return Clause(given, 0.0)
    return Clause(given, _read_value(item["value"], (*place, "value"), faults))


def _read_value(raw: Any, place: tuple[str | int, ...], faults: Faults) -> Any:
    if isinstance(raw, dict):
        faults.append((place, "is a mapping, allowed is a number or a list of numbers."))
        return 0.0
    if not isinstance(raw, list):
        return raw
    if not raw:
        faults.append((place, "is an empty list, allowed is a number, a list of numbers, or a list of {filter, value}."))
        return 0.0
    for number, item in enumerate(raw):
        if isinstance(item, bool) or not isinstance(item, int | float):
            faults.append(((*place, number), f"is {_shown(item)}, allowed in a gradient are numbers."))
    return tuple(item if isinstance(item, int | float) else 0.0 for item in raw)


def _shown(value: Any) -> str:
    return "a mapping" if isinstance(value, dict) else "a list" if isinstance(value, list) else repr(value)


def value_faults(setting: Setting, parameter: Parameter) -> list[str]:
    """What the parameter says against the values of a setting."""
    if any(isinstance(clause.value, tuple) for clause in setting.clauses) and parameter.choices:
        return [f"{parameter.name} is a list of numbers, allowed is {' or '.join(parameter.choices)}"]
    smooth = {point for clause in setting.clauses if isinstance(clause.value, tuple) for point in clause.value}
    found = [parameter.fault(point) for point in setting.points() if not (parameter.type is int and point in smooth)]
    return [f"{parameter.name} {fault}" for fault in dict.fromkeys(found) if fault is not None]


def pattern_warning(text: str) -> str | None:
    """Why a filter may not do what it looks like."""
    if text != "*" and any(character in text for character in _PATTERN):
        return f"the filter '{text}' is taken literally, as a part of tensor names; it is no pattern."
    return None


# -- evaluating -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Spot:
    """Where an output tensor stands: its position among the layers, and what each model calls it (None: as the output does)."""

    t: float = 0.0
    inputs: tuple[str, ...] | None = None


@dataclass(frozen=True)
class Levels:
    """The settings of one slice: of each model, then of slice, module and recipe, which hold for all models."""

    own: Sequence[Mapping[str, Setting]]
    shared: Sequence[Mapping[str, Setting]]

    @property
    def constant(self) -> bool:
        return all(setting.constant for level in [*self.own, *self.shared] for setting in level.values())

    @property
    def graded(self) -> bool:
        """Whether some value changes over the layers."""
        clauses = [clause for level in [*self.own, *self.shared] for setting in level.values() for clause in setting.clauses]
        return any(isinstance(clause.value, tuple) and len(set(clause.value)) > 1 for clause in clauses)


@dataclass(frozen=True)
class Resolved(ParameterSource):
    """The values of every output tensor; tensors with equal values share them."""

    values: tuple[Mapping[str, Any], ...]
    """In the order in which sorted names meet them."""
    index: Mapping[str, int] = field(repr=False)

    def for_tensor(self, name: str) -> Mapping[str, Any]:
        return self.values[self.index[name]]

    def describe(self) -> Any:
        names: list[list[str]] = [[] for _ in self.values]
        for name in sorted(self.index):
            names[self.index[name]].append(name)
        return [[dict(sorted(values.items())), group] for values, group in zip(self.values, names, strict=True)]


def distinct_values(source: ParameterSource) -> Sequence[Mapping[str, Any]]:
    """Every combination of values that occurs."""
    return source.values if isinstance(source, Resolved) else [source.for_tensor("")]


def evaluate(
    method: Method, levels: Levels, labels: Sequence[str], spots: Mapping[str, Spot]
) -> tuple[ParameterSource, dict[str, list[str]]]:
    """The values of every tensor of `spots`, and what is wrong with them: fault -> the tensors that it befalls.

    Time: O(tensors x models x parameters), and one check of every combination of values that occurs.
    """
    known: dict[Any, int] = {}
    values: list[Mapping[str, Any]] = []
    index: dict[str, int] = {}
    faults: dict[str, list[str]] = {}
    chosen: list[list[str]] = []
    if levels.constant:
        spots = {name: Spot() for name in sorted(spots)[:1]}
    for name, spot in sorted(spots.items()):
        shared, each = _values_at(method, levels, name, spot)
        key = (tuple(shared.items()), tuple(tuple(own.items()) for own in each))
        if key not in known:
            known[key] = len(values)
            found, wrong = method.resolve(shared, each, labels)
            values.append(found)
            chosen.append(wrong)
        index[name] = known[key]
        for fault in chosen[known[key]]:
            faults.setdefault(fault, []).append(name)
    if len(values) < 2:  # also where settings differ and their values do not
        return Constant(values[0] if values else {}), faults
    return Resolved(tuple(values), index), faults


def _values_at(method: Method, levels: Levels, name: str, spot: Spot) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """What the recipe gives one tensor, parameters without a value left out."""
    shared: dict[str, Any] = {}
    each: list[dict[str, Any]] = [{} for _ in levels.own]
    for parameter in method.parameters:
        if not parameter.per_model:
            value = _first(levels.shared, parameter.name, name, spot.t)
            if value is not NO_VALUE:
                shared[parameter.name] = value
            continue
        for position, own in enumerate(levels.own):
            inner = spot.inputs[position] if spot.inputs is not None else name
            value = _first((own, *levels.shared), parameter.name, inner, spot.t)
            if value is not NO_VALUE:
                each[position][parameter.name] = value
    return shared, each


def _first(levels: Sequence[Mapping[str, Setting]], parameter: str, name: str, t: float) -> Any:
    for level in levels:
        if parameter in level:
            value = level[parameter].at(name, t)
            if value is not NO_VALUE:
                return value
    return NO_VALUE
