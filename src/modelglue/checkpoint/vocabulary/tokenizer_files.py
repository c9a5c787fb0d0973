"""The tokenizer files of the output: the source's bytes where nothing changes, else made of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from modelglue.checkpoint.protocol import Checkpoint, SideFile, file_bytes
from modelglue.checkpoint.vocabulary.surgery import (
    Change,
    NewToken,
    merges_txt,
    pair_of,
    pieces_file,
    roles_in,
    special_tokens_map,
    tokenizer_config,
    tokenizer_json_of,
    vocab_json,
    vocab_txt,
)
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
        "tokenizer.json": tokenizer_json_of, "vocab.json": vocab_json, "vocab.txt": vocab_txt, "merges.txt": merges_txt,
        "tokenizer_config.json": tokenizer_config, "special_tokens_map.json": special_tokens_map,
    }  # fmt: skip
    for name, maker in makers.items():
        if name in files:
            made[name] = maker(files, change)
    for name in PIECE_FILES:
        if name in files:
            data, warning = pieces_file(name, files, change, everything)
            made = {**made, name: data} if data is not None else {key: file for key, file in made.items() if key != name}
            warnings += warning
    if "added_tokens.json" in files or ("tokenizer.json" not in files and change.added):
        made["added_tokens.json"] = json_text({token: change.ids[token] for token in sorted(change.added, key=change.ids.__getitem__)})
    for name in UNREAD_FILES:
        if made.pop(name, None) is not None:
            warnings.append(f"{name} cannot be made to agree with the output's vocabulary and is left out; the other files are complete.")
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        for role, token in roles_in(object_of(files, name) or {}).items():
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
        pairs = [pair_of(merge) for merge in merges] if isinstance(merges, list) else []
        return value["model"].get("continuing_subword_prefix") or "", [pair for pair in pairs if pair is not None]
    if "merges.txt" in model.files:
        return "", [pair for pair in map(pair_of, lines_of(file_bytes(model.files["merges.txt"]))) if pair is not None]
    return "", []


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
