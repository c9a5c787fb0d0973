"""Our recipe dialect, checked against the registry of methods before anything is opened."""

from __future__ import annotations

import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag

from modelglue.checkpoint import yaml_text
from modelglue.errors import RecipeError, UserError, did_you_mean
from modelglue.methods import all_methods, get
from modelglue.recipe.document import Document, Place, load_document, validate

Format = Literal["modelglue/1"]
FORMAT: Format = "modelglue/1"
StoreDtype = Literal["float32", "float16", "bfloat16"]


class Dtype(BaseModel):
    """Arithmetic and files."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    compute: Literal["float32"] = "float32"
    store: StoreDtype | None = None
    """Default: the dtype that every tensor has in the base, or in the first model."""


def _kind_of_input(value: Any) -> str:
    return "a recipe" if isinstance(value, dict | Recipe) else "a reference"


#: a model on disk, or a merge that is an input of another merge; told apart by what it is, so that errors speak of one of them
Input = Annotated[
    Annotated[str, Field(min_length=1), Tag("a reference")] | Annotated["Recipe", Tag("a recipe")],
    Discriminator(_kind_of_input),
]


class Entry(BaseModel):
    """One input: a reference or a nested recipe, and its values of the method's per-model parameters."""

    model_config = ConfigDict(extra="allow", frozen=True)

    model: Input

    @property
    def own(self) -> dict[str, Any]:
        return dict(self.model_extra or {})

    @property
    def label(self) -> str:
        return self.model if isinstance(self.model, str) else f"({self.model.method} merge)"


class Recipe(BaseModel):
    """One merge. `models` and `base` may be recipes in turn, so a merge of merges is one document."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: Format = FORMAT
    method: str
    base: Input | None = None
    """What task vectors are taken from; for a method without one, the model whose config, tokenizer and dtypes the output takes."""
    models: Annotated[list[Entry], Field(min_length=1)]
    parameters: dict[str, Any] = {}
    seed: Annotated[int, Field(ge=0, strict=True)] = 0
    dtype: Dtype = Dtype()


def read_recipe(source: str | Path | Mapping[str, Any]) -> Recipe:
    """Read a recipe in either dialect. RecipeError lists every fault with file and line."""
    document = load_document(source)
    if isinstance(document.value, dict) and "merge_method" in document.value:
        document = _from_mergekit(document)
    recipe = validate(document, Recipe)
    faults = list(_check_methods(document, recipe, ()))
    if faults:
        raise RecipeError("\n".join(faults))
    return recipe


def _check_methods(document: Document, recipe: Recipe, place: Place) -> Sequence[str]:
    """What the registry says against a recipe and the recipes inside it."""
    faults: list[str] = []
    try:
        method = get(recipe.method)
    except UserError as error:
        faults.append(document.fault((*place, "method"), str(error)))
    else:
        labels = unique_labels(recipe)
        _, found = method.resolve(recipe.parameters, [entry.own for entry in recipe.models], labels)
        faults += [document.fault(_place_of(fault, labels, place), _sentence(fault)) for fault in found]
        if method.needs_base and recipe.base is None:
            faults.append(document.fault(place, f"{method.id} needs a base model; add base: REF."))
    for number, entry in enumerate(recipe.models):
        if isinstance(entry.model, Recipe):
            faults += _check_methods(document, entry.model, (*place, "models", number, "model"))
    if isinstance(recipe.base, Recipe):
        faults += _check_methods(document, recipe.base, (*place, "base"))
    return faults


def unique_labels(recipe: Recipe) -> list[str]:
    """What messages call the models; one that stands there twice is numbered."""
    labels = [entry.label for entry in recipe.models]
    return [label if labels.count(label) == 1 else f"{label} (number {n})" for n, label in enumerate(labels, 1)]


def _place_of(fault: str, labels: Sequence[str], place: Place) -> Place:
    """Where a fault of the registry stands: in the entry of its model (and at the key it quotes), or under parameters."""
    for number, label in enumerate(labels):
        if fault.startswith(f"model {label}: "):
            return (*place, "models", number, _key_in(fault.removeprefix(f"model {label}: ")))
    if fault.startswith("parameters: "):
        return (*place, "parameters", _key_in(fault.removeprefix("parameters: ")))
    return place


def _sentence(fault: str) -> str:
    """The registry's words without the place, which the line already has."""
    text = fault.removeprefix("parameters: ")
    hint = " Parameters stand beside 'model' in this dialect." if "'parameters' is no parameter" in text else ""
    return f"{text.removesuffix('.')}.{hint}"


def _key_in(fault: str) -> str:
    """The parameter's name, quoted or not, with which a fault begins."""
    return fault.split(" ", 1)[0].strip("'")


# -- mergekit's dialect ---------------------------------------------------------------------------------------------------

_MERGEKIT_KEYS = ("merge_method", "base_model", "models", "parameters", "dtype", "out_dtype")
_MERGEKIT_LATER = ("slices", "modules", "tokenizer", "tokenizer_source", "chat_template", "name")
_DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16", "half": "float16"}
_IGNORED_PARAMETERS = ("int8_mask",)


