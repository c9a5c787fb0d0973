"""The registry of merge methods: a method's signature is its schema.

A method is one function in one file of this package. Its positional arguments say what arrives (`models`, and if it asks for them `base`,
`uniform`, `survey`, `start`; `base: Tensor | None` where a base is welcome and not needed); its keyword arguments are its parameters, with
type, legal range and default in the signature. Recipes, the command line and the documentation are generated from that. Nothing here
imports torch.
"""

from __future__ import annotations

import importlib
import inspect
import math
import pkgutil
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Annotated, Any, Literal, TypeVar

# methods take these from here: of ours they import nothing but this module
from modelglue.checkpoint.engine.merge_function import CannotMergeError as CannotMergeError
from modelglue.checkpoint.engine.merge_function import Round as Round
from modelglue.errors import UserError, did_you_mean

T = TypeVar("T")
Unit = Literal["element", "row", "channel", "matrix"]

#: resolved parameters and what to call the models -> all that is wrong with them together
Check = Callable[[Mapping[str, Any], Sequence[str]], Sequence[str]]

_PER_MODEL = object()
#: one value per model: a list in the order of the recipe
PerModel = Annotated[Sequence[T], _PER_MODEL]

REQUIRED = inspect.Parameter.empty
_INPUTS = ("models", "base", "uniform", "survey", "start")
#: what mergekit's recipes may say to any method, and what changes nothing: the storage type of its sign masks
_NEVER_AN_EFFECT = ("int8_mask",)


def per_model(default: float | None) -> Any:
    """The default of a per-model parameter: this value for every model that gives none."""
    return default


@dataclass(frozen=True)
class Range:
    """Legal values of a number; `above` and `below` are excluded ends, `low` and `high` included ones."""

    low: float = -math.inf
    high: float = math.inf
    above: float = -math.inf
    below: float = math.inf

    def __contains__(self, value: float) -> bool:
        return self.low <= value <= self.high and self.above < value < self.below

    def __str__(self) -> str:
        left = f"({self.above:g}" if self.above > -math.inf else ("(-inf" if self.low == -math.inf else f"[{self.low:g}")
        right = f"{self.below:g})" if self.below < math.inf else ("inf)" if self.high == math.inf else f"{self.high:g}]")
        return f"{left}, {right}"


@dataclass(frozen=True)
class Parameter:
    """One parameter of a method, read from its signature. `optional`: None is a value too (`float | None`)."""

    name: str
    per_model: bool
    type: type
    default: Any
    range: Range | None
    choices: tuple[str, ...]
    doc: str
    optional: bool = False

    @property
    def required(self) -> bool:
        return self.default is REQUIRED

    def fault(self, value: Any) -> str | None:
        """What is wrong with `value`, or None."""
        if value is None and self.optional:
            return None
        if self.type is bool:
            return None if isinstance(value, bool) or value in (0, 1) else f"is {value!r}, allowed is true or false"
        if self.choices:
            return None if value in self.choices else f"is {value!r}, allowed is {' or '.join(self.choices)}"
        if isinstance(value, bool) or not isinstance(value, int | float):
            return f"is {value!r}, allowed is a number"
        if not math.isfinite(value):
            return f"is {value}, allowed is a finite number"
        if self.type is int and value != int(value):
            return f"is {value:g}, allowed is a whole number"
        if self.range is not None and value not in self.range:
            return f"is {value:g}, allowed is {self.range}"
        return None


