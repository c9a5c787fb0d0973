"""Output heads that some models have and others tie to their embedding."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from modelglue.checkpoint.protocol import Checkpoint
from modelglue.checkpoint.views import RenamedCheckpoint
from modelglue.checkpoint.vocabulary.tables import LANGUAGE_CONFIGS, Tables, is_head, tables_of


@dataclass(frozen=True)
class TiedHeads:
    """Models that agree on whether there is a head, and what the output's config says of it."""

    models: tuple[Checkpoint, ...]
    base: Checkpoint | None
    config: Mapping[str, Any] = field(default_factory=dict)


def tied_heads(models: Sequence[Checkpoint], base: Checkpoint | None) -> TiedHeads:
    """If any model has an output head, one that ties its head contributes its embedding as the head, and the output's config says
    `tie_word_embeddings: false`, because a loader that ties would ignore what was written.

    A model that does not tie and lacks the head is left as it is: the merge then says that a tensor is missing. Where all
    models have the head and all of them tie it, it is a copy that no loader reads, and the config stays as it is. Headers only.
    """
    given = [*models, *([base] if base is not None else [])]
    found = [tables_of(model) for model in given]
    views = with_heads(given, found)
    lacking = any(view is not model for view, model in zip(views, given, strict=True))
    written = any(is_head(name) for tables in found for name in tables.heads)
    donor = base if base is not None else models[0]
    config: dict[str, Any] = {}
    if written and (lacking or not all(is_tied(model.config) for model in given)):
        config = untied(donor.config)
    ordered = tuple(views)
    return TiedHeads(ordered[: len(models)], ordered[-1] if base is not None else None, config)


def with_heads(models: Sequence[Checkpoint], tables: Sequence[Tables]) -> list[Checkpoint]:
    """Every model, with its embedding under the names of tables that only others have, where it ties them."""
    wanted = sorted({name for found in tables for name in found.names})
    views: list[Checkpoint] = []
    for model, found in zip(models, tables, strict=True):
        there = set(model.names())
        missing = {name: source for name in wanted if name not in there and (source := _tied_to(name, model, found)) is not None}
        if missing and is_tied(model.config):
            views.append(RenamedCheckpoint(model, {**{name: name for name in there}, **missing}))
        else:
            views.append(model)
    return views


def _tied_to(name: str, model: Checkpoint, tables: Tables) -> str | None:
    """The tensor that stands for a table that a model does not have: its embedding; for BERT's second name of a bias, the first."""
    if name.endswith("bias"):
        other = name.replace(".decoder.bias", ".bias")
        return other if other != name and other in tables.names else None
    return tables.embedding


def is_tied(config: Mapping[str, Any]) -> bool:
    """Whether a model of this config ties its head; that is the default where a config does not say."""
    for part in (config, *(config.get(key) for key in LANGUAGE_CONFIGS)):
        if isinstance(part, Mapping) and isinstance(part.get("tie_word_embeddings"), bool):
            return bool(part["tie_word_embeddings"])
    return True


def untied(config: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that must change for the config to say that the head is a tensor of its own."""
    if not config:
        return {}
    changes: dict[str, Any] = {} if config.get("tie_word_embeddings") is False else {"tie_word_embeddings": False}
    for key in LANGUAGE_CONFIGS:
        part = config.get(key)
        if isinstance(part, Mapping) and part.get("tie_word_embeddings") is True:
            changes[key] = {"tie_word_embeddings": False}
    return changes
