"""Models with different vocabularies are made to agree: one vocabulary, one order of rows, and a tokenizer that fits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from modelglue.checkpoint.protocol import Checkpoint, SideFile
from modelglue.checkpoint.vocabulary.alignment import (
    Alignment,
    AlignmentReport,
    Inputs,
    ModelReport,
    files_update,
    inputs_of,
    side_json,
    views_of,
)
from modelglue.checkpoint.vocabulary.config import lost_ids_update, rows_update, special_ids_update
from modelglue.checkpoint.vocabulary.over import updated
from modelglue.checkpoint.vocabulary.request import FromModel, FromToken, TokenPolicy, VocabularyRequest
from modelglue.checkpoint.vocabulary.surgery import role_tokens
from modelglue.checkpoint.vocabulary.tokenizer_files import tokenizer_files
from modelglue.checkpoint.vocabulary.tokens import PIECE_FILES, Vocabulary, object_of, same_files, unread, vocabulary
from modelglue.checkpoint.vocabulary.union import OutputVocabulary, check_policies, output_vocabulary, resolve, row_plans
from modelglue.errors import MergeError, RecipeError

#: classes whose ids are not the positions in their sentencepiece model
_SHIFTED = (
    "barthez", "camembert", "m2m_100", "marian", "mbart", "nllb-moe", "pegasus", "plbart", "speech_to_text", "t5", "umt5", "xglm",
    "xlm-roberta", "xlm-roberta-xl",
)  # fmt: skip


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
    inputs = inputs_of(models, base, labels)
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
    plans = row_plans(vocabularies, output, request, positions, based=base is not None)
    views = views_of(inputs, [plan for plan, _ in plans], output.rows, widen)
    warnings = _row_warnings(inputs, vocabularies, output, request)
    files, more = tokenizer_files(inputs.models, inputs.labels, vocabularies, output, source)
    config, ids_files, ids_warnings = _special_ids(inputs, vocabularies, output, files, source)
    donor = inputs.models[0]
    config = updated(config, rows_update(donor.config, output.rows, inputs.tables[0].rows))
    counts = [ModelReport(label, tables.rows, rows) for label, tables, (_, rows) in zip(inputs.labels, inputs.tables, plans, strict=True)]
    aligned, aligned_base = inputs.views(views, base is not None)
    return Alignment(
        aligned, aligned_base, config, {**files_update(donor, files), **ids_files},
        AlignmentReport(len(output.ids), output.rows, tuple(counts)), (*warnings, *more, *ids_warnings),
    )  # fmt: skip


def _vocabularies(inputs: Inputs) -> list[Vocabulary]:
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


def _row_warnings(inputs: Inputs, vocabularies: Sequence[Vocabulary], output: OutputVocabulary, request: VocabularyRequest) -> list[str]:
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
    inputs: Inputs, vocabularies: Sequence[Vocabulary], output: OutputVocabulary, files: Mapping[str, SideFile], source: int
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
        made["generation_config.json"] = side_json(updated(generation, changes))
    return config, made, [*warnings, *more]