@dataclass(frozen=True)
class Method:
    """A merge method: its function and everything that is declared about it."""

    id: str
    function: Callable[..., Any]
    units: tuple[Unit, ...]
    parameters: tuple[Parameter, ...]
    inputs: tuple[str, ...]
    returns: Literal["tensor", "bank", "state"]
    min_models: int
    max_models: int | None
    symmetric: bool
    #: where it is computed element by element, it takes inputs as they are stored, and what is no number in one is none in the result
    raw: bool
    #: even one model at full weight is taken in part only
    selective: bool
    summary: str
    doc: str
    source: str
    needs_base: bool
    #: what a recipe of mergekit means where it says nothing, for parameters whose default differs there
    mergekit: Mapping[str, Any]
    #: parameters that mergekit's recipes may give this method and that change nothing
    without_effect: tuple[str, ...]
    #: fixed, or decided by the parameters of a merge; asked through `unit`, `rounds` and `resolve`
    _unit: Unit | Callable[[Mapping[str, Any]], Unit] = field(repr=False)
    _rounds: Sequence[Round] | Callable[[Mapping[str, Any]], Sequence[Round]] = field(repr=False)
    _check: Check | None = field(repr=False, default=None)
    _odd: Check | None = field(repr=False, default=None)
    _copies: Callable[[Mapping[str, Any]], bool] | None = field(repr=False, default=None)

    def __reduce__(self) -> Any:
        return get, (self.id,)

    @property
    def takes_base(self) -> bool:
        """Whether the base is an input of the merge where there is one; `needs_base` if there must be."""
        return "base" in self.inputs

    @property
    def needs_uniform(self) -> bool:
        return "uniform" in self.inputs

    @property
    def surveys(self) -> bool:
        """Whether a merge reads its inputs more than once."""
        return "survey" in self.inputs

    def unit(self, parameters: Mapping[str, Any]) -> Unit:
        return self._unit(parameters) if callable(self._unit) else self._unit

    def rounds(self, parameters: Mapping[str, Any]) -> Sequence[Round]:
        return self._rounds(parameters) if callable(self._rounds) else self._rounds

    def odd(self, parameters: Mapping[str, Any], labels: Sequence[str]) -> Sequence[str]:
        """What resolved parameters allow and hardly anybody means, in sentences."""
        return self._odd(parameters, labels) if self._odd is not None else ()

    def copies(self, parameters: Mapping[str, Any]) -> bool:
        """Whether the result is the first model's tensor, whatever its dtype and values: then nothing is computed."""
        return self._copies is not None and self._copies(parameters)

    def merge(
        self,
        models: Sequence[Any],
        base: Any,
        uniform: Sequence[Any] | None,
        survey: Sequence[Any],
        start: int,
        parameters: Mapping[str, Any],
    ) -> Any:
        """Call the function with the inputs that it asks for; see `modelglue.checkpoint.MergeFunction`."""
        given = {"models": models, "base": base, "uniform": uniform, "survey": survey, "start": start}
        values = {_python_name(key): value for key, value in parameters.items()}
        return self.function(*(given[name] for name in self.inputs), **values)

    def parameter(self, name: str) -> Parameter | None:
        return next((parameter for parameter in self.parameters if parameter.name == name), None)

    def resolve(
        self, shared: Mapping[str, Any], each: Sequence[Mapping[str, Any]], labels: Sequence[str]
    ) -> tuple[dict[str, Any], list[str]]:
        """Values for every parameter (a list for per-model ones), and all that is wrong with what was given.

        `shared` are the recipe's global parameters; a per-model parameter given there holds for every model without its own.
        """
        faults: list[str] = []
        known = [parameter.name for parameter in self.parameters]
        for place, names in [("parameters", shared), *((f"model {label}", own) for label, own in zip(labels, each, strict=True))]:
            for name in names:
                parameter = self.parameter(name)
                if parameter is None:
                    faults.append(
                        f"{place}: '{name}' is no parameter of {self.id}.{did_you_mean(name, known)} Allowed: {', '.join(known) or 'none'}"
                    )
                elif place != "parameters" and not parameter.per_model:
                    faults.append(f"{place}: '{name}' is one value for the whole merge; put it under parameters:")
        values: dict[str, Any] = {}
        for parameter in self.parameters:
            if parameter.per_model:
                found = [own.get(parameter.name, shared.get(parameter.name, parameter.default)) for own in each]
                places = [f"model {label}" for label in labels]
            else:
                found, places = [shared.get(parameter.name, parameter.default)], ["parameters"]
            for place, value in zip(places, found, strict=True):
                if value is REQUIRED:
                    faults.append(f"{place}: '{parameter.name}' is required by {self.id} and missing")
                elif (fault := parameter.fault(value)) is not None:
                    faults.append(f"{place}: {parameter.name} {fault}")
            converted = [_convert(parameter, value) for value in found]
            values[parameter.name] = converted if parameter.per_model else converted[0]
        if not self.min_models <= len(each) <= (self.max_models or len(each)):
            wanted = f"exactly {self.min_models}" if self.min_models == self.max_models else f"at least {self.min_models}"
            besides = " besides the base" if self.takes_base else ""
            faults.append(f"{self.id} takes {wanted} model{'s' if self.min_models > 1 else ''}{besides}, the recipe has {len(each)}")
        if not faults and self._check is not None:
            faults += self._check(values, [f"model {label}" for label in labels])
        return values, faults


