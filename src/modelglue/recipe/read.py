"""A file in either dialect, of one document or several, becomes a checked `Recipe`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from modelglue.errors import RecipeError, did_you_mean
from modelglue.recipe.checks import Checks
from modelglue.recipe.document import Document, load_documents, validate
from modelglue.recipe.mergekit import convert
from modelglue.recipe.mergekit_reader import Converted
from modelglue.recipe.schema import Origin, Recipe
from modelglue.recipe.several import assemble

#: recipes of mergekit's other tools, by the key that gives them away
_OTHER_TOOLS = {
    "experts": "is a recipe for a mixture of experts, not for a merge. `modelglue mix FILE OUT` makes it.",
    "genome": "is a plan for an evolutionary search, not a merge. `modelglue search run FILE OUT` runs it.",
}


def read_recipe(source: str | Path | Mapping[str, Any], *, strict: bool = False) -> Recipe:
    """Read a recipe in either dialect; `strict` turns warnings into errors. RecipeError lists every fault with file and line.

    Reads no model and imports no torch. What is odd and no error stands in the recipe's `warnings`.
    """
    documents = load_documents(source)
    for document in documents:
        for key, what in _OTHER_TOOLS.items():
            if isinstance(document.value, dict) and key in document.value and not {"method", "merge_method"} & set(document.value):
                raise RecipeError(document.fault((key,), what))
    if any(isinstance(document.value, dict) and "merge_method" in document.value for document in documents):
        return _checked(*_theirs(documents), strict=strict)
    for document in documents:
        _refuse_a_misspelt_merge_method(document)
    if len(documents) > 1:
        raise RecipeError(f"{documents[0].source}: holds {len(documents)} YAML documents, one is allowed here. Nest recipes as models.")
    return _checked(documents[0], Converted(documents[0]), strict=strict)


def _refuse_a_misspelt_merge_method(document: Document) -> None:
    """The key that tells the dialects apart deserves words of its own; otherwise every key of the file would be a fault."""
    if isinstance(document.value, dict) and not {"method", "format"} & set(document.value):
        for key in document.value:
            if did_you_mean(key, ["merge_method", "method"], limit=1) == did_you_mean("merge_method", ["merge_method"]):
                raise RecipeError(document.fault((key,), "unknown key. Did you mean 'merge_method'?"))


def _theirs(documents: Sequence[Document]) -> tuple[Document, Converted]:
    """mergekit's documents as one of ours."""
    found = []
    for document in documents:
        if not isinstance(document.value, dict) or "merge_method" not in document.value:
            raise RecipeError(document.fault((), "has no merge_method; every document of a file with several is a recipe."))
        found.append(convert(document))
    whole = assemble(found)
    return Document(documents[0].source, whole.value, {}, whole.trace), whole


def _news(found: Sequence[str], known: Sequence[str]) -> list[str]:
    """Faults on lines of which nothing is known yet. Once something is, what is missing may be missing because of it."""
    lines = [fault.split(": ", 1)[0] for fault in known]
    consequences = ("is required", "holds 0 items", "takes exactly", "takes at least") if known else ()
    return [fault for fault in found if fault.split(": ", 1)[0] not in lines and not any(text in fault for text in consequences)]


def _checked(document: Document, read: Converted, *, strict: bool) -> Recipe:
    faults = list(read.faults)
    warnings = list(read.warnings)
    recipe = None
    try:
        recipe = validate(document, Recipe)
    except RecipeError as error:
        if not faults:
            raise
        faults += _news(str(error).split("\n"), faults)
    else:
        checks = Checks(document).run(recipe)
        faults += _news(checks.faults, faults)
        warnings += checks.warnings
    if strict:
        faults += warnings
    if faults or recipe is None:
        raise RecipeError("\n".join(faults))
    return recipe.with_origin(Origin(document, (), warnings, read.notes))
