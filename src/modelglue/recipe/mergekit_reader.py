"""The words of mergekit's grammar, and how one of its documents is read: keys, references and parameters, with all that is wrong."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from modelglue.errors import UserError, did_you_mean
from modelglue.methods import all_methods, get
from modelglue.methods.registry import Method
from modelglue.recipe.document import Document, Place, shown

#: theirs, and settings of ours that a recipe of theirs may add
TOP = (
    "merge_method", "models", "slices", "modules", "base_model", "parameters", "dtype", "out_dtype", "tokenizer_source", "tokenizer",
    "chat_template", "name",
)  # fmt: skip
OURS = {
    "seed": "seed", "missing": "missing", "allow_mixed": "allow_mixed", "vocab_mismatch": "vocabulary_mismatch",
    "vocabulary_mismatch": "vocabulary_mismatch", "shape_mismatch": "shape_mismatch", "on_shape_mismatch": "shape_mismatch",
}  # fmt: skip
SLICE = ("sources", "base_model", "parameters")
SOURCE = ("model", "layer_range", "parameters")
ENTRY = ("model", "parameters")
MODULE = ("models", "slices", "parameters")
TOKENIZER = ("source", "tokens", "pad_to_multiple_of")
TOKEN = ("source", "force")
_EVERY_KEY = dict.fromkeys([*TOP, *OURS, *SLICE, *SOURCE, *MODULE, *TOKENIZER])
#: keys of older versions, which say nothing any more
_LEFTOVERS = {
    TOP: ("embed_slerp", "normalize", "int8_mask", "residual_weight"),
    SLICE: ("residual_weight", "name"),
    SOURCE: ("residual_weight", "name"),
    ENTRY: ("layer_range", "name", "residual_weight"),
}


#: truth values of YAML 1.1, which our reader leaves as text
_TRUTH = {"yes": True, "on": True, "no": False, "off": False}


@dataclass(frozen=True)
class Reference:
    """A model of theirs: what opens it, and the class name that counts instead of its config's."""

    name: str
    architecture: str | None = None


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


def whole(value: Any) -> int | None:
    """A whole number, also written as 4.0 or "4"; None for anything else."""
    if isinstance(value, str):
        return int(value) if value.strip().removeprefix("-").isdecimal() else None
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return int(value) if value == value // 1 else None