def _from_mergekit(document: Document) -> Document:
    """Whole-model mergekit recipes with scalar parameters, as ours; everything else is refused by name, never ignored."""
    value: dict[str, Any] = document.value
    faults: list[str] = []
    for key in value:
        if key in _MERGEKIT_LATER:
            faults.append(document.fault((key,), f"'{key}' of mergekit's dialect is not supported yet."))
        elif key not in _MERGEKIT_KEYS:
            faults.append(document.fault((key,), f"unknown key.{did_you_mean(key, _MERGEKIT_KEYS)} Allowed: {', '.join(_MERGEKIT_KEYS)}."))
    method, base = str(value["merge_method"]), value.get("base_model")
    if base is not None and not isinstance(base, str):
        faults.append(document.fault(("base_model",), "allowed is a reference; mappings are not supported yet."))
    shared = _settings(document, ("parameters",), value.get("parameters"), faults)
    models = _mergekit_models(document, shared, faults)
    store = _mergekit_dtype(document, faults)
    if faults:
        raise RecipeError("\n".join(faults))
    if method in [known.id for known in all_methods() if known.takes_base]:
        models = [entry for entry in models if entry["model"] != base]
    elif base is not None and "weight" in shared and base not in [entry["model"] for entry in models]:
        models.append({"model": base})  # there, a base that is not listed joins the models, and the shared weight is its own
    if method in [known.id for known in all_methods()]:
        shared = {**get(method).mergekit, **shared}
    ours: dict[str, Any] = {"format": FORMAT, "method": method, "models": models, "parameters": shared}
    if base is not None:
        ours["base"] = base
    if store is not None:
        ours["dtype"] = {"store": store}
    return Document(document.source, ours, _same_lines(document))


def _mergekit_models(document: Document, shared: Mapping[str, Any], faults: list[str]) -> list[dict[str, Any]]:
    """The entries of `models` with their parameters beside the reference; what is wrong goes to `faults`."""
    entries = document.value.get("models")
    if not isinstance(entries, list) or not entries:
        faults.append(document.fault(("models",), "allowed is a list of {model: REF, parameters: {...}}."))
        return []
    models = []
    for number, entry in enumerate(entries):
        place: Place = ("models", number)
        if not isinstance(entry, dict) or not isinstance(entry.get("model"), str):
            faults.append(document.fault(place, "allowed is {model: REF, parameters: {...}} with a reference as text."))
            continue
        for key in entry:
            if key not in ("model", "parameters"):
                hint = " Parameters stand under 'parameters:' in this dialect." if key in shared or key in ("weight", "density") else ""
                faults.append(document.fault((*place, key), f"unknown key beside model.{hint}"))
        models.append({"model": entry["model"], **_settings(document, (*place, "parameters"), entry.get("parameters"), faults)})
    return models


def _settings(document: Document, place: Place, given: Any, faults: list[str]) -> dict[str, Any]:
    """One `parameters` mapping, without the names that never change a result."""
    if given is None:
        return {}
    if not isinstance(given, dict):
        faults.append(document.fault(place, "allowed is a mapping of parameter names to numbers."))
        return {}
    for name, setting in given.items():
        if isinstance(setting, list | dict):
            faults.append(document.fault((*place, name), "gradients and filters are not supported yet."))
    return {name: setting for name, setting in given.items() if name not in _IGNORED_PARAMETERS}


def _mergekit_dtype(document: Document, faults: list[str]) -> str | None:
    """What is stored: `out_dtype`, else `dtype`."""
    key = "out_dtype" if document.value.get("out_dtype") else "dtype"
    given = document.value.get(key)
    if given is None:
        return None
    name = str(given).removeprefix("torch.")
    name = _DTYPES.get(name, name)
    if name not in typing.get_args(StoreDtype):
        faults.append(document.fault((key,), f"is '{given}', allowed is float32, float16 or bfloat16."))
    return name


_RENAMED: Mapping[Place, Place] = {("merge_method",): ("method",), ("base_model",): ("base",)}


def _same_lines(document: Document) -> Mapping[Place, int]:
    lines = dict(document.lines)
    for place, line in document.lines.items():
        if place in _RENAMED:
            lines[_RENAMED[place]] = line
        if len(place) == 4 and place[0] == "models" and place[2] == "parameters":
            lines[(place[0], place[1], place[3])] = line
    return lines


def dump(recipe: Recipe) -> str:
    """The recipe as YAML that reads back to an equal recipe."""
    return yaml_text(canonical(recipe))


def canonical(recipe: Recipe) -> dict[str, Any]:
    """JSON-ready, in one order, without defaults that say nothing."""
    value: dict[str, Any] = {"format": recipe.format, "method": recipe.method}
    if recipe.base is not None:
        value["base"] = recipe.base if isinstance(recipe.base, str) else canonical(recipe.base)
    value["models"] = [
        {
            "model": entry.model if isinstance(entry.model, str) else canonical(entry.model),
            **dict(sorted(entry.own.items())),
        }
        for entry in recipe.models
    ]
    if recipe.parameters:
        value["parameters"] = dict(sorted(recipe.parameters.items()))
    value["seed"] = recipe.seed
    if recipe.dtype.store is not None:
        value["dtype"] = {"compute": recipe.dtype.compute, "store": recipe.dtype.store}
    return value
