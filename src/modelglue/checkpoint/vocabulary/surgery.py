"""The tokenizer files of the output: the source's bytes where nothing changes, else its JSON with tokens added and taken out.

Everything else that stands in these files (normalizer, pre-tokenizer, post-processor, templates) stays as it was.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from modelglue.checkpoint.protocol import Checkpoint, SideFile, file_bytes
from modelglue.checkpoint.vocabulary.pieces import CONTROL, USER_DEFINED, Piece, append_pieces, read_pieces
from modelglue.checkpoint.vocabulary.tokens import (
    PIECE_FILES,
    TOKENIZER_FILES,
    UNREAD_FILES,
    Vocabulary,
    json_text,
    lines_of,
    object_of,
    pieces_of,
    settings_of,
    tokenizer_json,
)
from modelglue.checkpoint.vocabulary.union import OutputVocabulary

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


def tokenizer_files(
    models: Sequence[Checkpoint], labels: Sequence[str], vocabularies: Sequence[Vocabulary], output: OutputVocabulary, source: int
) -> tuple[dict[str, SideFile], list[str]]:
    """The tokenizer files of the output, and warnings. `source` is the position of the model whose files they are made of."""
    donor = models[source]
    files = {name: file for name, file in donor.files.items() if name in TOKENIZER_FILES}
    ours = vocabularies[source]
    everything, added = {**ours.ids, **ours.beyond}, ours.added
    removed = frozenset(token for token in everything if token not in output.ids)
    if not removed and not output.appended:
        return files, []
    warnings = []
    if removed:
        few = ", ".join(repr(token) for token in sorted(removed, key=lambda token: everything[token])[:3])
        warnings.append(
            f"{labels[source]}: its tokenizer numbers {len(removed):,} tokens beyond its {max(output.ids.values(), default=-1) + 1:,} rows "
            f"({few}); they are left out of the output's tokenizer."
        )
    new = _new_tokens(models, vocabularies, output)
    change = Change(
        output.ids, output.size, new, removed,
        {**{token: settings for token, settings in added.items() if token not in removed},
         **{token.text: token.settings for token in new if token.settings is not None}},
        _merges(models, output, source) if any(token.settings is None for token in new) else [],
    )  # fmt: skip
    warnings += _foreign(models, labels, output, source, new)
    made = dict(files)
    makers = {
        "tokenizer.json": _tokenizer_json, "vocab.json": _vocab_json, "vocab.txt": _vocab_txt, "merges.txt": _merges_txt,
        "tokenizer_config.json": _tokenizer_config, "special_tokens_map.json": _special_tokens_map,
    }  # fmt: skip
    for name, maker in makers.items():
        if name in files:
            made[name] = maker(files, change)
    for name in PIECE_FILES:
        if name in files:
            data, warning = _pieces(name, files, change, everything)
            made = {**made, name: data} if data is not None else {key: file for key, file in made.items() if key != name}
            warnings += warning
    if "added_tokens.json" in files or ("tokenizer.json" not in files and change.added):
        made["added_tokens.json"] = json_text({token: change.ids[token] for token in sorted(change.added, key=change.ids.__getitem__)})
    for name in UNREAD_FILES:
        if made.pop(name, None) is not None:
            warnings.append(f"{name} cannot be made to agree with the output's vocabulary and is left out; the other files are complete.")
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        for role, token in _roles(object_of(files, name) or {}).items():
            if token in removed:
                warnings.append(f"{labels[source]}: {name} calls {token!r} its {role}, which has no row; the output has no {role} there.")
    for name, file in files.items():
        if name in made and isinstance(made[name], bytes) and made[name] == file_bytes(file):
            made[name] = file
    return made, list(dict.fromkeys(warnings))


def _new_tokens(models: Sequence[Checkpoint], vocabularies: Sequence[Vocabulary], output: OutputVocabulary) -> list[NewToken]:
    scores: dict[int, Mapping[str, float]] = {}
    new = []
    for token, owner in output.appended.items():
        if owner is None:
            new.append(NewToken(token, output.ids[token], settings_of({}), None))
            continue
        settings = vocabularies[owner].added.get(token)
        if settings is None and owner not in scores:
            scores[owner] = _scores(models[owner])
        new.append(NewToken(token, output.ids[token], settings, scores[owner].get(token) if settings is None else None))
    return new


def _scores(model: Checkpoint) -> Mapping[str, float]:
    """The scores of the tokens, for kinds of tokenizers that have any."""
    value = tokenizer_json(model)
    if value is not None:
        vocab = value["model"]["vocab"]
        return {str(entry[0]): float(entry[1]) for entry in vocab if len(entry) > 1} if isinstance(vocab, list) else {}
    return {piece.text: piece.score for piece in pieces_of(model) or []}


def _merges_of(model: Checkpoint) -> tuple[str, list[tuple[str, str]]]:
    """(the prefix of continuing subwords, the merges in order of rank) of a BPE tokenizer; nothing for others."""
    value = tokenizer_json(model)
    if value is not None:
        merges = value["model"].get("merges")
        pairs = [_pair(merge) for merge in merges] if isinstance(merges, list) else []
        return value["model"].get("continuing_subword_prefix") or "", [pair for pair in pairs if pair is not None]
    if "merges.txt" in model.files:
        return "", [pair for pair in map(_pair, lines_of(file_bytes(model.files["merges.txt"]))) if pair is not None]
    return "", []


def _pair(merge: Any) -> tuple[str, str] | None:
    parts = merge.split(" ") if isinstance(merge, str) and not merge.startswith("#version") else merge
    if isinstance(parts, list) and len(parts) == 2 and all(isinstance(part, str) and part for part in parts):
        return parts[0], parts[1]
    return None


def _merges(models: Sequence[Checkpoint], output: OutputVocabulary, source: int) -> list[tuple[str, str]]:
    """Merges of the other models, in order, whose parts and result the output has; without them BPE could not build new tokens."""
    prefix, ours = _merges_of(models[source])
    if not ours and not _is_bpe(models[source]):
        return []
    known = set(ours)
    found = []
    for number, model in enumerate(models):
        for a, b in _merges_of(model)[1] if number != source else []:
            whole = a + (b[len(prefix) :] if prefix and b.startswith(prefix) else b)
            if (a, b) not in known and a in output.ids and b in output.ids and whole in output.ids:
                known.add((a, b))
                found.append((a, b))
    return found


def _is_bpe(model: Checkpoint) -> bool:
    value = tokenizer_json(model)
    return (
        value["model"].get("type", "BPE" if "merges" in value["model"] else "") == "BPE"
        if value is not None
        else "merges.txt" in model.files
    )


def _foreign(
    models: Sequence[Checkpoint], labels: Sequence[str], output: OutputVocabulary, source: int, new: Sequence[NewToken]
) -> list[str]:
    """Warnings of ordinary tokens that come from a tokenizer of another kind: they have rows, but text may never be cut into them."""
    warnings = []
    for number, label in enumerate(labels):
        count = sum(token.settings is None and output.appended[token.text] == number for token in new)
        if count and (theirs := _kind(models[number])) != (ours := _kind(models[source])):
            warnings.append(
                f"{label}: {count:,} ordinary tokens are appended to the vocabulary of {labels[source]}, but its tokenizer cuts text "
                f"differently ({theirs} instead of {ours}); they have rows, and text may never be cut into them."
            )
    return warnings


def _kind(model: Checkpoint) -> str:
    value = tokenizer_json(model)
    if value is None:
        return "BPE" if "merges.txt" in model.files else "WordPiece" if "vocab.txt" in model.files else "sentencepiece"
    parts = value.get("pre_tokenizer"), value.get("normalizer")
    names = [part.get("type") for part in parts if isinstance(part, Mapping)]
    return " ".join([str(value["model"].get("type", "tokens")), *map(str, names)])


# -- the files --------------------------------------------------------------------------------------------------------------------


def _tokenizer_json(files: Mapping[str, SideFile], change: Change) -> bytes:
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
        kept = [pair for pair in map(_pair, merges) if pair is not None and not _is_lost(pair, model, change)]
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


def _vocab_json(files: Mapping[str, SideFile], change: Change) -> bytes:
    vocab = {token: number for token, number in (object_of(files, "vocab.json") or {}).items() if token not in change.removed}
    if any(token.settings is None for token in change.new):
        vocab.update(sorted(((token, number) for token, number in change.ids.items() if token not in vocab), key=lambda item: item[1]))
    return json_text(vocab)


def _vocab_txt(files: Mapping[str, SideFile], change: Change) -> bytes:
    data = file_bytes(files["vocab.txt"])
    lines = lines_of(data)
    kept = lines[: _tail((number for number, token in enumerate(lines) if token not in change.removed), len(lines))]
    if any(token.settings is None for token in change.new):
        kept += _beyond(change, len(kept))
    return data if kept == lines else "".join(f"{line}\n" for line in kept).encode()


def _merges_txt(files: Mapping[str, SideFile], change: Change) -> bytes:
    data = file_bytes(files["merges.txt"])
    lines = lines_of(data)
    kept = [line for line in lines if (pair := _pair(line)) is None or not _is_lost(pair, {}, change)]
    new = [" ".join(pair) for pair in change.merges]
    return data if kept == lines and not new else "".join(f"{line}\n" for line in [*kept, *new]).encode()


def _pieces(name: str, files: Mapping[str, SideFile], change: Change, everything: Mapping[str, int]) -> tuple[bytes | None, list[str]]:
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


def _tokenizer_config(files: Mapping[str, SideFile], change: Change) -> bytes:
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


def _special_tokens_map(files: Mapping[str, SideFile], change: Change) -> bytes:
    original = object_of(files, "special_tokens_map.json") or {}
    value = _without_roles(original, change)
    return file_bytes(files["special_tokens_map.json"]) if value == original else json_text(value)


def _roles(value: Mapping[str, Any]) -> dict[str, str]:
    """role -> token string."""
    found = {}
    for role in ROLES:
        entry = value.get(role)
        text = entry.get("content") if isinstance(entry, Mapping) else entry
        if isinstance(text, str):
            found[role] = text
    return found


def _without_roles(value: Mapping[str, Any], change: Change) -> dict[str, Any]:
    lost = {role for role, token in _roles(value).items() if token in change.removed}
    return {key: entry for key, entry in value.items() if key not in lost}


def role_tokens(files: Mapping[str, SideFile]) -> dict[str, str]:
    """role -> token, as tokenizer_config.json and special_tokens_map.json say."""
    return {**_roles(object_of(files, "special_tokens_map.json") or {}), **_roles(object_of(files, "tokenizer_config.json") or {})}
