"""What a recipe means together: asked of the registry of methods, before any model is opened."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from modelglue.errors import UserError, did_you_mean
from modelglue.methods import get
from modelglue.methods.registry import Method
from modelglue.recipe.candidate import DATA_FLOW
from modelglue.recipe.document import Document, Place
from modelglue.recipe.schema import Recipe, Source, Stretch
from modelglue.recipe.settings import Levels, Setting, Spot, evaluate, pattern_warning, read_setting, value_faults

_SHAPES = ("models", "slices", "modules", "hops")
#: what a path of hops has no use for
_NOT_OF_PATHS = ("into", "parameters", "tokenizer", "chat_template", "vocabulary_mismatch", "missing", "shape_mismatch", "allow_mixed")


class Checks:
    """Everything that is wrong or odd with a recipe and the recipes inside it, each with file and line."""

    def __init__(self, document: Document) -> None:
        self._document = document
        self.faults: list[str] = []
        self.warnings: list[str] = []

    def run(self, recipe: Recipe, place: Place = ()) -> Checks:
        self._structure(recipe, place)
        if recipe.hops or recipe.method == DATA_FLOW:
            self._path(recipe, place)
        else:
            self._merge(recipe, place)
        for inner, node in recipe.nested():
            self.run(node, (*place, *inner))
        return self

    def _path(self, recipe: Recipe, place: Place) -> None:
        """A path goes together with its method, and with nothing that is for merges."""
        if recipe.method != DATA_FLOW:
            self._fault((*place, "method"), f"is '{recipe.method}'; a path of hops has the method {DATA_FLOW}.")
        elif not recipe.hops:
            self._fault((*place, "hops"), f"is required by {DATA_FLOW} and missing; give a list of {{model, layer, scale}}.")
        for key in _NOT_OF_PATHS:
            if getattr(recipe, key) != Recipe.model_fields[key].default:
                self._fault((*place, key), "has no effect on a path of hops. Remove it, or put it into a recipe that is a model of a hop.")
        sources = [(("hops", number), hop) for number, hop in enumerate(recipe.hops)]
        if isinstance(recipe.base, Source):
            sources.append((("base",), recipe.base))  # type: ignore[arg-type]
        for where, source in sources:
            for key in ("part", "architecture", "layers"):
                if getattr(source, key) is not None:
                    self._fault((*place, *where, key), "has no place in a path of hops.")

    def _merge(self, recipe: Recipe, place: Place) -> None:
        try:
            method = get(recipe.method)
        except UserError as error:
            self._fault((*place, "method"), str(error))
        else:
            for stretch in recipe.stretches():
                _Stretch(self, recipe, stretch, method, place).run()
        self._tokenizer(recipe, place)

    def _fault(self, place: Place, text: str) -> None:
        fault = self._document.fault(place, text)
        if fault not in self.faults:  # settings above several slices are met in each
            self.faults.append(fault)

    def _warn(self, place: Place, text: str) -> None:
        warning = self._document.fault(place, text)
        if warning not in self.warnings:
            self.warnings.append(warning)

    def word_for_base(self, place: Place) -> str:
        """What the key of the base is called in the dialect in which the recipe at `place` was written."""
        value = self._document.written(place)[0].value
        return "base_model" if isinstance(value, dict) and "merge_method" in value else "base"

    def _structure(self, recipe: Recipe, place: Place) -> None:
        given = [key for key in _SHAPES if getattr(recipe, key)]
        if not given:
            self._fault((*place, "models"), "is required and missing.")
        for key in given[1:]:
            self._fault((*place, key), f"stands beside {given[0]}; a recipe has one of {', '.join(_SHAPES)}.")
        for name, module in recipe.modules.items():
            inside = [key for key in ("models", "slices") if getattr(module, key)]
            if len(inside) != 1:
                self._fault((*place, "modules", name), f"has {' and '.join(inside) or 'neither'}; a module has one of models, slices.")
        if isinstance(recipe.base, Source) and recipe.base.layers is not None:
            self._fault((*place, "base", "layers"), "stands above all slices; give the layers of the base inside the slice, as its base.")

    def _tokenizer(self, recipe: Recipe, place: Place) -> None:
        """Models that the tokenizer section names are models of the recipe."""
        if recipe.tokenizer is None:
            return
        sources = [source.model if isinstance(source, Source) else source for _, source in recipe.inputs()]
        known = [name for name in sources if isinstance(name, str)]
        named: list[tuple[Place, str]] = []
        if not isinstance(recipe.tokenizer.source, str):
            named.append((("tokenizer", "source"), recipe.tokenizer.source.model))
        for token, rule in recipe.tokenizer.tokens.items():
            if rule.source is None or isinstance(rule.source, str):
                continue
            where: Place = ("tokenizer", "tokens", token, "source")
            named.append((where, rule.source.model))
            if rule.source.token is not None and rule.source.token_id is not None:
                self._fault((*place, *where), "names a token and a token_id; give one of them.")
        for where, name in named:
            words = ["union", "base"] if where == ("tokenizer", "source") else []
            if name not in known:
                hint = did_you_mean(name, [*words, *known])
                what = "neither union nor base nor a" if words else "no"
                text = f"'{name}' is {what} model of this recipe.{hint} Its models: {', '.join(dict.fromkeys(known))}."
                self._fault((*place, *where), text)


class _Stretch:
    """The checks of one slice, or of a recipe of whole models."""

    def __init__(self, checks: Checks, recipe: Recipe, stretch: Stretch, method: Method, place: Place) -> None:
        self._checks = checks
        self._recipe = recipe
        self._stretch = stretch
        self._method = method
        self._place = place
        self._labels = stretch.labels()
        self._found = len(checks.faults)

    def _fault(self, place: Place, text: str) -> None:
        self._checks._fault((*self._place, *place), text)

    def run(self) -> None:
        settings = self._settings()
        self._layers()
        count = len(self._stretch.models)
        method = self._method
        baseless = method.needs_base and self._stretch.base is None and self._recipe.base is None
        among = range(count - 1, count + 1) if baseless else (count,)  # one of them may be meant as the base
        if not any(method.min_models <= models <= (method.max_models or models) for models in among):
            wanted = f"exactly {method.min_models}" if method.min_models == method.max_models else f"at least {method.min_models}"
            besides = " besides the base" if method.takes_base else ""
            what = "slice" if self._stretch.sliced else "recipe"
            self._fault(
                self._stretch.place,
                f"{method.id} takes {wanted} model{'s' if method.min_models > 1 else ''}{besides}, the {what} has {count}.",
            )
        if baseless:
            self._fault(self._stretch.place, f"{method.id} needs a base model; add {self._checks.word_for_base(self._place)}: REF.")
        if settings is not None and settings.constant and len(self._checks.faults) == self._found:
            self._values(settings)

    # -- settings -------------------------------------------------------------------------------------------------------

    def _settings(self) -> Levels | None:
        """The settings of all levels, read; None if one of them cannot be."""
        for place, level in reversed(self._stretch.shared):
            for name in level:
                self._known(name, (*place, name), None)
        for number, entry in enumerate(self._stretch.models):
            for name in entry.own:
                self._known(name, self._entry(number, name), number)
        shared = [self._read(level, place, None) for place, level in self._stretch.shared]
        own = [self._read(entry.own, self._entry(number), number) for number, entry in enumerate(self._stretch.models)]
        for parameter in self._method.parameters:
            if not parameter.per_model:
                self._required(parameter.name, parameter.required, shared, ("parameters", parameter.name), "")
            for number, level in enumerate(own if parameter.per_model else ()):
                place, label = self._entry(number, parameter.name), f"model {self._labels[number]}: "
                self._required(parameter.name, parameter.required, [level, *shared], place, label)
        if len(self._checks.faults) > self._found:
            return None
        return Levels(own, shared)

    def _entry(self, number: int, *more: str | int) -> Place:
        return (*self._stretch.place, "models", number, *more)

    def _known(self, name: str, place: Place, number: int | None) -> None:
        parameter = self._method.parameter(name)
        known = [parameter.name for parameter in self._method.parameters]
        label = "" if number is None else f"model {self._labels[number]}: "
        if parameter is None:
            hint = " Parameters stand beside 'model' in this dialect." if name == "parameters" and number is not None else ""
            allowed = ", ".join(known) or "none"
            text = f"{label}'{name}' is no parameter of {self._method.id}.{did_you_mean(name, known)} Allowed: {allowed}.{hint}"
            self._fault(place, text)
        elif number is not None and not parameter.per_model:
            self._fault(place, f"{label}'{name}' is one value for the whole merge; put it under parameters:.")

    def _read(self, level: Mapping[str, Any], place: Place, number: int | None) -> Mapping[str, Setting]:
        found = {}
        for name, raw in level.items():
            parameter = self._method.parameter(name)
            if parameter is None:
                continue
            setting, faults = read_setting(raw)
            label = "" if number is None else f"model {self._labels[number]}: "
            for inner, text in faults:
                self._fault((*place, name, *inner), f"{label}{name} {text}" if not inner else text)
            if not faults:
                for text in value_faults(setting, parameter):
                    self._fault((*place, name), f"{label}{text}.")
            for text in dict.fromkeys(setting.filters()):
                if (warning := pattern_warning(text)) is not None:
                    self._checks._warn((*self._place, *place, name), warning)
            found[name] = setting
        return found

    def _required(self, name: str, required: bool, levels: list[Mapping[str, Setting]], place: Place, label: str) -> None:
        if required and not any(name in level for level in levels):
            self._fault(place, f"{label}'{name}' is required by {self._method.id} and missing.")

    def _values(self, levels: Levels) -> None:
        """What the method says against values that are the same everywhere."""
        _, faults = evaluate(self._method, levels, self._labels, {"": Spot()})
        for fault in faults:
            self._fault(place_of(fault, self._stretch), sentence(fault))

    # -- layers ---------------------------------------------------------------------------------------------------------

    def _layers(self) -> None:
        sources: list[tuple[Place, str, list[int] | None]] = [
            (self._entry(number), self._labels[number], entry.layers) for number, entry in enumerate(self._stretch.models)
        ]
        base = self._stretch.base if self._stretch.base is not None else self._recipe.base
        own_base = isinstance(self._stretch.base, Source) and self._stretch.base.layers is not None
        if own_base and isinstance(self._stretch.base, Source):
            sources.append(((*self._stretch.place, "base"), f"the base {self._stretch.base.label}", self._stretch.base.layers))
        if not self._stretch.sliced:
            for place, _, layers in sources:
                if layers is not None:
                    self._fault((*place, "layers"), "belongs into slices:; whole models give all of their layers.")
            return
        good: list[tuple[str, list[int]]] = []
        for place, label, layers in sources:
            if layers is None:
                self._fault((*place, "layers"), f"model {label}: is required in a slice and missing; give [first, last + 1].")
            elif not 0 <= layers[0] < layers[1]:
                self._fault((*place, "layers"), f"model {label}: is {layers}, allowed is [a, b] with 0 <= a < b.")
            else:
                good.append((label, layers))
        for label, layers in good[1:]:
            if layers[1] - layers[0] != good[0][1][1] - good[0][1][0]:
                self._fault(
                    self._stretch.place,
                    f"takes {layers[1] - layers[0]} layers of {label} {layers} and {good[0][1][1] - good[0][1][0]} of "
                    f"{good[0][0]} {good[0][1]}; all models of a slice give equally many.",
                )
        if self._method.takes_base and base is not None and not own_base and len({tuple(layers) for _, layers in good}) > 1:
            self._fault(
                self._stretch.place,
                "does not say which layers of the base it takes, and its models' ranges differ. Add the base with its range.",
            )


def place_of(fault: str, stretch: Stretch) -> Place:
    """Where a fault of the registry stands: in the entry of its model (and at the key it quotes), or under parameters."""
    for number, label in enumerate(stretch.labels()):
        if fault.startswith(f"model {label}: "):
            return (*stretch.place, "models", number, _key_in(fault.removeprefix(f"model {label}: ")))
    if fault.startswith("parameters: "):
        return ("parameters", _key_in(fault.removeprefix("parameters: ")))
    return stretch.place


def sentence(fault: str) -> str:
    """The registry's words without the place, which the line already has."""
    return f"{fault.removeprefix('parameters: ').removesuffix('.')}."


def _key_in(fault: str) -> str:
    """The parameter's name, quoted or not, with which a fault begins."""
    return fault.split(" ", 1)[0].strip("'")


def filters_of(recipe: Recipe) -> Iterator[tuple[Place, str]]:
    """Every filter of the recipe (not of those inside it), with its place."""
    for stretch in recipe.stretches():
        levels = [*stretch.shared, *(((*stretch.place, "models", n), entry.own) for n, entry in enumerate(stretch.models))]
        for place, level in levels:
            for name, raw in level.items():
                for text in read_setting(raw)[0].filters():
                    yield (*place, name), text
