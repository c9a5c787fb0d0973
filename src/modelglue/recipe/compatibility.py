"""Whether models can be merged tensor by tensor, judged from headers, config.json and tokenizer.json alone.

Errors are what would give a wrong or unloadable model: other tensors, other shapes, another architecture, another
vocabulary. Warnings are what an explicit recipe may want: settings that change how the same weights compute.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from modelglue.checkpoint import FLOATING

if TYPE_CHECKING:
    from modelglue.checkpoint import Checkpoint

_LISTED = 12
#: fields of config.json that never change what the weights compute
_SOFT = frozenset({
    "_name_or_path", "architectures", "transformers_version", "dtype", "torch_dtype", "use_cache", "vocab_size",
    "bos_token_id", "eos_token_id", "pad_token_id", "initializer_range", "tie_word_embeddings", "auto_map",
    "attention_dropout", "hidden_dropout", "attn_implementation", "_attn_implementation_autoset", "pretraining_tp",
    "return_dict", "output_attentions", "output_hidden_states", "is_encoder_decoder", "id2label", "label2id",
    "unsloth_version", "quantization_config", "classifier_dropout",
})  # fmt: skip


@dataclass(frozen=True)
class Findings:
    """What a comparison found; a merge goes ahead when `errors` is empty."""

    errors: tuple[str, ...]
    warnings: tuple[str, ...]


def compare(place: str, donor: str, models: Mapping[str, Checkpoint]) -> Findings:
    """Compare every model with the one that gives the output its names, shapes, config and tokenizer."""
    errors: list[str] = []
    warnings: list[str] = []
    ours = models[donor]
    for tensor in ours.names():
        dtype = ours.info(tensor).dtype
        if dtype.startswith("F8"):
            errors.append(
                f"{place}{donor}: tensor '{tensor}' is {dtype}; 8-bit floats cannot be merged elementwise. "
                "Dequantise the model first."
            )
            break
    for name, model in models.items():
        if "quantization_config" in model.config:
            kind = model.config["quantization_config"]
            method = kind.get("quant_method", "unknown") if isinstance(kind, Mapping) else "unknown"
            errors.append(f"{place}{name}: is quantised ({method}); merge the original weights instead.")
        if name == donor:
            continue
        vocabulary = _vocabulary(donor, ours, name, model)
        errors += [f"{place}{text}" for text in vocabulary]
        errors += [f"{place}{text}" for text in _architecture(donor, ours, name, model)]
        errors += [f"{place}{text}" for text in _tensors(donor, ours, name, model, bool(vocabulary))]
        if not vocabulary:
            wrong, doubtful = _tokens(donor, ours, name, model)
            errors += [f"{place}{text}" for text in wrong]
            warnings += [f"{place}{text}" for text in doubtful]
        warnings += [f"{place}{text}" for text in _settings(donor, ours, name, model)]
    return Findings(tuple(errors), tuple(warnings))


def _architecture(donor: str, ours: Checkpoint, name: str, theirs: Checkpoint) -> list[str]:
    a, b = (checkpoint.config.get("architectures") for checkpoint in (ours, theirs))
    if a and b and a != b:
        return [
            f"architectures differ: {donor} is {_names(a)}, {name} is {_names(b)}. "
            "Weights of different architectures cannot be merged; put both into a mixture instead."
        ]
    return []


def _tensors(donor: str, ours: Checkpoint, name: str, theirs: Checkpoint, known_vocabulary: bool) -> list[str]:
    mine, other = set(ours.names()), set(theirs.names())
    problems: list[str] = []
    remedy = "Merge models of one architecture and size; leave the odd one out."
    for lacking, having, difference in ((name, donor, mine - other), (donor, name, other - mine)):
        if difference:
            problems.append(f"{lacking} lacks {_listed(sorted(difference))} of {having}. {remedy}")
    different = []
    for tensor in sorted(mine & other):
        a, b = ours.info(tensor), theirs.info(tensor)
        if a.shape != b.shape and not (known_vocabulary and _differs_in_rows(a.shape, b.shape)):
            different.append(f"  '{tensor}': {list(a.shape)} in {donor}, {list(b.shape)} in {name}")
        elif (a.dtype in FLOATING) != (b.dtype in FLOATING):
            different.append(f"  '{tensor}': {a.dtype} in {donor}, {b.dtype} in {name}")
    if different:
        more = [f"  ... and {len(different) - _LISTED} more"] if len(different) > _LISTED else []
        head = f"{len(different)} tensor{'s' if len(different) > 1 else ''} of {donor} and {name} do not fit. {remedy}"
        problems.append("\n".join([head, *different[:_LISTED], *more]))
    return problems


def _vocabulary(donor: str, ours: Checkpoint, name: str, theirs: Checkpoint) -> list[str]:
    """Tables that differ in their number of rows only, in models that say that their vocabularies differ."""
    sizes = [checkpoint.config.get("vocab_size") for checkpoint in (ours, theirs)]
    tables = [
        tensor
        for tensor in ours.names()
        if tensor in set(theirs.names()) and _differs_in_rows(ours.info(tensor).shape, theirs.info(tensor).shape)
    ]
    if sizes[0] == sizes[1] or not tables:
        return []
    rows = [ours.info(tables[0]).shape[0], theirs.info(tables[0]).shape[0]]
    return [
        f"vocabularies differ: {rows[0]} rows in {donor}, {rows[1]} in {name} ({_listed(tables)}). Cutting them would give "
        "a model that does not load. Aligning vocabularies (`tokenizer: {source: base}` or `union`) is not supported yet: "
        "merge models of one vocabulary, or put both into a mixture."
    ]


def _differs_in_rows(a: tuple[int, ...], b: tuple[int, ...]) -> bool:
    return len(a) == len(b) and len(a) > 0 and a[0] != b[0] and a[1:] == b[1:]


def _tokens(donor: str, ours: Checkpoint, name: str, theirs: Checkpoint) -> tuple[list[str], list[str]]:
    """Rows of equal number that mean different tokens: an error in the trained vocabulary, a warning in added tokens."""
    paths = [checkpoint.files.get("tokenizer.json") for checkpoint in (ours, theirs)]
    if paths[0] is None or paths[1] is None:
        return [], []
    texts = [path.read_bytes() for path in paths if path is not None]
    if texts[0] == texts[1]:
        return [], []
    try:
        (words, added), (other_words, other_added) = (_token_ids(json.loads(text)) for text in texts)
    except (ValueError, KeyError, TypeError, AttributeError):
        return [], [
            f"the tokenizer.json of {donor} and {name} differ, and one is not understood; compare them yourself."
        ]
    moved = [word for number, word in words.items() if other_words.get(number, word) != word]
    if moved:
        return [
            f"vocabularies differ: {len(moved)} tokens of {donor} have another id in {name}, such as '{sorted(moved)[0]}'. "
            "Their rows mean different words, so averaging them gives nonsense; merge models of one vocabulary."
        ], []
    changed = [word for number, word in added.items() if other_added.get(number, word) != word]
    extra = sorted(set(other_added.values()) - set(added.values()) - set(words.values()))
    notes = []
    if changed:
        notes.append(
            f"the added tokens of {donor} and {name} differ under the same id, such as '{changed[0]}'; {donor}'s are kept."
        )
    elif extra:
        notes.append(
            f"{name} has added tokens that {donor} lacks ({_listed(extra)}); the output has {donor}'s tokenizer."
        )
    return [], notes


def _token_ids(tokenizer: Mapping[str, Any]) -> tuple[dict[int, str], dict[int, str]]:
    """(trained vocabulary, added tokens), each id -> token."""
    vocabulary = tokenizer["model"]["vocab"]
    if isinstance(vocabulary, Mapping):
        words = {int(number): str(word) for word, number in vocabulary.items()}
    else:  # unigram models list [token, score] pairs
        words = {number: str(pair[0]) for number, pair in enumerate(vocabulary)}
    added = {int(token["id"]): str(token["content"]) for token in tokenizer.get("added_tokens") or []}
    return {number: word for number, word in words.items() if number not in added}, added


def _settings(donor: str, ours: Checkpoint, name: str, theirs: Checkpoint) -> list[str]:
    """Fields of config.json that may change what equal weights compute."""
    if not ours.config or not theirs.config or ours.config.get("architectures") != theirs.config.get("architectures"):
        return []
    a, b = _flat(ours.config), _flat(theirs.config)
    different = sorted(key for key in a.keys() & b.keys() if a[key] != b[key])
    if not different:
        return []
    listed = ", ".join(f"{key} ({a[key]} and {b[key]})" for key in different[:_LISTED])
    return [f"the configs of {donor} and {name} differ in {listed}; the output has {donor}'s."]


def _flat(config: Mapping[str, Any]) -> dict[str, Any]:
    """Fields that matter, with the rotary settings under one spelling (transformers 5 nests what 4 wrote flat)."""
    fields = {key: value for key, value in config.items() if key not in _SOFT and value is not None}
    rope = fields.pop("rope_parameters", None) or fields.pop("rope_scaling", None)
    if isinstance(rope, Mapping):
        for key, value in rope.items():
            fields["rope_type" if key == "type" else key] = value
    fields.setdefault("rope_type", "default")
    return {key: float(value) if isinstance(value, int) and not isinstance(value, bool) else value
            for key, value in fields.items()}  # fmt: skip


def _names(value: Any) -> str:
    return ", ".join(str(part) for part in value) if isinstance(value, list) else str(value)


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(f"'{name}'" for name in names[:_LISTED])
    return shown + (f" and {len(names) - _LISTED} more" if len(names) > _LISTED else "")
