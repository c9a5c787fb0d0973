"""Recipes as data and as text: one order, nothing that says nothing, and equal recipes are equal text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from modelglue.checkpoint import yaml_text
from modelglue.methods import get
from modelglue.recipe.schema import Base, Entry, Into, Module, Recipe, Slice, Source, Tokenizer


def dump(recipe: Recipe) -> str:
    """The recipe as YAML that reads back to an equal recipe."""
    return yaml_text(canonical(recipe))


def canonical(recipe: Recipe) -> dict[str, Any]:
    """JSON-ready, in one order, without defaults that say nothing."""
    return _recipe(recipe, written_out=False)


def written_out(recipe: Recipe) -> dict[str, Any]:
    """The same with the method's defaults among the parameters: what a finished merge is known by, whatever the defaults become."""
    return _recipe(recipe, written_out=True)


def _recipe(recipe: Recipe, *, written_out: bool) -> dict[str, Any]:
    value: dict[str, Any] = {"format": recipe.format, "method": recipe.method}

    def node(source: Base) -> Any:
        if isinstance(source, str):
            return source
        return _source(source) if isinstance(source, Source) else _recipe(source, written_out=written_out)

    def _source(source: Source | Into) -> dict[str, Any]:
        found: dict[str, Any] = {"model": node(source.model)}
        for key in ("part", "architecture", "layers"):
            if (said := getattr(source, key, None)) is not None:
                found[key] = said
        return {**found, **dict(sorted(source.own.items()))} if isinstance(source, Entry) else found

    def stretch(part: Slice | Module) -> dict[str, Any]:
        found: dict[str, Any] = {}
        if isinstance(part, Slice) and part.base is not None:
            found["base"] = node(part.base)
        if part.models:
            found["models"] = [_source(entry) for entry in part.models]
        if isinstance(part, Module) and part.slices:
            found["slices"] = [stretch(inner) for inner in part.slices]
        if part.parameters:
            found["parameters"] = dict(sorted(part.parameters.items()))
        return found

    if recipe.base is not None:
        value["base"] = node(recipe.base)
    if recipe.models:
        value["models"] = [_source(entry) for entry in recipe.models]
    if recipe.slices:
        value["slices"] = [stretch(part) for part in recipe.slices]
    if recipe.modules:
        value["modules"] = {name: stretch(module) for name, module in recipe.modules.items()}
    if recipe.hops:
        value["hops"] = [
            {"model": node(hop.model), "layer": hop.layer} | ({"scale": hop.scale} if hop.scale != 1 else {}) for hop in recipe.hops
        ]
    if recipe.into is not None:
        value["into"] = _source(recipe.into)
    parameters = {**(_defaults(recipe) if written_out else {}), **recipe.parameters}
    if parameters:
        value["parameters"] = dict(sorted(parameters.items()))
    value["seed"] = recipe.seed
    if recipe.dtype.store is not None:
        value["dtype"] = {"compute": recipe.dtype.compute, "store": recipe.dtype.store}
    if recipe.tokenizer is not None:
        value["tokenizer"] = _tokenizer(recipe.tokenizer)
    if recipe.chat_template is not None:
        value["chat_template"] = recipe.chat_template
    for key in ("vocabulary_mismatch", "missing", "shape_mismatch", "allow_mixed"):
        if getattr(recipe, key) != Recipe.model_fields[key].default:
            value[key] = getattr(recipe, key)
    return value


def _defaults(recipe: Recipe) -> Mapping[str, Any]:
    """Values of parameters that the recipe leaves to the method; the last level before them is the recipe's own."""
    if recipe.hops:
        return {}
    entries = [entry for stretch in recipe.stretches() for entry in stretch.models]
    said = frozenset.intersection(*(frozenset(entry.own) for entry in entries)) if entries else frozenset()
    return {
        parameter.name: parameter.default
        for parameter in get(recipe.method).parameters
        if not parameter.required and parameter.default is not None and not (parameter.per_model and parameter.name in said)
    }


def _tokenizer(tokenizer: Tokenizer) -> dict[str, Any]:
    source = tokenizer.source
    value: dict[str, Any] = {"source": source if isinstance(source, str) else {"model": source.model}}
    if tokenizer.tokens:
        value["tokens"] = {token: rule.model_dump(exclude_defaults=True) for token, rule in tokenizer.tokens.items()}
    if tokenizer.pad_to_multiple_of is not None:
        value["pad_to_multiple_of"] = tokenizer.pad_to_multiple_of
    return value
