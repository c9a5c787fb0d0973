"""Our recipe dialect, checked against the registry of methods before anything is opened."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field

from modelglue.errors import RecipeError, UserError, did_you_mean
from modelglue.methods import get
from modelglue.recipe.document import Document, load_document, validate

FORMAT = "modelglue/1"
StoreDtype = Literal["float32", "float16", "bfloat16"]


class Dtype(BaseModel):
    """Arithmetic and files."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    compute: Literal["float32"] = "float32"
    store: StoreDtype | None = None
    """Default: the dtype that every tensor has in the base, or in the first model."""


class Entry(BaseModel):
    """One input: a reference or a nested recipe, and its values of the method's per-model parameters."""

    model_config = ConfigDict(extra="allow", frozen=True)

    model: str | Recipe

    @property
    def own(self) -> dict[str, Any]:
        return dict(self.model_extra or {})

    @property
    def label(self) -> str:
        return self.model if isinstance(self.model, str) else f"({self.model.method} merge)"


class Recipe(BaseModel):
    """One merge. `models` may hold recipes in turn, so a merge of merges is one document."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: Literal["modelglue/1"] = FORMAT
    method: str
    base: str | Recipe | None = None
    models: Annotated[list[Entry], Field(min_length=1)]
    parameters: dict[str, Any] = {}
    seed: Annotated[int, Field(ge=0)] = 0
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


def _check_methods(document: Document, recipe: Recipe, place: tuple[str | int, ...]) -> Sequence[str]:
    """What the registry says against a recipe and the recipes inside it."""
    faults: list[str] = []
    try:
        method = get(recipe.method)
    except UserError as error:
        faults.append(document.fault((*place, "method"), str(error)))
    else:
        labels = [entry.label for entry in recipe.models]
        _, found = method.resolve(recipe.parameters, [entry.own for entry in recipe.models], labels)
        faults += [document.fault(_place_of(fault, labels, place), fault) for fault in found]
        if method.needs_base and recipe.base is None:
            faults.append(document.fault(place, f"{method.id} needs a base model; add base: REF"))
        if not method.needs_base and recipe.base is not None and recipe.base in labels:
            faults.append(document.fault((*place, "base"), f"{method.id} has no use for a base; leave it out"))
    for number, entry in enumerate(recipe.models):
        if isinstance(entry.model, Recipe):
            faults += _check_methods(document, entry.model, (*place, "models", number, "model"))
    if isinstance(recipe.base, Recipe):
        faults += _check_methods(document, recipe.base, (*place, "base"))
    return faults


def _place_of(fault: str, labels: Sequence[str], place: tuple[str | int, ...]) -> tuple[str | int, ...]:
    """Where a fault of the registry stands: in the entry of its model (and at the key it quotes), or under parameters."""
    key = fault.split("'")[1] if "'" in fault else fault.partition(": ")[2].split(" ")[0]
    for number, label in enumerate(labels):
        if fault.startswith(f"model {label}:"):
            return (*place, "models", number, key)
    return (*place, "parameters", key) if fault.startswith("parameters:") else place


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
    entries = value.get("models") or []
    if not isinstance(entries, list) or not all(isinstance(entry, dict) and isinstance(entry.get("model"), str) for entry in entries):
        faults.append(document.fault(("models",), "allowed is a list of {model: REF, parameters: {...}}."))
        entries = []
    base = value.get("base_model")
    method = str(value["merge_method"])
    shared = dict(value.get("parameters") or {})
    models = []
    for number, entry in enumerate(entries):
        for key in entry:
            if key not in ("model", "parameters"):
                hint = " Parameters stand under 'parameters:' in this dialect." if key in shared or key in ("weight", "density") else ""
                faults.append(document.fault(("models", number, key), f"unknown key beside model.{hint}"))
        own = dict(entry.get("parameters") or {})
        for name, setting in own.items():
            if isinstance(setting, list | dict):
                faults.append(document.fault(("models", number, "parameters", name), "gradients and filters are not supported yet."))
        needs_base = method in _TAKES_BASE
        if not (needs_base and entry["model"] == base):
            models.append({"model": entry["model"], **{k: v for k, v in own.items() if k not in _IGNORED_PARAMETERS}})
    for name, setting in shared.items():
        if isinstance(setting, list | dict):
            faults.append(document.fault(("parameters", name), "gradients and filters are not supported yet."))
    dtype = value.get("out_dtype") or value.get("dtype")
    dtype = str(dtype).removeprefix("torch.") if dtype else None
    dtype = _DTYPES.get(dtype or "", dtype)
    if dtype not in (None, "float32", "float16", "bfloat16"):
        faults.append(document.fault(("dtype",), f"is '{dtype}', allowed is float32, float16 or bfloat16."))
    if faults:
        raise RecipeError("\n".join(faults))
    parameters = {key: setting for key, setting in shared.items() if key not in _IGNORED_PARAMETERS}
    if method == "model_stock":
        parameters.setdefault("clip_ratio", False)
    ours: dict[str, Any] = {"format": FORMAT, "method": method, "models": models, "parameters": parameters}
    if method in _TAKES_BASE and base is not None:
        ours["base"] = base
    if dtype:
        ours["dtype"] = {"store": dtype}
    return Document(document.source, ours, _same_lines(document))


_TAKES_BASE = ("slerp", "task_arithmetic", "ties", "dare_ties", "model_stock")


def _same_lines(document: Document) -> Mapping[tuple[str | int, ...], int]:
    lines = dict(document._lines)
    for place, line in document._lines.items():
        if place[:1] == ("merge_method",):
            lines[("method",)] = line
        if len(place) == 4 and place[0] == "models" and place[2] == "parameters":
            lines[(place[0], place[1], place[3])] = line
    return lines


def dump(recipe: Recipe) -> str:
    """The recipe as YAML that reads back to an equal recipe."""
    return yaml.safe_dump(canonical(recipe), sort_keys=False, allow_unicode=True)


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
