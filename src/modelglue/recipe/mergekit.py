"""mergekit's recipes, read unchanged: their grammar and its quirks become a recipe of ours, and messages keep speaking of theirs."""

from __future__ import annotations

import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from modelglue.recipe.document import Document, Place, shown
from modelglue.recipe.mergekit_reader import ENTRY, MODULE, OURS, SLICE, SOURCE, TOP, Converted, Reader, Reference
from modelglue.recipe.mergekit_tokenizer import tokenizer_section, vocabulary_of
from modelglue.recipe.schema import FORMAT, StoreDtype

_DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16", "half": "float16"}


def convert(document: Document) -> Converted:
    """One document of their grammar."""
    converter = _Converter(document)
    converter.run()
    return converter.out


@dataclass(frozen=True)
class _Input:
    """One source or entry: its model, layer range and parameters, and where it stands."""

    reference: Reference
    place: Place
    layers: Any
    parameters: Mapping[str, Any]


class _Converter:
    def __init__(self, document: Document) -> None:
        self._given: dict[str, Any] = document.value
        self._reader = Reader(document)
        self._base: Reference | None = None

    @property
    def out(self) -> Converted:
        return self._reader.out

    # -- the whole ------------------------------------------------------------------------------------------------------

    def run(self) -> None:
        given = self._given
        self._reader.keys((), given, TOP)
        name = given.get("name")
        self._reader.out.name = str(name) if name is not None else None
        value: dict[str, Any] = {"format": FORMAT, "method": self._reader.method_id}
        self._reader.out.value = value
        self._reader.trace(("method",), ("merge_method",))
        if given.get("base_model") is not None:
            self._base = self._reader.reference(("base_model",), given["base_model"])
            if self._base is not None:
                value["base"] = self._node(self._base, ("base",), ("base_model",))
        shapes = [key for key in ("models", "slices", "modules") if given.get(key)]
        if not shapes:
            self._nothing()
        for key in shapes[1:]:
            self._reader.fault((key,), f"stands beside {shapes[0]}; a recipe has one of models, slices, modules.")
        shared = self._reader.parameters(("parameters",), given.get("parameters"))
        if "models" in shapes:
            value["models"] = self._models((), (), given["models"], [shared])
        elif "slices" in shapes:
            value["slices"] = self._slices((), (), given["slices"])
        elif "modules" in shapes:
            value["modules"] = self._modules(given["modules"], shared)
        if self._reader.method is not None:
            shared = {**self._reader.method.mergekit, **shared}
        if shared:
            value["parameters"] = shared
        self._rest(value)

    def _nothing(self) -> None:
        empty = [key for key in ("models", "slices", "modules") if key in self._given]
        for key in empty:
            self._reader.fault((key,), "is empty; a recipe says in one of models, slices, modules what is merged.")
        if not empty:
            self._reader.fault((), "has none of models, slices, modules; a recipe has one of them.")

    def _rest(self, value: dict[str, Any]) -> None:
        given = self._given
        for theirs, ours in OURS.items():
            if theirs in given:
                value[ours] = given[theirs]
                self._reader.trace((ours,), (theirs,))
        if (store := self._dtype()) is not None:
            value["dtype"] = {"store": store}
        if given.get("chat_template") is not None:
            value["chat_template"] = given["chat_template"]
        if given.get("tokenizer") is not None and given.get("tokenizer_source") is not None:
            self._reader.fault(("tokenizer_source",), "stands beside 'tokenizer'; give one of them.")
        if given.get("tokenizer_source") is not None:
            value["tokenizer"] = {
                "source": vocabulary_of(self._reader, ("tokenizer", "source"), ("tokenizer_source",), given["tokenizer_source"])
            }
        if given.get("tokenizer") is not None:
            value["tokenizer"] = tokenizer_section(self._reader, given["tokenizer"])

    def _dtype(self) -> str | None:
        """What is stored: `out_dtype`, else `dtype`, else what the inputs have (a method with a base keeps the base's)."""
        key = "out_dtype" if self._given.get("out_dtype") else "dtype"
        found = None
        for name in ("dtype", "out_dtype"):
            given = self._given.get(name)
            if given is None:
                continue
            word = str(given).removeprefix("torch.")
            word = _DTYPES.get(word, word)
            if word == "int64":
                self._reader.fault(
                    (name,), "is 'int64', which would round every weight to a whole number. Allowed: float32, float16, bfloat16."
                )
            elif word not in typing.get_args(StoreDtype)[:3]:
                self._reader.fault((name,), f"is '{given}', allowed is float32, float16 or bfloat16.")
            elif name == key:
                found = word
        if not self._given.get(key) and self._reader.method is not None and not self._reader.method.takes_base:
            return "widest"
        return found

    # -- models ---------------------------------------------------------------------------------------------------------

    def _node(self, reference: Reference, ours: Place, theirs: Place) -> Any:
        """A model where ours takes one that may say what is taken of it (a base)."""
        self._reader.trace(ours, theirs)
        if reference.architecture is None:
            self._reader.out.references[ours] = reference.name
            return reference.name
        self._reader.trace((*ours, "model"), theirs)
        self._reader.out.references[(*ours, "model")] = reference.name
        return {"model": reference.name, "architecture": reference.architecture}

    def _entry(self, given: _Input, ours: Place) -> dict[str, Any]:
        """An input as an entry of ours: the parameters stand beside the model."""
        self._reader.trace(ours, given.place)
        self._reader.trace((*ours, "model"), (*given.place, "model"))
        self._reader.out.references[(*ours, "model")] = given.reference.name
        entry: dict[str, Any] = {"model": given.reference.name}
        if given.reference.architecture is not None:
            entry["architecture"] = given.reference.architecture
        if given.layers is not None:
            entry["layers"] = given.layers
        self._reader.trace((*ours, "layers"), (*given.place, "layer_range"))
        for name, setting in given.parameters.items():
            entry[name] = setting
        for name in (parameter.name for parameter in self._reader.method.parameters) if self._reader.method else given.parameters:
            self._reader.trace((*ours, name), (*given.place, "parameters", name))
        return entry

    def _inputs(self, place: Place, given: Any, allowed: tuple[str, ...]) -> list[_Input]:
        what = "{model: REF, layer_range: [A, B], parameters: {...}}" if "layer_range" in allowed else "{model: REF, parameters: {...}}"
        if not isinstance(given, list) or not given:
            self._reader.fault(place, f"is {shown(given)}, allowed is a list of {what}.")
            return []
        found = []
        for number, item in enumerate(given):
            here = (*place, number)
            entry = self._reader.mapping(here, item, what)
            if entry is None:
                continue
            self._reader.keys(here, entry, allowed)
            if entry.get("model") is None:
                self._reader.fault(here, f"has no model; allowed is {what}.")
                continue
            reference = self._reader.reference((*here, "model"), entry["model"])
            layers = self._reader.layers((*here, "layer_range"), entry.get("layer_range")) if "layer_range" in allowed else None
            parameters = self._reader.parameters((*here, "parameters"), entry.get("parameters"), of_model=True)
            if reference is not None:
                found.append(_Input(reference, here, layers, parameters))
        return found

    def _models(self, ours: Place, theirs: Place, given: Any, levels: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """`models:` of the recipe or of a module; a base that is not listed joins here, as it does there."""
        inputs = self._inputs((*theirs, "models"), given, ENTRY)
        if self._base is not None and self._reader.method is not None:
            listed = next((one for one in inputs if one.reference == self._base), None)
            if self._reader.method.takes_base:
                inputs = [one for one in inputs if one is not listed]
            elif listed is None and self._joins(levels):
                inputs.append(_Input(self._base, ("base_model",), None, {}))
        return [self._entry(one, (*ours, "models", number)) for number, one in enumerate(inputs)]

    def _joins(self, levels: Sequence[Mapping[str, Any]]) -> bool:
        """Whether a base that is not among the models is merged as one of them, by a method that knows no base."""
        assert self._reader.method is not None
        assert self._base is not None
        if self._reader.method.max_models == 1:
            return False
        needed = [parameter.name for parameter in self._reader.method.parameters if parameter.per_model and parameter.required]
        if not all(any(name in level for level in levels) for name in needed):
            return False
        self._reader.note(
            ("base_model",), f"is not among the models; {self._reader.method_id} has no base, so it is merged as one of them."
        )
        return True

    def _slices(self, ours: Place, theirs: Place, given: Any) -> list[dict[str, Any]]:
        if not isinstance(given, list):
            self._reader.fault((*theirs, "slices"), f"is {shown(given)}, allowed is a list of {{sources: [...]}}.")
            return []
        found = []
        for number, item in enumerate(given):
            here, there = (*ours, "slices", number), (*theirs, "slices", number)
            self._reader.trace(here, there)
            part = self._reader.mapping(there, item, "{sources: [...], parameters: {...}}")
            if part is not None:
                found.append(self._slice(here, there, part))
        return found

    def _slice(self, ours: Place, theirs: Place, part: Mapping[str, Any]) -> dict[str, Any]:
        self._reader.keys(theirs, part, SLICE)
        own = self._reader.reference((*theirs, "base_model"), part["base_model"]) if part.get("base_model") is not None else None
        base = own or self._base
        inputs = self._inputs((*theirs, "sources"), part.get("sources"), SOURCE)
        value: dict[str, Any] = {}
        listed = next((one for one in inputs if one.reference == base), None)
        if self._reader.method is not None and self._reader.method.takes_base and base is not None:
            others = [one for one in inputs if one is not listed]
            same = listed is None or all(one.layers == listed.layers for one in others)
            if listed is not None and not same:
                node = self._node(base, (*ours, "base"), (*listed.place, "model"))
                node = node if isinstance(node, dict) else self._whole(base, (*ours, "base"), (*listed.place, "model"))
                value["base"] = {**node, "layers": listed.layers}
                self._reader.trace((*ours, "base", "layers"), (*listed.place, "layer_range"))
            elif own is not None:
                value["base"] = self._node(base, (*ours, "base"), (*theirs, "base_model"))
            inputs = others
        elif own is not None:
            value["base"] = self._node(own, (*ours, "base"), (*theirs, "base_model"))
        self._reader.trace((*ours, "models"), (*theirs, "sources"))
        value["models"] = [self._entry(one, (*ours, "models", number)) for number, one in enumerate(inputs)]
        shared = self._reader.parameters((*theirs, "parameters"), part.get("parameters"))
        if shared:
            value["parameters"] = shared
        return value

    def _whole(self, reference: Reference, ours: Place, theirs: Place) -> dict[str, Any]:
        """The base as a mapping, to which layers can be added."""
        del self._reader.out.references[ours]
        self._reader.trace((*ours, "model"), theirs)
        self._reader.out.references[(*ours, "model")] = reference.name
        return {"model": reference.name}

    def _modules(self, given: Any, shared: Mapping[str, Any]) -> dict[str, Any]:
        modules = self._reader.mapping(("modules",), given, "a mapping of module names to {models or slices}")
        found: dict[str, Any] = {}
        for name, item in (modules or {}).items():
            place: Place = ("modules", name)
            module = self._reader.mapping(place, item, "{models or slices: [...], parameters: {...}}")
            if module is None:
                continue
            self._reader.keys(place, module, MODULE)
            parameters = self._reader.parameters((*place, "parameters"), module.get("parameters"))
            value: dict[str, Any] = {}
            if module.get("slices"):
                value["slices"] = self._slices(place, place, module["slices"])
            if module.get("models") or not module.get("slices"):
                value["models"] = self._models(place, place, module.get("models"), [parameters, shared])
            if parameters:
                value["parameters"] = parameters
            found[name] = value
        return found
