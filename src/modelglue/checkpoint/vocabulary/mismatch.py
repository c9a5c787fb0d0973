"""Without a tokenizer section: models that number their tokens differently are refused, or cut to the rows that all have."""

from __future__ import annotations

from collections.abc import Sequence

from modelglue.checkpoint.protocol import Checkpoint, SideFile
from modelglue.checkpoint.vocabulary.alignment import Alignment, Inputs, files_update, inputs_of, side_json, views_of
from modelglue.checkpoint.vocabulary.config import lost_ids_update, rows_update
from modelglue.checkpoint.vocabulary.over import updated
from modelglue.checkpoint.vocabulary.tables import Tables
from modelglue.checkpoint.vocabulary.tokenizer_files import tokenizer_files
from modelglue.checkpoint.vocabulary.tokens import object_of, same_files, unread, vocabulary
from modelglue.checkpoint.vocabulary.union import OutputVocabulary, kept_rows
from modelglue.errors import MergeError


def check_vocabularies(models: Sequence[Checkpoint], base: Checkpoint | None, labels: Sequence[str] | None = None) -> None:
    """MergeError unless all models number their tokens alike and have equally many rows; it says how to align them.

    A model without a tokenizer, or without tables, has nothing to compare.
    """
    inputs = inputs_of(models, base, labels)
    first, label = inputs.models[0], inputs.labels[0]
    for other, theirs, tables in zip(inputs.models[1:], inputs.labels[1:], inputs.tables[1:], strict=True):
        if fault := _different_tokens(first, other, label, theirs, inputs.tables[0], tables):
            raise MergeError(f"{fault} {_REMEDY}")
        rows = inputs.tables[0].rows
        if rows and tables.rows and rows != tables.rows:
            raise MergeError(f"{theirs} has {tables.rows:,} embedding rows and {label} {rows:,}, so their tables do not match. {_REMEDY}")


_REMEDY = (
    "Add `tokenizer: {source: base}` (or `source: union`) to the recipe, which aligns rows by token; "
    "or `vocabulary_mismatch: truncate`, which takes the common rows as they are."
)


def truncate(models: Sequence[Checkpoint], base: Checkpoint | None, labels: Sequence[str] | None = None) -> Alignment:
    """Cut every model's tables to the rows that all have, whatever tokens they belong to; the config gets the true number.

    Tokens beyond them are taken out of the output's tokenizer. Row numbers that mean different tokens are warned of.
    """
    inputs = inputs_of(models, base, labels)
    rows = min((tables.rows for tables in inputs.tables if tables.rows), default=0)
    if all(tables.rows in (0, rows) for tables in inputs.tables):
        return Alignment(tuple(models), base, warnings=tuple(_renumbered(inputs)))
    views = views_of(inputs, [kept_rows(min(rows, tables.rows)) for tables in inputs.tables], rows, False)
    donor = inputs.models[0]
    warnings = [f"the tables are cut to the {rows:,} rows that all models have.", *_renumbered(inputs)]
    config, more = lost_ids_update(donor.config, rows, "config.json")
    config = updated(config, rows_update(donor.config, rows, inputs.tables[0].rows))
    files: dict[str, SideFile | None] = {}
    ours = vocabulary(donor, inputs.tables[0])
    if ours is not None:
        kept = {token: number for token, number in ours.ids.items() if number < rows}
        output = OutputVocabulary(kept, {}, max(kept.values(), default=-1) + 1, rows)
        made, cut = tokenizer_files([donor], inputs.labels[:1], [ours], output, 0)
        files, more = dict(files_update(donor, made)), [*more, *cut]
    generation = object_of(donor.files, "generation_config.json")
    if generation is not None:
        changes, lost = lost_ids_update(generation, rows, "generation_config.json")
        more = [*more, *lost]
        if changes:
            files["generation_config.json"] = side_json(updated(generation, changes))
    aligned, aligned_base = inputs.views(views, base is not None)
    return Alignment(aligned, aligned_base, config, files, None, (*warnings, *more))


def _different_tokens(first: Checkpoint, other: Checkpoint, label: str, theirs: str, tables: Tables, other_tables: Tables) -> str | None:
    if same_files(first, other):
        return None
    a, b = vocabulary(first, tables), vocabulary(other, other_tables)
    if a is None or b is None:
        return next((reason for model in (first, other) if (reason := unread(model))), None)
    ours, found = {**a.beyond, **a.ids}, {**b.beyond, **b.ids}
    idle = {token for token in ours.keys() | found.keys() if token not in a.ids and token not in b.ids}
    different = sorted(token for token in (ours.keys() | found.keys()) - idle if ours.get(token) != found.get(token))
    if not different:
        return None
    return (
        f"{theirs} and {label} number their tokens differently ({len(different)} tokens, among them {different[0]!r}: "
        f"{found.get(different[0])} and {ours.get(different[0])}), so their embedding rows do not mean the same."
    )


def _renumbered(inputs: Inputs) -> list[str]:
    found = []
    for other, label, tables in zip(inputs.models[1:], inputs.labels[1:], inputs.tables[1:], strict=True):
        if fault := _different_tokens(inputs.models[0], other, inputs.labels[0], label, inputs.tables[0], tables):
            found.append(f"{fault} They are merged by number all the same.")
    return found
