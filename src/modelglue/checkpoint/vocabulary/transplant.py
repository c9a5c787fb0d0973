"""A model whose tables have become those of another: what its config and its tokenizer must say then."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from modelglue.checkpoint.protocol import Checkpoint, SideFile
from modelglue.checkpoint.vocabulary.alignment import files_update, side_json
from modelglue.checkpoint.vocabulary.config import rows_update, special_ids_update
from modelglue.checkpoint.vocabulary.heads import is_tied, untied
from modelglue.checkpoint.vocabulary.over import updated
from modelglue.checkpoint.vocabulary.surgery import role_tokens
from modelglue.checkpoint.vocabulary.tables import tables_of
from modelglue.checkpoint.vocabulary.tokens import TEMPLATE_FILES, TOKENIZER_FILES, object_of, vocabulary


@dataclass(frozen=True)
class Transplant:
    """Fields of the config to update (nested), side files to replace (None removes one), and what was lost."""

    config: Mapping[str, Any] = field(default_factory=dict)
    files: Mapping[str, SideFile | None] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()


def transplant(whole: Checkpoint, part: Checkpoint, tables: Checkpoint) -> Transplant:
    """What `whole` must say when the tables of its `part` become those of the model `tables`. Headers and tokenizers only.

    The tokenizer becomes that of `tables` (chat templates stay those of `whole`), the number of rows follows, ids of special tokens are
    looked up by token, and a head that `tables` does not tie is no longer tied. Nothing changes where both have the same vocabulary.
    """
    ours, theirs = tables_of(part), tables_of(tables)
    if not theirs.names:
        return Transplant()
    config = rows_update(whole.config, theirs.rows, ours.rows)
    if theirs.heads and not is_tied(tables.config) and is_tied(whole.config):
        config = updated(config, untied(whole.config))
    old, new = vocabulary(part, ours), vocabulary(tables, theirs)
    if old is None or new is None or {**old.beyond, **old.ids} == {**new.beyond, **new.ids}:
        return Transplant(config)
    kept = {name: file for name, file in whole.files.items() if name in TEMPLATE_FILES}
    moved = {name: file for name, file in tables.files.items() if name in TOKENIZER_FILES and name not in TEMPLATE_FILES}
    tokens, roles = {number: token for token, number in {**old.beyond, **old.ids}.items()}, role_tokens(moved)
    ids, warnings = special_ids_update(whole.config, tables.config, tokens, new.ids, roles, "config.json")
    files = files_update(whole, {**moved, **kept})
    generation = object_of(whole.files, "generation_config.json")
    if generation is not None:
        source = {**tables.config, **(object_of(tables.files, "generation_config.json") or {})}
        changes, more = special_ids_update(generation, source, tokens, new.ids, roles, "generation_config.json")
        warnings = [*warnings, *more]
        if changes:
            files["generation_config.json"] = side_json(updated(generation, changes))
    return Transplant(updated(config, ids), files, tuple(warnings))
