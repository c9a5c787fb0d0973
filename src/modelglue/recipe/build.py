"""A recipe becomes a `Checkpoint` expression; nothing is computed until somebody reads it."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from modelglue.checkpoint import Checkpoint, open_checkpoint
from modelglue.errors import CheckpointError, UserError
from modelglue.recipe.assemble import Built, assemble
from modelglue.recipe.read import read_recipe
from modelglue.recipe.schema import Into, Recipe, Source

Resolve = Callable[[str], Checkpoint]


def merge(source: str | Path | Mapping[str, Any] | Recipe, *, strict: bool = False) -> Checkpoint:
    """The merged model of a recipe (a file in either dialect, a mapping, or a `Recipe`), as an expression.

    Reads headers, configs and tokenizers only. Raises RecipeError for the recipe, CheckpointError for a model that cannot be opened,
    MergeError for models that do not fit each other. What is odd and no error comes as a UserWarning; `strict` refuses it.
    """
    recipe, models = read_with_models(source, strict=strict)
    built = build_with_warnings(recipe, models.__getitem__, strict=strict)
    for text in [*recipe.warnings, *built.warnings]:
        warnings.warn(text, UserWarning, stacklevel=2)
    return built.checkpoint


def read_with_models(
    source: str | Path | Mapping[str, Any] | Recipe, *, strict: bool = False, headers_only: bool = False
) -> tuple[Recipe, dict[str, Checkpoint]]:
    """The recipe, and its models on disk by reference, each opened once, the output's donor of config and tokenizer first.

    References are taken from the folder of the file, then from the working folder. One CheckpointError names all that cannot be opened.
    """
    recipe = source if isinstance(source, Recipe) else read_recipe(source, strict=strict)
    folder = Path(source).parent if isinstance(source, str | Path) else None
    models: dict[str, Checkpoint] = {}
    faults: list[str] = []
    for reference in references(recipe):
        try:
            models[reference] = open_reference(reference, folder, headers_only=headers_only)
        except UserError as error:
            of_reference = str(error).startswith("'")  # a fault in a file begins with the file
            faults.append((_where(recipe, reference) if of_reference else "") + str(error))
    if faults:
        raise CheckpointError("\n".join(faults))
    return recipe, models


def references(recipe: Recipe) -> list[str]:
    """Every model on disk that a recipe names, in order, once; the base comes before the models."""
    found: list[str] = []
    for _, node in recipe.inputs():
        model = node.model if isinstance(node, Source | Into) else node
        found += [model] if isinstance(model, str) else references(model)
    return list(dict.fromkeys(found))


def _where(recipe: Recipe, reference: str) -> str:
    """File, line and place at which a recipe that was read first names a model, as the beginning of a fault."""
    for place, node in recipe.inputs():
        model = node.model if isinstance(node, Source | Into) else node
        if model == reference:
            return recipe.origin.fault((*place, "model") if isinstance(node, Source | Into) else place, "") if recipe.was_read else ""
        if isinstance(model, Recipe) and reference in references(model):
            return _where(model, reference)
    return ""


def build(recipe: Recipe, *, relative_to: Path | None = None, resolve: Resolve | None = None) -> Checkpoint:
    """Turn a validated recipe into an expression. References are taken from `relative_to`, then from the working folder.

    Config, tokenizer and stored dtypes are the base's (for a method that computes without one, too), else the first model's. A nested
    recipe stays in float32 unless it names a `store` dtype of its own, so a merge of merges is rounded once. `resolve` replaces the
    opening of references (a search resolves aliases to models that are already open).
    """
    return build_with_warnings(recipe, resolve or (lambda reference: open_reference(reference, relative_to))).checkpoint


def build_with_warnings(recipe: Recipe, resolve: Resolve, *, strict: bool = False) -> Built:
    """The same, with what was found odd on the way; `strict` makes a RecipeError of it."""
    return assemble(recipe, resolve, strict=strict)


def open_reference(reference: str, relative_to: Path | None, *, headers_only: bool = False) -> Checkpoint:
    """Open a model of a recipe that stands in the folder `relative_to`."""
    with contextlib.suppress(OSError, ValueError):  # a reference may be too long for a path, or none
        if relative_to is not None and not (relative_to / reference).exists() and Path(reference).exists():
            relative_to = None
    return open_checkpoint(reference, relative_to=relative_to, headers_only=headers_only)


def linear_recipe(members: Sequence[str], weights: Sequence[float], store: str | None = None) -> Recipe:
    """The linear merge that selection ends with: flattened coefficients over the original models."""
    value: dict[str, Any] = {
        "method": "linear",
        "models": [{"model": member, "weight": weight} for member, weight in zip(members, weights, strict=True)],
    }
    if store is not None:
        value["dtype"] = {"store": store}
    return read_recipe(value)