class Reader:
    """Reads the parts of one document, and notes in `out` what is wrong or odd, and where the parts of our recipe were written."""

    def __init__(self, document: Document) -> None:
        self.document = document
        self.out = Converted(document)
        self.trace((), ())
        self.method_id = str(document.value.get("merge_method"))
        try:
            self.method: Method | None = get(self.method_id)
        except UserError:
            self.method = None  # the checks of our dialect say so

    # -- messages -------------------------------------------------------------------------------------------------------

    def fault(self, place: Place, text: str) -> None:
        self.out.faults.append(self.document.fault(place, text))

    def warn(self, place: Place, text: str) -> None:
        self.out.warnings.append(self.document.fault(place, text))

    def note(self, place: Place, text: str) -> None:
        self.out.notes.append(self.document.fault(place, text))

    def trace(self, ours: Place, theirs: Place) -> None:
        self.out.trace[ours] = (self.document, theirs)

    def mapping(self, place: Place, given: Any, what: str) -> Mapping[str, Any] | None:
        if isinstance(given, dict):
            return given
        self.fault(place, f"is {shown(given)}, allowed is {what}.")
        return None

    def keys(self, place: Place, given: Mapping[str, Any], allowed: tuple[str, ...]) -> None:
        """What is not allowed here: leftovers and what nobody knows are ignored with a warning, what was meant otherwise is refused."""
        for key in given:
            if key in allowed or (allowed is TOP and key in OURS):
                continue
            if key in _LEFTOVERS.get(allowed, ()):
                self.warn((*place, key), "has no effect here; older versions knew it. It is ignored.")
            elif key in _EVERY_KEY:
                self.fault((*place, key), f"does not belong here.{did_you_mean(key, allowed)} Allowed: {', '.join(allowed)}.")
            elif self._is_parameter(key):
                self.fault((*place, key), "is a parameter. Parameters stand under 'parameters:' in this dialect.")
            elif near := did_you_mean(key, allowed):
                self.fault((*place, key), f"unknown key.{near} Allowed: {', '.join(allowed)}.")
            else:
                self.warn((*place, key), f"unknown key; it is ignored. Allowed: {', '.join(allowed)}.")

    def _is_parameter(self, key: str) -> bool:
        known = [parameter.name for parameter in self.method.parameters] if self.method else []
        return key in known or key in ("weight", "density") or bool(difflib.get_close_matches(key, known, n=1, cutoff=0.8))

    def reference(self, place: Place, given: Any) -> Reference | None:
        """`PATH[@REVISION][+LORA[@REVISION]]`, or the mapping that says the same."""
        if isinstance(given, str) and given:
            return Reference(given)
        if not isinstance(given, dict) or "model" not in given:
            what = "a reference as text, or {model: {path, revision}, lora: {path, revision}}"
            self.fault(place, f"is {shown(given)}, allowed is {what}.")
            return None
        self.keys(place, given, ("model", "lora", "override_architecture"))
        halves = [self._path((*place, key), given[key]) for key in ("model", "lora") if given.get(key) is not None]
        architecture = given.get("override_architecture")
        return Reference("+".join(halves), None if architecture is None else str(architecture)) if all(halves) else None

    def _path(self, place: Place, given: Any) -> str:
        if isinstance(given, str):
            return given
        if not isinstance(given, dict) or not isinstance(given.get("path"), str):
            self.fault(place, f"is {shown(given)}, allowed is a path as text, or {{path, revision}}.")
            return ""
        self.keys(place, given, ("path", "revision"))
        return given["path"] if given.get("revision") is None else f"{given['path']}@{given['revision']}"

    def layers(self, place: Place, given: Any) -> list[int] | None:
        """A range of layers."""
        if given is None:
            return None
        found = [number for item in given if (number := whole(item)) is not None] if isinstance(given, list) else []
        if len(found) != 2 or len(given) != 2:
            written = ", ".join(map(str, given)) if isinstance(given, list) else given
            self.fault(place, f"is {f'[{written}]' if isinstance(given, list) else shown(given)}, allowed is [first, last + 1].")
            return None
        return found

    # -- parameters -----------------------------------------------------------------------------------------------------

    def parameters(self, place: Place, given: Any, *, of_model: bool = False) -> dict[str, Any]:
        """One `parameters` mapping, without what has no effect; `of_model`: one of a single model."""
        if given is None:
            return {}
        mapping = self.mapping(place, given, "a mapping of parameter names to values")
        method = self.method
        if mapping is None or method is None:
            return dict(mapping or {})
        known = [parameter.name for parameter in method.parameters]
        shared = [parameter.name for parameter in method.parameters if not parameter.per_model]
        elsewhere = {parameter.name for other in all_methods() for parameter in other.parameters}
        found = {}
        for name, setting in mapping.items():
            if of_model and name in shared:
                self.warn(
                    (*place, name), "is one value for the whole merge, so it has no effect here; it belongs under the recipe's parameters."
                )
            elif name in known:
                found[name] = self._numbers((*place, name), name, setting)
            elif name in method.without_effect:
                continue
            elif name in elsewhere or not did_you_mean(name, known):
                allowed = ", ".join(known) or "none"
                hint = did_you_mean(name, known)
                self.warn((*place, name), f"is no parameter of {method.id}; it is ignored.{hint} Allowed: {allowed}.")
            else:
                self.fault((*place, name), f"is no parameter of {method.id}.{did_you_mean(name, known)} Allowed: {', '.join(known)}.")
        return found

    def _numbers(self, place: Place, name: str, setting: Any) -> Any:
        """The setting with numbers that were written as text, and truth values where a number is meant, as numbers."""
        parameter = self.method.parameter(name) if self.method else None
        if parameter is None or parameter.choices:
            return setting
        if isinstance(setting, list):
            return [self._numbers((*place, number), name, item) for number, item in enumerate(setting)]
        if isinstance(setting, dict):
            return {key: self._numbers((*place, key), name, item) if key == "value" else item for key, item in setting.items()}
        in_gradient = isinstance(place[-1], int)
        if isinstance(setting, str):
            setting = _TRUTH.get(setting.lower(), setting)
        if isinstance(setting, bool):
            return setting if parameter.type is bool and not in_gradient else float(setting)
        if isinstance(setting, str):
            try:
                return float(setting)
            except ValueError:
                return setting
        return setting
