"""Models with different vocabularies are made to agree: one vocabulary, one order of rows, and a tokenizer that fits."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from modelglue.checkpoint.fit import label_of
from modelglue.checkpoint.protocol import FLOATING, Checkpoint, SideFile
from modelglue.checkpoint.vocabulary.config import lost_ids_update, rows_update, special_ids_update
from modelglue.checkpoint.vocabulary.heads import with_heads
from modelglue.checkpoint.vocabulary.over import updated
from modelglue.checkpoint.vocabulary.request import FromModel, FromToken, TokenPolicy, VocabularyRequest
from modelglue.checkpoint.vocabulary.surgery import role_tokens, tokenizer_files
from modelglue.checkpoint.vocabulary.tables import Tables, lies_flat, tables_of
from modelglue.checkpoint.vocabulary.tokens import PIECE_FILES, TOKENIZER_FILES, Vocabulary, object_of, same_files, unread, vocabulary
from modelglue.checkpoint.vocabulary.union import (
    OutputVocabulary,
    RowCounts,
    check_policies,
    kept_rows,
    output_vocabulary,
    resolve,
    row_plans,
)
from modelglue.checkpoint.vocabulary.view import RevocabularyCheckpoint, RowPlan
from modelglue.errors import MergeError, RecipeError

#: classes whose ids are not the positions in their sentencepiece model
_SHIFTED = (
    "barthez", "camembert", "m2m_100", "marian", "mbart", "nllb-moe", "pegasus", "plbart", "speech_to_text", "t5", "umt5", "xglm",
    "xlm-roberta", "xlm-roberta-xl",
)  # fmt: skip


@dataclass(frozen=True)
class ModelReport:
    """What became of one model's tables: `before` rows were there, the output's rows are counted by where they come from."""

    label: str
    before: int
    rows: RowCounts


@dataclass(frozen=True)
class AlignmentReport:
    """The output's vocabulary, and every model's part in it."""

    tokens: int
    rows: int
    models: tuple[ModelReport, ...]


@dataclass(frozen=True)
class Alignment:
    """Models that agree on their vocabulary, and what the output needs besides: config fields, tokenizer files (None removes one)."""

    models: tuple[Checkpoint, ...]
    base: Checkpoint | None
    config: Mapping[str, Any] = field(default_factory=dict)
    files: Mapping[str, SideFile | None] = field(default_factory=dict)
    report: AlignmentReport | None = None
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Inputs:
    """The different models of a recipe, the base first."""

    models: list[Checkpoint]
    labels: list[str]
    tables: list[Tables]
    #: the recipe's positions (models, then the base) in this order
    positions: list[int]

    def views(self, views: Sequence[Checkpoint], base: bool) -> tuple[tuple[Checkpoint, ...], Checkpoint | None]:
        ordered = [views[number] for number in self.positions]
        return (tuple(ordered[:-1]), ordered[-1]) if base else (tuple(ordered), None)


def align(
    models: Sequence[Checkpoint],
    base: Checkpoint | None,
    request: VocabularyRequest,
    labels: Sequence[str] | None = None,
    *,
    widen: bool = False,
) -> Alignment:
    """Views of `models` and `base` whose tables have the rows of one vocabulary, chosen by `request`. Reads no tensor.

    A row without a token of its own is averaged over a model's rows, so it is rounded to the model's dtype; `widen` serves all rebuilt
    tables as float32 instead, for a recipe that names what is stored. Time: O(models x tokens). Raises RecipeError for what the
    request asks in vain, MergeError for models without a tokenizer or without tables.
    """
    inputs = _inputs(models, base, labels)
    vocabularies = _vocabularies(inputs)
    positions = inputs.positions
    for policy in request.tokens.values():
        if isinstance(policy.source, FromModel | FromToken):
            resolve(policy.source.model, len(positions))
    source = 0 if isinstance(request.source, str) else positions[resolve(request.source, len(positions))]
    faults = check_policies(vocabularies, [tables.rows for tables in inputs.tables], request, inputs.labels, positions)
    if faults:
        raise RecipeError("\n".join(faults))
    output = output_vocabulary(vocabularies, request, source)
    plans = row_plans(vocabularies, output, request, positions)
    views = _views(inputs, [plan for plan, _ in plans], output.rows, widen)
    warnings = _row_warnings(inputs, vocabularies, output, request)
    files, more = tokenizer_files(inputs.models, inputs.labels, vocabularies, output, source)
    config, ids_files, ids_warnings = _special_ids(inputs, vocabularies, output, files, source)
    donor = inputs.models[0]
    config = updated(config, rows_update(donor.config, output.rows, inputs.tables[0].rows))
    counts = [ModelReport(label, tables.rows, rows) for label, tables, (_, rows) in zip(inputs.labels, inputs.tables, plans, strict=True)]
    aligned, aligned_base = inputs.views(views, base is not None)
    return Alignment(
        aligned, aligned_base, config, {**_files_update(donor, files), **ids_files},
        AlignmentReport(len(output.ids), output.rows, tuple(counts)), (*warnings, *more, *ids_warnings),
    )  # fmt: skip


def check_vocabularies(models: Sequence[Checkpoint], base: Checkpoint | None, labels: Sequence[str] | None = None) -> None:
    """MergeError unless all models number their tokens alike and have equally many rows; it says how to align them.

    A model without a tokenizer, or without tables, has nothing to compare.
    """
    inputs = _inputs(models, base, labels)
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
    inputs = _inputs(models, base, labels)
    rows = min((tables.rows for tables in inputs.tables if tables.rows), default=0)
    if all(tables.rows in (0, rows) for tables in inputs.tables):
        return Alignment(tuple(models), base, warnings=tuple(_renumbered(inputs)))
    views = _views(inputs, [kept_rows(min(rows, tables.rows)) for tables in inputs.tables], rows, False)
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
        files, more = dict(_files_update(donor, made)), [*more, *cut]
    generation = object_of(donor.files, "generation_config.json")
    if generation is not None:
        changes, lost = lost_ids_update(generation, rows, "generation_config.json")
        more = [*more, *lost]
        if changes:
            files["generation_config.json"] = _json(updated(generation, changes))
    aligned, aligned_base = inputs.views(views, base is not None)
    return Alignment(aligned, aligned_base, config, files, None, (*warnings, *more))


def _inputs(models: Sequence[Checkpoint], base: Checkpoint | None, labels: Sequence[str] | None) -> _Inputs:
    given = [*models, *([base] if base is not None else [])]
    names = list(labels) if labels is not None else [label_of(model) for model in given]
    order = [len(given) - 1, *range(len(given) - 1)] if base is not None else list(range(len(given)))
    found: list[Checkpoint] = []
    titles: list[str] = []
    positions = [0] * len(given)
    for place in order:
        known = next((number for number, model in enumerate(found) if model is given[place]), None)
        if known is None:
            found.append(given[place])
            titles.append(names[place])
        positions[place] = len(found) - 1 if known is None else known
    return _Inputs(found, titles, [tables_of(model) for model in found], positions)


def _vocabularies(inputs: _Inputs) -> list[Vocabulary]:
    faults: list[str] = []
    found: list[Vocabulary] = []
    for model, label, tables in zip(inputs.models, inputs.labels, inputs.tables, strict=True):
        if not tables.names:
            faults.append(
                f"{label}: no tensor has one row per token (looked for vocab_size of the config and for usual names of embeddings), "
                "so its vocabulary cannot be aligned."
            )
        same = next((number for number, other in enumerate(inputs.models[: len(found)]) if same_files(model, other)), None)
        if same is not None and tables.limit == inputs.tables[same].limit:
            found.append(found[same])
            continue
        ours = vocabulary(model, tables)
        if ours is None:
            none = f"{label}: has no tokenizer, so its vocabulary cannot be aligned. Put the tokenizer's files into its folder."
            faults.append(unread(model) or none)
        elif _is_shifted(model):
            faults.append(
                f"{label}: has only a sentencepiece model, and a {model.config.get('model_type')} numbers its tokens otherwise than that. "
                "Save its tokenizer with transformers (it writes a tokenizer.json), so that the ids are known."
            )
        found.append(ours or Vocabulary({}))
    if faults:
        raise MergeError("\n".join(faults))
    return found


def _is_shifted(model: Checkpoint) -> bool:
    only_pieces = not {"tokenizer.json", "vocab.json", "vocab.txt"} & set(model.files) and any(name in model.files for name in PIECE_FILES)
    return only_pieces and model.config.get("model_type") in _SHIFTED


def _views(inputs: _Inputs, plans: Sequence[RowPlan], rows: int, widen: bool) -> list[Checkpoint]:
    others = with_heads(inputs.models, inputs.tables)
    views: list[Checkpoint] = []
    faults: list[str] = []
    for model, label, tables, plan in zip(inputs.models, inputs.labels, inputs.tables, plans, strict=True):
        if plan.is_own(tables.rows):
            views.append(model)
            continue
        needed = sorted({position for part in plan.parts for position, _ in part})
        for name in tables.names:
            info = model.info(name)
            if info.dtype not in FLOATING:
                faults.append(f"{label}: '{name}' is {info.dtype}; rows can be moved in floating tables only. Convert the model first.")
            for position in needed:
                other = others[position]
                theirs = other.info(name).shape if name in set(other.names()) else None
                if theirs is None:
                    faults.append(f"{inputs.labels[position]}: has no tensor '{name}', from which rows of {label} would be taken.")
                elif theirs[1:] != info.shape[1:] and not lies_flat(name):
                    faults.append(
                        f"'{name}' has rows of {theirs[-1]} numbers in {inputs.labels[position]} and of {info.shape[-1]} in {label}."
                    )
        views.append(
            RevocabularyCheckpoint(model, tables.names, plan, others, config=rows_update(model.config, rows, tables.rows), widen=widen)
        )
    if faults:
        raise MergeError("\n".join(faults))
    return views


def _row_warnings(inputs: _Inputs, vocabularies: Sequence[Vocabulary], output: OutputVocabulary, request: VocabularyRequest) -> list[str]:
    warnings = []
    known: set[str] = set().union(*(one.ids for one in vocabularies))
    unknown = [token for token in output.ids if token not in known and request.tokens.get(token, TokenPolicy()).source is None]
    if unknown:
        few = ", ".join(map(repr, unknown[:3]))
        warnings.append(f"no model has a row for {few}{' ...' if len(unknown) > 3 else ''}: zeros. Give a source in `tokens`.")
    for label, tables, own in zip(inputs.labels, inputs.tables, vocabularies, strict=True):
        idle = tables.rows - (max(own.ids.values(), default=-1) + 1)
        if idle > 0 and output.rows < tables.rows and own.ids.keys() <= output.ids.keys():
            warnings.append(
                f"{label}: {idle:,} of its {tables.rows:,} rows belong to no token and are not kept; the output has {output.rows:,} rows. "
                "`pad_to_multiple_of` rounds them up."
            )
    return warnings


def _special_ids(
    inputs: _Inputs, vocabularies: Sequence[Vocabulary], output: OutputVocabulary, files: Mapping[str, SideFile], source: int
) -> tuple[dict[str, Any], dict[str, SideFile | None], list[str]]:
    """Config and generation config with the ids that special tokens have in the output."""
    donor, owner = inputs.models[0], inputs.models[source]
    generation = object_of(donor.files, "generation_config.json")
    if source == 0:
        config, warnings = lost_ids_update(donor.config, output.rows, "config.json")
        changes, more = lost_ids_update(generation or {}, output.rows, "generation_config.json")
    else:
        tokens = {number: token for token, number in vocabularies[0].ids.items()}
        roles = role_tokens(files)
        config, warnings = special_ids_update(donor.config, owner.config, tokens, output.ids, roles, "config.json")
        theirs = {**owner.config, **(object_of(owner.files, "generation_config.json") or {})}
        changes, more = special_ids_update(generation or {}, theirs, tokens, output.ids, roles, "generation_config.json")
    made: dict[str, SideFile | None] = {}
    if generation is not None and changes:
        made["generation_config.json"] = _json(updated(generation, changes))
    return config, made, [*warnings, *more]


def _files_update(donor: Checkpoint, files: Mapping[str, SideFile]) -> dict[str, SideFile | None]:
    """What must change about the donor's side files, for the output to have these tokenizer files."""
    gone: dict[str, SideFile | None] = {name: None for name in donor.files if name in TOKENIZER_FILES and name not in files}
    return {**gone, **{name: file for name, file in files.items() if donor.files.get(name) != file}}


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


def _renumbered(inputs: _Inputs) -> list[str]:
    found = []
    for other, label, tables in zip(inputs.models[1:], inputs.labels[1:], inputs.tables[1:], strict=True):
        if fault := _different_tokens(inputs.models[0], other, inputs.labels[0], label, inputs.tables[0], tables):
            found.append(f"{fault} They are merged by number all the same.")
    return found


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()
