"""A recipe becomes a `Checkpoint` expression; nothing is computed until somebody reads it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from modelglue.checkpoint import Checkpoint, MergedCheckpoint, open_checkpoint
from modelglue.errors import CheckpointError, RecipeError, UserError
from modelglue.methods import get
from modelglue.recipe.mergeable import check_mergeable
from modelglue.recipe.schema import Recipe, read_recipe, unique_labels

Resolve = Callable[[str], Checkpoint]


def merge(source: str | Path | Mapping[str, Any] | Recipe) -> Checkpoint:
    """The merged model of a recipe (a file in either dialect, a mapping, or a `Recipe`), as an expression.

    Reads headers and configs only. Raises RecipeError for the recipe, CheckpointError for a model that cannot be opened,
    MergeError for models that do not fit each other.
    """
    recipe, models = read_with_models(source)
    return build(recipe, resolve=models.__getitem__)


def read_with_models(source: str | Path | Mapping[str, Any] | Recipe) -> tuple[Recipe, dict[str, Checkpoint]]:
    """The recipe, and its models on disk by reference, each opened once, the output's donor of config and tokenizer first.

    References are taken from the folder of the file, then from the working folder. One CheckpointError names all that cannot be opened.
    """
    recipe = source if isinstance(source, Recipe) else read_recipe(source)
    folder = Path(source).parent if isinstance(source, str | Path) else None
    models: dict[str, Checkpoint] = {}
    faults: list[str] = []
    for reference in references(recipe):
        try:
            models[reference] = open_reference(reference, folder)
        except UserError as error:
            faults.append(str(error))
    if faults:
        raise CheckpointError("\n".join(faults))
    return recipe, models


def references(recipe: Recipe) -> list[str]:
    """Every model on disk that a recipe names, in order, once; the base comes before the models."""
    nodes = [*([recipe.base] if recipe.base is not None else []), *(entry.model for entry in recipe.models)]
    found = [reference for node in nodes for reference in ([node] if isinstance(node, str) else references(node))]
    return list(dict.fromkeys(found))


def build(recipe: Recipe, *, relative_to: Path | None = None, resolve: Resolve | None = None) -> Checkpoint:
    """Turn a validated recipe into an expression. References are taken from `relative_to`, then from the working folder.

    Config, tokenizer and stored dtypes are the base's (for a method that computes without one, too), else the first model's. A nested
    recipe stays in float32 unless it names a `store` dtype of its own, so a merge of merges is rounded once. `resolve` replaces the
    opening of references (a search resolves aliases to models that are already open).
    """
    opened: dict[str, Checkpoint] = {}

    def open_once(reference: str) -> Checkpoint:
        if reference not in opened:
            opened[reference] = resolve(reference) if resolve else open_reference(reference, relative_to)
        return opened[reference]

    return _assemble(recipe, open_once, recipe.dtype.store)


def open_reference(reference: str, relative_to: Path | None) -> Checkpoint:
    """Open a model of a recipe that stands in the folder `relative_to`."""
    if relative_to is not None and not (relative_to / reference).exists() and Path(reference).exists():
        return open_checkpoint(reference)
    return open_checkpoint(reference, relative_to=relative_to)


def _assemble(recipe: Recipe, resolve: Resolve, store: str | None) -> Checkpoint:
    def input_(model: str | Recipe) -> Checkpoint:
        return resolve(model) if isinstance(model, str) else _assemble(model, resolve, model.dtype.store or "float32")

    models = [input_(entry.model) for entry in recipe.models]
    base = input_(recipe.base) if recipe.base is not None else None
    method = get(recipe.method)
    labels = unique_labels(recipe)
    values, faults = method.resolve(recipe.parameters, [entry.own for entry in recipe.models], labels)
    if faults:  # a recipe that was read has none; one that was made in Python may
        raise RecipeError("\n".join(faults))
    check_mergeable([*models, *([base] if base is not None else [])])
    return MergedCheckpoint(
        method,
        models,
        base if method.takes_base else None,
        values,
        labels=labels,
        store=store,
        seed=recipe.seed,
        donor=resolve(_donor(recipe)),
    )


def _donor(recipe: Recipe) -> str:
    """The model on disk whose config, tokenizer and dtypes the output takes."""
    first = recipe.base if recipe.base is not None else recipe.models[0].model
    return first if isinstance(first, str) else _donor(first)


def linear_recipe(members: Sequence[str], weights: Sequence[float], store: str | None = None) -> Recipe:
    """The linear merge that selection ends with: flattened coefficients over the original models."""
    value: dict[str, Any] = {
        "method": "linear",
        "models": [{"model": member, "weight": weight} for member, weight in zip(members, weights, strict=True)],
    }
    if store is not None:
        value["dtype"] = {"store": store}
    return read_recipe(value)
