"""Recipe -> checkpoint expression. Headers and JSON are read, no tensor is; whatever cannot be merged is refused here."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from modelglue import methods
from modelglue.checkpoint import Checkpoint, MergedCheckpoint, open_checkpoint
from modelglue.errors import CheckpointError, MergeError, ModelGlueError, UserError
from modelglue.recipe.compatibility import Findings, compare
from modelglue.recipe.schema import Recipe, engine_parameters, validated

if TYPE_CHECKING:
    from modelglue.methods import Method

Resolve = Callable[[str], Checkpoint]


def build(recipe: Recipe, *, relative_to: Path | None = None, resolve: Resolve | None = None) -> Checkpoint:
    """The recipe as a lazy checkpoint, ready for `save`, `load_into` or a comparison.

    References are opened with `resolve`; by default they are paths from `relative_to` (default: the working folder) or hub
    ids. Config, tokenizer and the stored dtypes come from the base, else from the first model; a nested recipe is computed
    in float32 and only rounded on the way if it names a `store` dtype of its own. Raises UserError subclasses that list
    every model that cannot be opened, or every reason why the models cannot be merged.
    """
    validated(recipe)
    models = open_models(recipe, relative_to=relative_to, resolve=resolve)
    findings = check_models(recipe, models)
    if findings.errors:
        raise MergeError("\n".join(findings.errors))
    return assemble(recipe, models)


def references(recipe: Recipe) -> Iterator[tuple[str, str]]:
    """(place in the file, reference) of every model, nested recipes included, in the order of the file."""
    inputs = [] if recipe.base is None else [(recipe.place, recipe.base)]
    for place, model in [*inputs, *((entry.place, entry.model) for entry in recipe.models)]:
        if isinstance(model, str):
            yield place, model
        else:
            yield from references(model)


def open_models(
    recipe: Recipe, *, relative_to: Path | None = None, resolve: Resolve | None = None
) -> dict[str, Checkpoint]:
    """Every referenced model, opened once; one error that lists all that cannot be opened."""
    opened: dict[str, Checkpoint] = {}
    faults: list[ModelGlueError] = []
    failed: list[str] = []
    for place, reference in references(recipe):
        if reference in opened or reference in failed:
            continue
        try:
            opened[reference] = (
                resolve(reference) if resolve is not None else open_checkpoint(reference, relative_to=relative_to)
            )
        except ModelGlueError as error:
            failed.append(reference)
            error.args = (f"{place}{error}",)
            faults.append(error)
    if len(faults) == 1:
        raise faults[0]
    if faults:
        user = all(isinstance(fault, UserError) for fault in faults)
        raise (CheckpointError if user else ModelGlueError)("\n".join(str(fault) for fault in faults))
    return opened


def check_models(recipe: Recipe, models: Mapping[str, Checkpoint]) -> Findings:
    """Whether the opened models can be merged with each other, from headers, configs and tokenizer files.

    Nested recipes keep the names and shapes of what they merge, so all leaves of a recipe are compared with its donor.
    """
    distinct = list(dict.fromkeys(reference for _, reference in references(recipe)))
    return compare(recipe.place, donor_of(recipe), {reference: models[reference] for reference in distinct})


def donor_of(recipe: Recipe) -> str:
    """The reference that gives config, tokenizer and dtypes: the base, else the first model, into nested recipes."""
    first = recipe.base if recipe.base is not None else recipe.models[0].model
    return first if isinstance(first, str) else donor_of(first)


def assemble(recipe: Recipe, models: Mapping[str, Checkpoint], *, nested: bool = False) -> MergedCheckpoint:
    """The expression over models that are known to fit."""
    method: Method = methods.get(recipe.method)
    donor = models[donor_of(recipe)]

    def checkpoint(model: str | Recipe) -> Checkpoint:
        return models[model] if isinstance(model, str) else assemble(model, models, nested=True)

    store = recipe.dtype.store
    if store is None and nested:
        # One rounding, at the very end; what stands between recipes is as wide as the arithmetic.
        wide = any(donor.info(name).dtype == "F64" for name in donor.names())
        store = "float64" if wide else "float32"
    base = checkpoint(recipe.base) if recipe.base is not None and method.needs_base else None
    return MergedCheckpoint(
        method,
        [checkpoint(entry.model) for entry in recipe.models],
        base,
        engine_parameters(recipe),
        store=store,
        seed=recipe.seed,
        donor=donor,
        streams=[position if entry.stream is None else entry.stream for position, entry in enumerate(recipe.models)],
    )