def method(
    *,
    unit: Unit | Callable[[Mapping[str, Any]], Unit] = "element",
    units: tuple[Unit, ...] | None = None,
    survey: Sequence[Round] | Callable[[Mapping[str, Any]], Sequence[Round]] = (),
    returns: Literal["tensor", "bank", "state"] = "tensor",
    models: tuple[int, int | None] = (1, None),
    symmetric: bool = True,
    raw: bool = False,
    selective: bool = False,
    source: str,
    check: Check | None = None,
    odd: Check | None = None,
    copies: Callable[[Mapping[str, Any]], bool] | None = None,
    mergekit: Mapping[str, Any] | None = None,
    without_effect: Sequence[str] = (),
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Declare a merge method. The function's name is its id.

    unit: what one call must hold (may depend on the parameters; then `units` lists the possible ones). survey: the rounds
    that reduce over chunks first. models: least and largest number of models besides the base. raw: the method's
    chunk functions widen their tensors themselves, and NaN spreads through them, so that nothing is converted or checked before; only
    where the unit is "element". symmetric: permuting models
    together with their parameters changes nothing. selective: even one model at full weight is taken in part only. check: what
    single ranges cannot say about resolved parameters. odd: the same, for what is allowed and warned of. copies: for which parameters
    the one model's tensor is taken as it is. mergekit: values that its recipes mean where they say nothing, and where ours differ.
    without_effect: further names that its recipes may give and that change nothing.
    """

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        signature = inspect.signature(function)
        hints = typing.get_type_hints(function, localns={"Tensor": object}, include_extras=True)
        inputs = tuple(name for name, p in signature.parameters.items() if p.kind is p.POSITIONAL_OR_KEYWORD)
        unknown = [name for name in inputs if name not in _INPUTS]
        if unknown or inputs[:1] != ("models",):
            raise TypeError(f"{function.__name__}: positional arguments are {inputs}; allowed are {_INPUTS}, models first")
        allowed = {parameter.rstrip("_") for parameter, p in signature.parameters.items() if p.kind is p.KEYWORD_ONLY}
        if strange := sorted(set(mergekit or {}) - allowed):
            raise TypeError(f"{function.__name__}: mergekit= names {strange}, which are no parameters of it")
        doc = inspect.getdoc(function) or ""
        described = _argument_docs(doc)
        parameters = tuple(
            _parameter(name, hints[name], p.default, described.get(name, ""))
            for name, p in signature.parameters.items()
            if p.kind is p.KEYWORD_ONLY
        )
        _registry[function.__name__] = Method(
            id=function.__name__, function=function, units=units or ((unit,) if isinstance(unit, str) else ("element",)),
            parameters=parameters, inputs=inputs, returns=returns, min_models=models[0], max_models=models[1], symmetric=symmetric, raw=raw,
            selective=selective, summary=doc.split("\n", 1)[0], doc=doc, source=source,
            needs_base="base" in inputs and not _optional(hints["base"])[1],
            mergekit=dict(mergekit or {}), without_effect=(*_NEVER_AN_EFFECT, *without_effect), _unit=unit, _rounds=survey,
            _check=check, _odd=odd, _copies=copies,
        )  # fmt: skip
        return function

    return register


_registry: dict[str, Method] = {}


def _parameter(name: str, hint: Any, default: Any, doc: str) -> Parameter:
    each = False
    range_: Range | None = None
    while typing.get_origin(hint) is Annotated:
        hint, *extras = typing.get_args(hint)
        for extra in extras:
            if extra is _PER_MODEL:
                each = True
            elif isinstance(extra, Range):
                range_ = extra
        if each and typing.get_origin(hint) is not Annotated and typing.get_args(hint):
            hint = typing.get_args(hint)[0]  # Sequence[T] -> T
    hint, optional = _optional(hint)
    choices = tuple(typing.get_args(hint)) if typing.get_origin(hint) is Literal else ()
    return Parameter(name.rstrip("_"), each, str if choices else hint, default, range_, choices, doc, optional)


def _optional(hint: Any) -> tuple[Any, bool]:
    """`T | None` as T and True, anything else as it is and False."""
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        rest = [part for part in typing.get_args(hint) if part is not type(None)]
        if len(rest) == 1 and len(typing.get_args(hint)) == 2:
            return rest[0], True
    return hint, False


def _argument_docs(doc: str) -> dict[str, str]:
    """`name: text` lines of the docstring's "Parameters" part."""
    _, _, tail = doc.partition("Parameters:\n")
    found: dict[str, str] = {}
    last = ""
    for line in tail.splitlines():
        if not line.strip():
            break
        name, colon, text = line.strip().partition(": ")
        if line.startswith("    ") and not line.startswith("      ") and colon and name.isidentifier():
            found[name], last = text, name
        elif last:
            found[last] += " " + line.strip()
    return found


def _python_name(name: str) -> str:
    return f"{name}_" if name == "lambda" else name


def _convert(parameter: Parameter, value: Any) -> Any:
    if value is REQUIRED or value is None or parameter.fault(value) is not None or parameter.choices:
        return value
    return bool(value) if parameter.type is bool else parameter.type(value)


@cache
def _load_all() -> None:
    package = importlib.import_module("modelglue.methods")
    for module in pkgutil.iter_modules(package.__path__):
        if not module.name.startswith("_") and module.name != "registry":
            importlib.import_module(f"modelglue.methods.{module.name}")


def get(name: str) -> Method:
    """The method of that id; UserError with the nearest ids for an unknown one."""
    _load_all()
    if name not in _registry:
        raise UserError(f"there is no merge method '{name}'.{did_you_mean(name, _registry)} Known: {', '.join(sorted(_registry))}.")
    return _registry[name]


def all_methods() -> list[Method]:
    """Every method, sorted by id."""
    _load_all()
    return [_registry[name] for name in sorted(_registry)]
