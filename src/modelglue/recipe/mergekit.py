"""mergekit's recipes, read unchanged: their grammar and its quirks become a recipe of ours, and messages keep speaking of theirs."""

from __future__ import annotations

import difflib
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from modelglue.errors import UserError, did_you_mean
from modelglue.methods import all_methods, get
from modelglue.methods.registry import Method
from modelglue.recipe.document import Document, Place
from modelglue.recipe.schema import FORMAT, StoreDtype

#: theirs, and settings of ours that a recipe of theirs may add
_TOP = (
    "merge_method", "models", "slices", "modules", "base_model", "parameters", "dtype", "out_dtype", "tokenizer_source", "tokenizer",
    "chat_template", "name",
)  # fmt: skip
_OURS = {
    "seed": "seed", "missing": "missing", "allow_mixed": "allow_mixed", "vocab_mismatch": "vocabulary_mismatch",
    "vocabulary_mismatch": "vocabulary_mismatch", "shape_mismatch": "shape_mismatch", "on_shape_mismatch": "shape_mismatch",
}  # fmt: skip
_SLICE = ("sources", "base_model", "parameters")
_SOURCE = ("model", "layer_range", "parameters")
_ENTRY = ("model", "parameters")
_MODULE = ("models", "slices", "parameters")
_TOKENIZER = ("source", "tokens", "pad_to_multiple_of")
_TOKEN = ("source", "force")
_EVERY_KEY = dict.fromkeys([*_TOP, *_OURS, *_SLICE, *_SOURCE, *_MODULE, *_TOKENIZER])
#: keys of older versions, which say nothing any more
_LEFTOVERS = {
    _TOP: ("embed_slerp", "normalize", "int8_mask", "residual_weight", "merge_mode", "out_path"),
    _SLICE: ("residual_weight", "name"),
    _SOURCE: ("residual_weight", "name"),
    _ENTRY: ("layer_range", "name", "residual_weight"),
}
_DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16", "half": "float16"}


@dataclass(frozen=True)
class Reference:
    """A model of theirs: what opens it, and the class name that counts instead of its config's."""

    name: str
    architecture: str | None = None


@dataclass(frozen=True)
class _Input:
    """One source or entry: its model, layer range and parameters, and where it stands."""

    reference: Reference
    place: Place
    layers: Any
    parameters: Mapping[str, Any]


@dataclass
class Converted:
    """A recipe of ours as plain data, where its parts were written, and what was wrong or odd."""

    document: Document
    name: str | None = None
    value: dict[str, Any] = field(default_factory=dict)
    trace: dict[Place, tuple[Document, Place]] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    #: places of model references in `value` -> the reference
    references: dict[Place, str] = field(default_factory=dict)


def convert(document: Document) -> Converted:
    """One document of their grammar."""
    converter = _Converter(document)
    converter.run()
    return converter.out


