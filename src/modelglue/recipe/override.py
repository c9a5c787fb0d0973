"""A recipe with some settings replaced, in it and in every recipe inside it: what the command line says counts more than the file."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel

from modelglue.recipe.schema import Recipe


def overridden(recipe: Recipe, **settings: Any) -> Recipe:
    """`recipe` with the fields of `settings` set, nested recipes included; None leaves a field as it is.

    For settings that hold for a whole merge: seed, allow_mixed, vocabulary_mismatch. Messages keep naming file and line.
    """
    given = {name: value for name, value in settings.items() if value is not None}
    return recipe if not given else _overridden(recipe, given)


def _overridden(value: Any, given: dict[str, Any]) -> Any:
    if isinstance(value, BaseModel):
        fields = {name: _overridden(getattr(value, name), given) for name in type(value).model_fields}
        changed = {name: new for name, new in fields.items() if new is not getattr(value, name)}
        if isinstance(value, Recipe):
            changed |= given
        return value.model_copy(update=changed) if changed else value
    if isinstance(value, list):
        items = [_overridden(item, given) for item in value]
        return items if any(new is not old for new, old in zip(items, value, strict=True)) else value
    if isinstance(value, dict):
        entries = {key: _overridden(item, given) for key, item in value.items()}
        return entries if any(entries[key] is not value[key] for key in value) else value
    return value
