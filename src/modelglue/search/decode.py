"""Genotype to recipe: which parameters of a merge are searched, how finely over layers and tensors, and what recipe a choice means."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol

from modelglue.errors import UserError, did_you_mean
from modelglue.methods import Method, get
from modelglue.methods import Parameter as MethodParameter
from modelglue.recipe import Candidate
from modelglue.search.space import Bool, Choice, Float, Int, Parameter, Params, Simplex, Space

#: what is searched if nothing is said: parameter -> range
RANGES: Mapping[str, tuple[float, float]] = {"weight": (0.0, 1.0), "density": (0.01, 1.0), "t": (0.0, 1.0), "select_topk": (0.01, 1.0)}
#: the same for methods whose other parameters leave less: della's epsilon has a default of 0.15 on both sides of the density
RANGES_OF: Mapping[str, Mapping[str, tuple[float, float]]] = {method: {"density": (0.16, 0.84)} for method in ("della", "della_linear")}
#: weights that sum to less cannot be normalised
_NO_SUM = 1e-3


class Decoder(Protocol):
    """A search space, and what recipe its choices mean."""

    @property
    def space(self) -> Space: ...

    def candidate(self, params: Params) -> Candidate | None:
        """The recipe of these parameters; None if no model comes of them."""


@dataclass(frozen=True)
class MergeSpace:
    """The parameters of one method over some members, as a search space.

    `granularity`: `model` (one value), `layer`, a number k (one value for every k adjacent layers, from the bottom; the last group may be
    shorter), or `gradient:N` (a curve through N points over the layers). All but `model` add a last group for what is in no layer
    (embedding, final norm, head), and need `layers` and `marker`, which layer tensors' names contain. `filters` are parts of names that
    get values of their own in every group of layers; with `only_filtered` nothing else varies over the layers, and the last group is
    all that no filter matches.
    `parameters`: name -> [low, high], {low, high, log}, {choices: [...]}, or a fixed value; default: weight and density, or t.
    Methods that take one model besides a given base search which of several members it is, too.
    The genotype is [group, filter, parameter, member], with a simplex over members for the weights of a linear merge.
    """

    method: str
    members: tuple[str, ...]
    base: str | None = None
    granularity: str | int = "model"
    layers: int | None = None
    marker: str = "layers."
    filters: tuple[str, ...] = ()
    parameters: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0
    """Of random methods: candidates share their masks."""
    only_filtered: bool = False

    def __post_init__(self) -> None:
        method = self._method
        if len(set(self.members)) != len(self.members) or not self.members:
            raise UserError(f"members are {list(self.members)}; allowed is a list of at least one, each named once.")
        count = 1 if self._one_of_many else len(self._models)
        if count < method.min_models or (method.max_models is not None and count > method.max_models):
            extra = " (the first is the base)" if self._first_is_base else ""
            most = "or more" if method.max_models is None else f"to {method.max_models}"
            raise UserError(f"{method.id} of {len(self.members)} members{extra}; allowed is {method.min_models} {most} besides the base.")
        if method.needs_base and self._base is None:
            raise UserError(f"{method.id} needs a base. Name it.")
        by_name = {parameter.name: parameter for parameter in method.parameters}
        known = set(by_name)
        for name in self.parameters:
            if name not in known:
                raise UserError(f"{method.id} has no parameter '{name}', but {', '.join(sorted(known))}.{did_you_mean(name, known)}")
            value = self.parameters[name]
            if not isinstance(value, list | Mapping) and (fault := by_name[name].fault(value)) is not None:
                raise UserError(f"{method.id}: {name} {fault}.")
        if self.granularity != "model" and (self.layers is None or self.layers < 1):
            raise UserError(f"granularity {self.granularity} needs the number of layers.")
        if self.only_filtered and (not self.filters or self.granularity == "model"):
            raise UserError("only_filtered needs filters, and a granularity other than model: else nothing varies over the layers.")
        _ = self._groups, self.space
        words = [name for name, said in self._searched.items() if isinstance(_parameter(name, said, by_name[name]), Choice)]
        if words and self._groups and (self.filters or str(self.granularity).startswith("gradient:")):
            raise UserError(
                f"{', '.join(words)}: has values that are no numbers, which may differ from layer to layer, but neither along a gradient "
                "nor by filters in every layer. Fix the value, or leave filters and gradient out."
            )

    @property
    def _method(self) -> Method:
        return get(self.method)

    @property
    def _first_is_base(self) -> bool:
        """Methods that go from the base to one model take two members for those."""
        return self.base is None and self._method.needs_base and self._method.max_models == 1

    @property
    def _base(self) -> str | None:
        return self.members[0] if self._first_is_base else self.base

    @property
    def _one_of_many(self) -> bool:
        """Whether the model itself is searched."""
        return self._method.needs_base and self._method.max_models == 1 and self.base is not None and len(self.members) > 1

    @property
    def _models(self) -> tuple[str, ...]:
        return self.members[1:] if self._first_is_base else self.members

    @cached_property
    def _groups(self) -> int:
        """Groups of layers; 0 if the whole model is one."""
        if self.granularity == "model":
            return 0
        assert self.layers is not None
        text = str(self.granularity)
        if text == "layer":
            return self.layers
        kind, _, number = text.rpartition(":")
        if not number.isdigit() or int(number) < 1 or kind not in ("", "gradient"):
            raise UserError(f"granularity is '{self.granularity}'; allowed are model, layer, a number of layers, gradient:N.")
        return int(number) if kind else 0 if int(number) >= self.layers else -(-self.layers // int(number))

    @cached_property
    def _places(self) -> list[tuple[str, str]]:
        """(group, filter) of every value, in the genotype's order; "" is what no filter matches, `rest` what is in no layer."""
        if not self._groups:
            return [("", name) for name in (*self.filters, "")]
        return [*((f"g{group}", name) for group in range(self._groups) for name in self._varying), ("rest", "")]

    @property
    def _varying(self) -> tuple[str, ...]:
        """Filters that have values in every group; "" is what no filter matches."""
        return self.filters if self.only_filtered else (*self.filters, "")

    @cached_property
    def _searched(self) -> dict[str, Any]:
        """Parameter -> what is said of it, or its default range."""
        said = {name: value for name, value in self.parameters.items() if isinstance(value, list | Mapping)}
        ranges = {**RANGES, **RANGES_OF.get(self.method, {})}
        defaults = {
            parameter.name: list(ranges[parameter.name])
            for parameter in self._method.parameters
            if parameter.name in ranges and parameter.name not in self.parameters
        }
        order = [parameter.name for parameter in self._method.parameters]
        found = dict(sorted({**defaults, **said}.items(), key=lambda pair: order.index(pair[0])))
        if not found and not self._one_of_many:
            raise UserError(
                f"{self.method} has no parameter that is searched by itself. Give ranges for some of: {', '.join(order) or 'none'}."
            )
        return found

    @property
    def _shares(self) -> bool:
        """Whether the weights are shares that sum to 1."""
        return (
            self.method == "linear"
            and "weight" in self._searched
            and self.parameters.get("normalize", True) is True
            and ("weight" not in self.parameters)
        )

    @cached_property
    def space(self) -> Space:
        parameters: list[Parameter] = [Choice("model", self.members)] if self._one_of_many else []
        by_name = {parameter.name: parameter for parameter in self._method.parameters}
        for group, filter_ in self._places:
            for name, said in self._searched.items():
                if name == "weight" and self._shares:
                    parameters.append(Simplex(_name(group, filter_, name), len(self._models)))
                else:
                    owners = self._models if by_name[name].per_model else ("",)
                    parameters += [_parameter(_name(group, filter_, name, owner), said, by_name[name]) for owner in owners]
        return Space(tuple(parameters))

    def candidate(self, params: Params) -> Candidate | None:
        """The recipe. Members whose weight is 0 everywhere are left out, where that changes nothing; without any, the base is left."""
        settings = {
            (name, owner): self._setting({place: self._value(params, *place, name, owner) for place in self._places})
            for name in self._searched
            for owner in (self._models if self._per_model(name) else ("",))
        }
        fixed = {name: value for name, value in self.parameters.items() if name not in self._searched}
        models = [params["model"]] if self._one_of_many else list(self._models)
        if "weight" in self._searched and "uniform" not in self._method.inputs:
            models = [alias for alias in models if settings["weight", alias] != 0]
        if not models:
            return None if self._base is None else Candidate.single(self._base)
        weights = {alias: settings.get(("weight", alias)) for alias in models}
        if self.method == "linear" and not fixed and set(self._searched) == {"weight"}:
            numbers = {alias: weight for alias, weight in weights.items() if isinstance(weight, float | int)}
            if len(numbers) == len(models):
                return Candidate.linear(numbers) if abs(sum(numbers.values())) > _NO_SUM else None
        recipe: dict[str, Any] = {
            "method": self.method,
            "models": [
                {"model": alias, **{name: settings[name, alias] for name in self._searched if self._per_model(name)}} for alias in models
            ],
        }
        if self._base is not None:
            recipe["base"] = self._base
        shared = {**fixed, **{name: settings[name, ""] for name in self._searched if not self._per_model(name)}}
        if shared:
            recipe["parameters"] = shared
        if "uniform" in self._method.inputs:
            recipe["seed"] = self.seed
        return Candidate.of(recipe)

    def everywhere(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Parameters with the same value in every group: name -> value, or {member: value}."""
        params: dict[str, Any] = {}
        for group, filter_ in self._places:
            for name, value in values.items():
                if name == "weight" and self._shares:
                    params[_name(group, filter_, name)] = [value[alias] for alias in self._models]
                elif isinstance(value, Mapping):
                    params |= {_name(group, filter_, name, alias): own for alias, own in value.items()}
                else:
                    params[_name(group, filter_, name)] = value
        return params

    def _per_model(self, name: str) -> bool:
        return next(parameter.per_model for parameter in self._method.parameters if parameter.name == name)

    def _value(self, params: Params, group: str, filter_: str, name: str, owner: str) -> Any:
        if name == "weight" and self._shares:
            return params[_name(group, filter_, name)][self._models.index(owner)]
        return params[_name(group, filter_, name, owner)]

    def _setting(self, values: Mapping[tuple[str, str], Any]) -> Any:
        """What a recipe says of one parameter: a value, or clauses of filters with values and curves over the layers."""
        if len(set(map(str, values.values()))) == 1:
            return next(iter(values.values()))
        clauses: list[tuple[str | None, Any]] = []
        for filter_ in self._varying if self._groups else (*self.filters, ""):
            if not self._groups:
                clauses.append((filter_ or None, values["", filter_]))
                continue
            curve = self._curve([values[f"g{group}", filter_] for group in range(self._groups)])
            if isinstance(curve, list) and not all(_is_number(value) for value in curve):  # a clause for every layer instead of a curve
                clauses += [(f"{self.marker}{layer}.", value) for layer, value in enumerate(curve)]
            else:
                clauses.append((filter_ or self.marker, curve))
        if self._groups:
            clauses.append((None, values["rest", ""]))
        return [{"value": value} if name is None else {"filter": name, "value": value} for name, value in clauses]

    def _curve(self, values: Sequence[Any]) -> Any:
        """One value per layer (or per point of the gradient), or the one value that they all are."""
        if len(set(values)) == 1:
            return values[0]
        if str(self.granularity).startswith("gradient:"):
            return list(values)
        assert self.layers is not None
        size = 1 if self.granularity == "layer" else int(self.granularity)
        return [values[layer // size] for layer in range(self.layers)]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _name(*parts: str) -> str:
    return "/".join(part for part in parts if part)


def _parameter(name: str, said: Any, parameter: MethodParameter) -> Parameter:
    if isinstance(said, Mapping) and set(said) == {"choices"} and isinstance(said["choices"], list | tuple):
        return Choice(name, tuple(said["choices"]))
    if isinstance(said, list) and len(said) == 2 and set(map(str, said)) == {"True", "False"} and parameter.type is bool:
        return Bool(name)
    ends, log = said, False
    if isinstance(said, Mapping) and {"low", "high"} <= set(said) <= {"low", "high", "log"}:
        ends, log = [said["low"], said["high"]], bool(said.get("log", False))
    if not (isinstance(ends, list) and len(ends) == 2 and all(isinstance(end, int | float) for end in ends)):
        raise UserError(f"{name} is {said!r}; allowed are [low, high], {{low, high, log}}, {{choices: [...]}} and a fixed value.")
    low, high = ends
    for end in (low, high):
        if (fault := parameter.fault(end)) is not None:
            raise UserError(f"{name} is searched from {low:g} to {high:g}: {parameter.name} {fault}.")
    return Int(name, int(low), int(high)) if parameter.type is int else Float(name, float(low), float(high), log)


@dataclass(frozen=True)
class NearbySpace:
    """Small changes to given coefficients of a linear merge: max(0, c + delta), normalised, with delta from -`width` to `width`.

    Unless `free_zero`, members that have no part stay without.
    """

    weights: Mapping[str, float]
    width: float = 0.1
    free_zero: bool = True

    @cached_property
    def space(self) -> Space:
        moved = [alias for alias, weight in self.weights.items() if weight or self.free_zero]
        return Space(tuple(Float(alias, -self.width, self.width) for alias in moved))

    def candidate(self, params: Params) -> Candidate | None:
        found = {alias: max(0.0, weight + params.get(alias, 0.0)) for alias, weight in self.weights.items()}
        return Candidate.linear(found) if sum(found.values()) > 1e-8 else Candidate.linear(dict.fromkeys(found, 1.0))