class _Converter:
    def __init__(self, document: Document) -> None:
        self._document = document
        self._given: dict[str, Any] = document.value
        self.out = Converted(document)
        self._trace((), ())
        self._method_id = str(self._given.get("merge_method"))
        try:
            self._method: Method | None = get(self._method_id)
        except UserError:
            self._method = None  # the checks of our dialect say so
        self._base: Reference | None = None

    # -- messages -------------------------------------------------------------------------------------------------------

    def _fault(self, place: Place, text: str) -> None:
        self.out.faults.append(self._document.fault(place, text))

    def _warn(self, place: Place, text: str) -> None:
        self.out.warnings.append(self._document.fault(place, text))

    def _note(self, place: Place, text: str) -> None:
        self.out.notes.append(self._document.fault(place, text))

    def _trace(self, ours: Place, theirs: Place) -> None:
        self.out.trace[ours] = (self._document, theirs)

    def _mapping(self, place: Place, given: Any, what: str) -> Mapping[str, Any] | None:
        if isinstance(given, dict):
            return given
        self._fault(place, f"allowed is {what}.")
        return None

    def _keys(self, place: Place, given: Mapping[str, Any], allowed: tuple[str, ...]) -> None:
        """What is not allowed here: leftovers and what nobody knows are ignored with a warning, what was meant otherwise is refused."""
        for key in given:
            if key in allowed or (allowed is _TOP and key in _OURS):
                continue
            if key in _LEFTOVERS.get(allowed, ()):
                self._warn((*place, key), "has no effect here; older versions knew it. It is ignored.")
            elif key in _EVERY_KEY:
                self._fault((*place, key), f"does not belong here. Allowed: {', '.join(allowed)}.")
            elif self._is_parameter(key):
                self._fault((*place, key), "is a parameter. Parameters stand under 'parameters:' in this dialect.")
            elif near := did_you_mean(key, allowed):
                self._fault((*place, key), f"unknown key.{near} Allowed: {', '.join(allowed)}.")
            else:
                self._warn((*place, key), f"unknown key; it is ignored. Allowed: {', '.join(allowed)}.")

    def _is_parameter(self, key: str) -> bool:
        known = [parameter.name for parameter in self._method.parameters] if self._method else []
        return key in known or key in ("weight", "density") or bool(difflib.get_close_matches(key, known, n=1, cutoff=0.8))

    # -- the whole ------------------------------------------------------------------------------------------------------

    def run(self) -> None:
        given = self._given
        self._keys((), given, _TOP)
        name = given.get("name")
        self.out.name = str(name) if name is not None else None
        value: dict[str, Any] = {"format": FORMAT, "method": self._method_id}
        self.out.value = value
        self._trace(("method",), ("merge_method",))
        if given.get("base_model") is not None:
            self._base = self._reference(("base_model",), given["base_model"])
            if self._base is not None:
                value["base"] = self._node(self._base, ("base",), ("base_model",))
        shapes = [key for key in ("models", "slices", "modules") if given.get(key)]
        if not shapes:
            self._fault(("models",), "is required and missing.")
        for key in shapes[1:]:
            self._fault((key,), f"stands beside {shapes[0]}; a recipe has one of models, slices, modules.")
        shared = self._parameters(("parameters",), given.get("parameters"))
        if "models" in shapes:
            value["models"] = self._models((), (), given["models"], [shared])
        elif "slices" in shapes:
            value["slices"] = self._slices((), (), given["slices"])
        elif "modules" in shapes:
            value["modules"] = self._modules(given["modules"], shared)
        if self._method is not None:
            shared = {**self._method.mergekit, **shared}
        if shared:
            value["parameters"] = shared
        self._rest(value)

    def _rest(self, value: dict[str, Any]) -> None:
        given = self._given
        for theirs, ours in _OURS.items():
            if theirs in given:
                value[ours] = given[theirs]
                self._trace((ours,), (theirs,))
        if (store := self._dtype()) is not None:
            value["dtype"] = {"store": store}
        if given.get("chat_template") is not None:
            value["chat_template"] = given["chat_template"]
        if given.get("tokenizer") is not None and given.get("tokenizer_source") is not None:
            self._fault(("tokenizer_source",), "stands beside 'tokenizer'; give one of them.")
        if given.get("tokenizer_source") is not None:
            value["tokenizer"] = {"source": self._vocabulary(("tokenizer", "source"), ("tokenizer_source",), given["tokenizer_source"])}
        if given.get("tokenizer") is not None:
            value["tokenizer"] = self._tokenizer(given["tokenizer"])

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
                self._fault((name,), "is 'int64', which would round every weight to a whole number. Allowed: float32, float16, bfloat16.")
            elif word not in typing.get_args(StoreDtype)[:3]:
                self._fault((name,), f"is '{given}', allowed is float32, float16 or bfloat16.")
            elif name == key:
                found = word
        if not self._given.get(key) and self._method is not None and not self._method.takes_base:
            return "widest"
        return found

    # -- models ---------------------------------------------------------------------------------------------------------

    def _reference(self, place: Place, given: Any) -> Reference | None:
        """`PATH[@REVISION][+LORA[@REVISION]]`, or the mapping that says the same."""
        if isinstance(given, str) and given:
            return Reference(given)
        if not isinstance(given, dict) or "model" not in given:
            self._fault(place, "allowed is a reference as text, or {model: {path, revision}, lora: {path, revision}}.")
            return None
        self._keys(place, given, ("model", "lora", "override_architecture"))
        halves = [self._path((*place, key), given[key]) for key in ("model", "lora") if given.get(key) is not None]
        architecture = given.get("override_architecture")
        return Reference("+".join(halves), None if architecture is None else str(architecture)) if all(halves) else None

    def _path(self, place: Place, given: Any) -> str:
        if isinstance(given, str):
            return given
        if not isinstance(given, dict) or not isinstance(given.get("path"), str):
            self._fault(place, "allowed is a path as text, or {path, revision}.")
            return ""
        self._keys(place, given, ("path", "revision"))
        return given["path"] if given.get("revision") is None else f"{given['path']}@{given['revision']}"

    def _node(self, reference: Reference, ours: Place, theirs: Place) -> Any:
        """A model where ours takes one that may say what is taken of it (a base)."""
        self._trace(ours, theirs)
        if reference.architecture is None:
            self.out.references[ours] = reference.name
            return reference.name
        self._trace((*ours, "model"), theirs)
        self.out.references[(*ours, "model")] = reference.name
        return {"model": reference.name, "architecture": reference.architecture}

    def _entry(self, given: _Input, ours: Place) -> dict[str, Any]:
        """An input as an entry of ours: the parameters stand beside the model."""
        self._trace(ours, given.place)
        self._trace((*ours, "model"), (*given.place, "model"))
        self.out.references[(*ours, "model")] = given.reference.name
        entry: dict[str, Any] = {"model": given.reference.name}
        if given.reference.architecture is not None:
            entry["architecture"] = given.reference.architecture
        if given.layers is not None:
            entry["layers"] = given.layers
        self._trace((*ours, "layers"), (*given.place, "layer_range"))
        for name, setting in given.parameters.items():
            entry[name] = setting
        for name in (parameter.name for parameter in self._method.parameters) if self._method else given.parameters:
            self._trace((*ours, name), (*given.place, "parameters", name))
        return entry

    def _inputs(self, place: Place, given: Any, allowed: tuple[str, ...]) -> list[_Input]:
        what = "{model: REF, layer_range: [A, B], parameters: {...}}" if "layer_range" in allowed else "{model: REF, parameters: {...}}"
        if not isinstance(given, list) or not given:
            self._fault(place, f"allowed is a list of {what}.")
            return []
        found = []
        for number, item in enumerate(given):
            here = (*place, number)
            entry = self._mapping(here, item, what)
            if entry is None:
                continue
            self._keys(here, entry, allowed)
            if entry.get("model") is None:
                self._fault(here, f"has no model; allowed is {what}.")
                continue
            reference = self._reference((*here, "model"), entry["model"])
            layers = entry.get("layer_range") if "layer_range" in allowed else None
            parameters = self._parameters((*here, "parameters"), entry.get("parameters"))
            if reference is not None:
                found.append(_Input(reference, here, layers, parameters))
        return found

    def _models(self, ours: Place, theirs: Place, given: Any, levels: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """`models:` of the recipe or of a module; a base that is not listed joins here, as it does there."""
        inputs = self._inputs((*theirs, "models"), given, _ENTRY)
        if self._base is not None and self._method is not None:
            listed = next((one for one in inputs if one.reference == self._base), None)
            if self._method.takes_base:
                inputs = [one for one in inputs if one is not listed]
            elif listed is None and self._joins(levels):
                inputs.append(_Input(self._base, ("base_model",), None, {}))
        return [self._entry(one, (*ours, "models", number)) for number, one in enumerate(inputs)]

    def _joins(self, levels: Sequence[Mapping[str, Any]]) -> bool:
        """Whether a base that is not among the models is merged as one of them, by a method that knows no base."""
        assert self._method is not None
        assert self._base is not None
        if self._method.max_models == 1:
            return False
        needed = [parameter.name for parameter in self._method.parameters if parameter.per_model and parameter.required]
        if not all(any(name in level for level in levels) for name in needed):
            return False
        self._note(("base_model",), f"is not among the models; {self._method_id} has no base, so it is merged as one of them.")
        return True

    def _slices(self, ours: Place, theirs: Place, given: Any) -> list[dict[str, Any]]:
        if not isinstance(given, list):
            self._fault((*theirs, "slices"), "allowed is a list of {sources: [...]}.")
            return []
        found = []
        for number, item in enumerate(given):
            here, there = (*ours, "slices", number), (*theirs, "slices", number)
            self._trace(here, there)
            part = self._mapping(there, item, "{sources: [...], parameters: {...}}")
            if part is not None:
                found.append(self._slice(here, there, part))
        return found

    def _slice(self, ours: Place, theirs: Place, part: Mapping[str, Any]) -> dict[str, Any]:
        self._keys(theirs, part, _SLICE)
        own = self._reference((*theirs, "base_model"), part["base_model"]) if part.get("base_model") is not None else None
        base = own or self._base
        inputs = self._inputs((*theirs, "sources"), part.get("sources"), _SOURCE)
        value: dict[str, Any] = {}
        listed = next((one for one in inputs if one.reference == base), None)
        if self._method is not None and self._method.takes_base and base is not None:
            others = [one for one in inputs if one is not listed]
            same = listed is None or all(one.layers == listed.layers for one in others)
            if listed is not None and not same:
                node = self._node(base, (*ours, "base"), (*listed.place, "model"))
                node = node if isinstance(node, dict) else self._whole(base, (*ours, "base"), (*listed.place, "model"))
                value["base"] = {**node, "layers": listed.layers}
                self._trace((*ours, "base", "layers"), (*listed.place, "layer_range"))
            elif own is not None:
                value["base"] = self._node(base, (*ours, "base"), (*theirs, "base_model"))
            inputs = others
        elif own is not None:
            value["base"] = self._node(own, (*ours, "base"), (*theirs, "base_model"))
        self._trace((*ours, "models"), (*theirs, "sources"))
        value["models"] = [self._entry(one, (*ours, "models", number)) for number, one in enumerate(inputs)]
        shared = self._parameters((*theirs, "parameters"), part.get("parameters"))
        if shared:
            value["parameters"] = shared
        return value

    def _whole(self, reference: Reference, ours: Place, theirs: Place) -> dict[str, Any]:
        """The base as a mapping, to which layers can be added."""
        del self.out.references[ours]
        self._trace((*ours, "model"), theirs)
        self.out.references[(*ours, "model")] = reference.name
        return {"model": reference.name}

    def _modules(self, given: Any, shared: Mapping[str, Any]) -> dict[str, Any]:
        modules = self._mapping(("modules",), given, "a mapping of module names to {models or slices}")
        found: dict[str, Any] = {}
        for name, item in (modules or {}).items():
            place: Place = ("modules", name)
            module = self._mapping(place, item, "{models or slices: [...], parameters: {...}}")
            if module is None:
                continue
            self._keys(place, module, _MODULE)
            parameters = self._parameters((*place, "parameters"), module.get("parameters"))
            value: dict[str, Any] = {}
            if module.get("slices"):
                value["slices"] = self._slices(place, place, module["slices"])
            if module.get("models") or not module.get("slices"):
                value["models"] = self._models(place, place, module.get("models"), [parameters, shared])
            if parameters:
                value["parameters"] = parameters
            found[name] = value
        return found

    # -- parameters -----------------------------------------------------------------------------------------------------

    def _parameters(self, place: Place, given: Any) -> dict[str, Any]:
        """One `parameters` mapping, without what has no effect."""
        if given is None:
            return {}
        mapping = self._mapping(place, given, "a mapping of parameter names to values")
        method = self._method
        if mapping is None or method is None:
            return dict(mapping or {})
        known = [parameter.name for parameter in method.parameters]
        elsewhere = {parameter.name for other in all_methods() for parameter in other.parameters}
        found = {}
        for name, setting in mapping.items():
            if name in known:
                found[name] = self._numbers((*place, name), name, setting)
            elif name in method.without_effect:
                continue
            elif name in elsewhere or not did_you_mean(name, known):
                allowed = ", ".join(known) or "none"
                hint = did_you_mean(name, known)
                self._warn((*place, name), f"is no parameter of {method.id}; it is ignored.{hint} Allowed: {allowed}.")
            else:
                self._fault((*place, name), f"is no parameter of {method.id}.{did_you_mean(name, known)} Allowed: {', '.join(known)}.")
        return found

    def _numbers(self, place: Place, name: str, setting: Any) -> Any:
        """The setting with numbers that were written as text, and truth values where a number is meant, as numbers."""
        parameter = self._method.parameter(name) if self._method else None
        if parameter is None or parameter.choices:
            return setting
        if isinstance(setting, list):
            return [self._numbers((*place, number), name, item) for number, item in enumerate(setting)]
        if isinstance(setting, dict):
            return {key: self._numbers((*place, key), name, item) if key == "value" else item for key, item in setting.items()}
        in_gradient = isinstance(place[-1], int)
        if isinstance(setting, bool):
            return setting if parameter.type is bool and not in_gradient else float(setting)
        if isinstance(setting, str):
            try:
                return float(setting)
            except ValueError:
                return setting
        return setting

    # -- tokenizer ------------------------------------------------------------------------------------------------------

    def _vocabulary(self, ours: Place, theirs: Place, given: Any) -> Any:
        """`union`, `base`, or a model (which older recipes write as `model:PATH`)."""
        self._trace(ours, theirs)
        if given in ("union", "base"):
            return given
        reference = self._reference(theirs, given.removeprefix("model:") if isinstance(given, str) else given)
        self._trace((*ours, "model"), theirs)
        return {"model": reference.name if reference is not None else ""}

    def _tokenizer(self, given: Any) -> dict[str, Any]:
        section = self._mapping(("tokenizer",), given, "{source, tokens, pad_to_multiple_of}")
        if section is None:
            return {}
        self._keys(("tokenizer",), section, _TOKENIZER)
        value: dict[str, Any] = {}
        source = section.get("source")
        value["source"] = "union" if source is None else self._vocabulary(("tokenizer", "source"), ("tokenizer", "source"), source)
        tokens = section.get("tokens") if section.get("tokens") is not None else {}
        rules = self._mapping(("tokenizer", "tokens"), tokens, "a mapping of tokens to {source, force}")
        found = {token: self._token(token, rule) for token, rule in (rules or {}).items()}
        if found:
            value["tokens"] = found
        if section.get("pad_to_multiple_of") is not None:
            value["pad_to_multiple_of"] = section["pad_to_multiple_of"]
        return value

    def _token(self, token: str, given: Any) -> dict[str, Any]:
        place: Place = ("tokenizer", "tokens", token)
        rule = self._mapping(place, {} if given is None else given, "{source, force}")
        if rule is None:
            return {}
        self._keys(place, rule, _TOKEN)
        value: dict[str, Any] = {"force": rule["force"]} if rule.get("force") is not None else {}
        source = rule.get("source")
        here = (*place, "source")
        if isinstance(source, dict) and "kind" in source:
            if source["kind"] == "zero":
                value["source"] = "zero"
            elif source["kind"] == "model_token":
                value["source"] = self._row(here, source)
            else:
                self._fault((*here, "kind"), f"is {source['kind']!r}, allowed is zero or model_token.")
        elif source is not None:
            reference = self._reference(here, source)
            value["source"] = {"model": reference.name if reference is not None else ""}
        return value

    def _row(self, place: Place, source: Mapping[str, Any]) -> dict[str, Any]:
        self._keys(place, source, ("kind", "model", "token", "token_id"))
        named = [key for key in ("token", "token_id") if source.get(key) is not None]
        if len(named) != 1:
            self._fault(place, "needs exactly one of token and token_id.")
        reference = self._reference((*place, "model"), source.get("model"))
        return {"model": reference.name if reference is not None else "", **{key: source[key] for key in named}}
