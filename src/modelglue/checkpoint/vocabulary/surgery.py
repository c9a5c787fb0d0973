"""Tokenizer files with tokens added and taken out; whatever else stands in them (normalizer, post-processor, templates) stays."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from modelglue.checkpoint.protocol import SideFile, file_bytes
from modelglue.checkpoint.vocabulary.pieces import CONTROL, USER_DEFINED, Piece, append_pieces, read_pieces
from modelglue.checkpoint.vocabulary.tokens import json_text, lines_of, object_of

#: the roles that a tokenizer gives to tokens
ROLES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


@dataclass(frozen=True)
class NewToken:
    """A token that the source does not have; ordinary ones have no settings."""

    text: str
    id: int
    settings: Mapping[str, bool] | None
    score: float | None


@dataclass(frozen=True)
class Change:
    """What the output's vocabulary changes about the source's."""

    #: every token of the output
    ids: Mapping[str, int]
    size: int
    new: Sequence[NewToken]
    removed: frozenset[str]
    #: settings of all added tokens, old and new
    added: Mapping[str, Mapping[str, bool]]
    merges: Sequence[tuple[str, str]]


def pair_of(merge: Any) -> tuple[str, str] | None:
    parts = merge.split(" ") if isinstance(merge, str) and not merge.startswith("#version") else merge
    if isinstance(parts, list) and len(parts) == 2 and all(isinstance(part, str) and part for part in parts):
        return parts[0], parts[1]
    return None


def tokenizer_json_of(files: Mapping[str, SideFile], change: Change) -> bytes:
    value = object_of(files, "tokenizer.json")
    assert value is not None
    model = value["model"]
    entries = [entry for entry in value.get("added_tokens") or [] if entry["content"] not in change.removed]
    entries += [{"id": token.id, "content": token.text, **token.settings} for token in change.new if token.settings is not None]
    value["added_tokens"] = entries
    vocab = model["vocab"]
    if isinstance(vocab, list):
        core = {str(entry[0]): number for number, entry in enumerate(vocab) if entry[0] not in change.removed}
        del vocab[_tail(core.values(), len(vocab)) :]
    else:
        core = vocab = model["vocab"] = {token: number for token, number in vocab.items() if token not in change.removed}
    ordinary = any(token.settings is None for token in change.new)
    if ordinary or not _numbers_itself(entries, core):
        if isinstance(vocab, list):
            lowest = min((float(entry[1]) for entry in vocab), default=0.0)
            scores = {token.text: token.score for token in change.new}
            for token in _beyond(change, len(vocab)):
                score = scores.get(token)
                vocab.append([token, 0.0 if token in change.added else score if score is not None else lowest])
        else:
            vocab.update(sorted(((token, number) for token, number in change.ids.items() if token not in core), key=lambda item: item[1]))
    merges = model.get("merges")
    if isinstance(merges, list) and (change.merges or change.removed):
        kept = [pair for pair in map(pair_of, merges) if pair is not None and not _is_lost(pair, model, change)]
        strings = all(isinstance(merge, str) for merge in merges) and all(" " not in part for pair in change.merges for part in pair)
        model["merges"] = [" ".join(pair) if strings and merges else list(pair) for pair in [*kept, *change.merges]]
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()  # a tenth of the time that indenting takes


def _is_lost(pair: tuple[str, str], model: Mapping[str, Any], change: Change) -> bool:
    prefix = model.get("continuing_subword_prefix") or ""
    whole = pair[0] + (pair[1][len(prefix) :] if prefix and pair[1].startswith(prefix) else pair[1])
    return bool({*pair, whole} & change.removed)


def _numbers_itself(entries: Iterable[Mapping[str, Any]], core: Mapping[str, int]) -> bool:
    """Whether a reader, who numbers added tokens one after the other unless the vocabulary has them, comes to the ids that are meant."""
    last = -1
    for entry in entries:
        token = entry["content"]
        number = core[token] if token in core else max(last + 1, len(core)) if last >= len(core) else len(core)
        if number != entry["id"]:
            return False
        last = max(last, number)
    return True


def _beyond(change: Change, count: int) -> list[str]:
    """The tokens of the ids from `count` on; an id without a token gets a name that no text has."""
    by_id = {number: token for token, number in change.ids.items()}
    return [by_id.get(number, f"[unused_row_{number}]") for number in range(count, change.size)]


def _tail(kept: Iterable[int], count: int) -> int:
    """How much of a list stays; what is taken out has the highest ids."""
    return min(max(kept, default=-1) + 1, count)


def vocab_json(files: Mapping[str, SideFile], change: Change) -> bytes:
    vocab = {token: number for token, number in (object_of(files, "vocab.json") or {}).items() if token not in change.removed}
    if any(token.settings is None for token in change.new):
        vocab.update(sorted(((token, number) for token, number in change.ids.items() if token not in vocab), key=lambda item: item[1]))
    return json_text(vocab)


def vocab_txt(files: Mapping[str, SideFile], change: Change) -> bytes:
    data = file_bytes(files["vocab.txt"])
    lines = lines_of(data)
    kept = lines[: _tail((number for number, token in enumerate(lines) if token not in change.removed), len(lines))]
    if any(token.settings is None for token in change.new):
        kept += _beyond(change, len(kept))
    return data if kept == lines else "".join(f"{line}\n" for line in kept).encode()


def merges_txt(files: Mapping[str, SideFile], change: Change) -> bytes:
    data = file_bytes(files["merges.txt"])
    lines = lines_of(data)
    kept = [line for line in lines if (pair := pair_of(line)) is None or not _is_lost(pair, {}, change)]
    new = [" ".join(pair) for pair in change.merges]
    return data if kept == lines and not new else "".join(f"{line}\n" for line in [*kept, *new]).encode()


def pieces_file(name: str, files: Mapping[str, SideFile], change: Change, everything: Mapping[str, int]) -> tuple[bytes | None, list[str]]:
    """A sentencepiece model can be extended where ids are positions in it; where they are not, it is left out."""
    data = file_bytes(files[name])
    ordinary = any(token.settings is None for token in change.new)
    pieces = read_pieces(data)
    lost = any(piece.text in change.removed for piece in pieces)
    if not ordinary and not lost:
        return data, []
    if lost or any(everything.get(piece.text) != number for number, piece in enumerate(pieces)):
        if "tokenizer.json" not in files and "vocab.json" not in files:
            return data, [
                f"{name} still has pieces that the output has no row for; save the tokenizer with transformers to be rid of them."
            ]
        return None, [f"{name} cannot be made to agree with the output's vocabulary and is left out; tokenizer.json is complete."]
    lowest = min(piece.score for piece in pieces)
    scores = {token.text: token.score for token in change.new}
    extra = []
    for token in _beyond(change, len(pieces)):
        settings = change.added.get(token)
        if settings is not None:
            extra.append(Piece(token, 0.0, CONTROL if settings["special"] else USER_DEFINED))
        else:
            score = scores.get(token)
            extra.append(Piece(token, lowest if score is None else score))
    return append_pieces(data, extra), []


def tokenizer_config(files: Mapping[str, SideFile], change: Change) -> bytes:
    original = object_of(files, "tokenizer_config.json") or {}
    value = _without_roles(original, change)
    decoder = value.get("added_tokens_decoder")
    if isinstance(decoder, Mapping) or ("tokenizer.json" not in files and change.added):
        kept = {key: entry for key, entry in (decoder or {}).items() if entry["content"] not in change.removed}
        for token in change.new:
            if token.settings is not None:
                kept[str(token.id)] = {"content": token.text, **token.settings}
        value = {**value, "added_tokens_decoder": kept}
    return file_bytes(files["tokenizer_config.json"]) if value == original else json_text(value)


def special_tokens_map(files: Mapping[str, SideFile], change: Change) -> bytes:
    original = object_of(files, "special_tokens_map.json") or {}
    value = _without_roles(original, change)
    return file_bytes(files["special_tokens_map.json"]) if value == original else json_text(value)


def roles_in(value: Mapping[str, Any]) -> dict[str, str]:
    """role -> token string."""
    found = {}
    for role in ROLES:
        entry = value.get(role)
        text = entry.get("content") if isinstance(entry, Mapping) else entry
        if isinstance(text, str):
            found[role] = text
    return found


def _without_roles(value: Mapping[str, Any], change: Change) -> dict[str, Any]:
    lost = {role for role, token in roles_in(value).items() if token in change.removed}
    return {key: entry for key, entry in value.items() if key not in lost}


def role_tokens(files: Mapping[str, SideFile]) -> dict[str, str]:
    """role -> token, as tokenizer_config.json and special_tokens_map.json say."""
    return {**roles_in(object_of(files, "special_tokens_map.json") or {}), **roles_in(object_of(files, "tokenizer_config.json") or {})}
