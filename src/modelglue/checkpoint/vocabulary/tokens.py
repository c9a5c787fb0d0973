"""The tokens of a checkpoint: token string -> id, and how its tokenizer treats those that were added. The files are a stranger's."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from modelglue.checkpoint.formats.header import MAX_HEADER_BYTES, is_text, parse_object, shown
from modelglue.checkpoint.protocol import Checkpoint, SideFile, file_bytes, file_place
from modelglue.checkpoint.vocabulary.pieces import Piece, read_pieces
from modelglue.checkpoint.vocabulary.tables import Tables, tables_of
from modelglue.errors import CheckpointError

#: sentencepiece models by the names that model folders give them
PIECE_FILES = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "spm.model")
#: vocabularies in formats that are not read; they are copied where nothing changes
UNREAD_FILES = (
    "tekken.json", "tiktoken.model", "qwen.tiktoken", "source.spm", "target.spm", "bpe.codes", "dict.txt", "tokenizer.model.v1",
    "tokenizer.model.v2", "tokenizer.model.v3",
)  # fmt: skip
#: everything that says which tokens there are
VOCABULARY_FILES = ("tokenizer.json", "vocab.json", "merges.txt", "vocab.txt", *PIECE_FILES, "added_tokens.json", *UNREAD_FILES)
#: chat templates that stand in a file of their own
TEMPLATE_FILES = ("chat_template.jinja", "chat_template.json")
#: what belongs to a tokenizer besides
TOKENIZER_FILES = (*VOCABULARY_FILES, "tokenizer_config.json", "special_tokens_map.json", *TEMPLATE_FILES, "normalizer.json")

_LARGEST_ID = 2**31
SETTINGS = ("single_word", "lstrip", "rstrip", "normalized", "special")


@dataclass(frozen=True)
class Vocabulary:
    """What a checkpoint's tokenizer numbers."""

    #: token -> id, for ids that have a row
    ids: Mapping[str, int]
    #: token -> its settings as an added token (single_word, lstrip, rstrip, normalized, special); ordinary tokens are not here
    added: Mapping[str, Mapping[str, bool]] = field(default_factory=dict)
    #: token -> id, for ids beyond the config's vocab_size: they have no row
    beyond: Mapping[str, int] = field(default_factory=dict)


def vocabulary(checkpoint: Checkpoint, tables: Tables | None = None) -> Vocabulary | None:
    """The vocabulary of a checkpoint, or None where there is no tokenizer. Ids without a row are set apart.

    Reads, in this order, tokenizer.json; vocab.json; vocab.txt; a sentencepiece model; and the added tokens that stand in
    added_tokens.json or tokenizer_config.json. CheckpointError names a file that is damaged.
    """
    found = all_tokens(checkpoint)
    if found is None:
        return None
    ids, added = found
    limit = (tables or tables_of(checkpoint)).limit or _LARGEST_ID
    inside = {token: number for token, number in ids.items() if number < limit}
    return Vocabulary(inside, added, {token: number for token, number in ids.items() if number >= limit})


def all_tokens(checkpoint: Checkpoint) -> tuple[dict[str, int], dict[str, Mapping[str, bool]]] | None:
    """(token -> id, token -> settings of an added token), rows or no rows; None where no file says."""
    files = checkpoint.files
    added: dict[str, Mapping[str, bool]] = {}
    if "tokenizer.json" in files:
        ids = _read("tokenizer.json", files, lambda data: _tokenizer_json(parse_object(data, unique=False), added))
    elif "vocab.json" in files:
        ids = _read("vocab.json", files, lambda data: _numbered(parse_object(data, unique=False)))
    elif "vocab.txt" in files:
        ids = _read("vocab.txt", files, lambda data: {token: number for number, token in enumerate(lines_of(data))})
    elif name := next((name for name in PIECE_FILES if name in files), None):
        ids = _read(name, files, lambda data: {piece.text: number for number, piece in enumerate(read_pieces(data))})
    else:
        return None
    for token, number, settings in _added_beside(files):
        if token not in ids:
            ids[token] = number
            added[token] = settings
        elif token not in added and "tokenizer.json" not in files:
            added[token] = settings
    if bad := next((token for token in ids if not is_text(token)), None):
        name = next(name for name in VOCABULARY_FILES if name in files)
        raise _damaged(name, files[name], f"token {shown(bad)} is not Unicode text")
    return ids, added


def unread(checkpoint: Checkpoint) -> str | None:
    """Why the vocabulary of a checkpoint is not known though it has one; None if that is not so."""
    name = next((name for name in UNREAD_FILES if name in checkpoint.files), None)
    if name is None or all_tokens(checkpoint) is not None:
        return None
    return (
        f"{file_place(name, checkpoint.files[name])}: the vocabulary stands in a {name} only, which is not read. "
        "Save the model's tokenizer with transformers (it writes a tokenizer.json), or put its tokenizer.json into the folder."
    )


def pieces_of(checkpoint: Checkpoint) -> list[Piece] | None:
    """The pieces of the sentencepiece model in the folder, in the order of their ids; None if there is none."""
    name = next((name for name in PIECE_FILES if name in checkpoint.files), None)
    return None if name is None else _read(name, checkpoint.files, read_pieces)


def tokenizer_json(checkpoint: Checkpoint) -> dict[str, Any] | None:
    """The parsed tokenizer.json, None if there is none."""
    return object_of(checkpoint.files, "tokenizer.json")


def object_of(files: Mapping[str, SideFile], name: str) -> dict[str, Any] | None:
    """A side file that is a JSON object, None if it is not there."""
    return _read(name, files, lambda data: parse_object(data, unique=False)) if name in files else None


def same_files(a: Checkpoint, b: Checkpoint) -> bool:
    """Whether both keep the same bytes, which siblings mostly do: parsing a large vocabulary takes a tenth of a second."""
    names = [name for name in VOCABULARY_FILES if name in a.files or name in b.files]
    if not names or any(name not in a.files or name not in b.files for name in names):
        return False
    return all(file_bytes(a.files[name]) == file_bytes(b.files[name]) for name in names)


def lines_of(data: bytes) -> list[str]:
    """The lines of a vocab.txt or merges.txt; only newlines end one, because other separators may be tokens."""
    lines = data.decode("utf-8").replace("\r\n", "\n").split("\n")
    return lines[:-1] if lines and not lines[-1] else lines


def settings_of(value: Mapping[str, Any]) -> dict[str, bool]:
    """The settings of an added token, with the defaults that the tokenizers library has."""
    special = bool(value.get("special", False))
    defaults = {"normalized": not special, "special": special}
    return {name: bool(value.get(name, defaults.get(name, False))) for name in SETTINGS}


def _read(name: str, files: Mapping[str, SideFile], parse: Any) -> Any:
    file = files[name]
    data = file_bytes(file)
    if len(data) > MAX_HEADER_BYTES:
        raise _damaged(name, file, f"it is {len(data):,} bytes long, allowed are {MAX_HEADER_BYTES:,}")
    try:
        return parse(data)
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise _damaged(name, file, str(error) if isinstance(error, ValueError) else repr(error)) from error


def _damaged(name: str, file: SideFile, what: str) -> CheckpointError:
    return CheckpointError(f"{file_place(name, file)}: is not a tokenizer file ({what}). Restore the model's tokenizer.")


def _tokenizer_json(value: Mapping[str, Any], added: dict[str, Mapping[str, bool]]) -> dict[str, int]:
    vocab = value["model"]["vocab"]
    # unigram: [token, score] in the order of ids
    ids = {_text(entry[0]): number for number, entry in enumerate(vocab)} if isinstance(vocab, list) else _numbered(vocab)
    for entry in value.get("added_tokens") or []:
        ids[_text(entry["content"])] = _id(entry["id"])
        added[entry["content"]] = settings_of(entry)
    return ids


def _added_beside(files: Mapping[str, SideFile]) -> list[tuple[str, int, dict[str, bool]]]:
    """Added tokens that stand outside tokenizer.json, as (token, id, settings)."""
    found: list[tuple[str, int, dict[str, bool]]] = []

    def decoder(data: bytes) -> None:
        for number, entry in (parse_object(data, unique=False).get("added_tokens_decoder") or {}).items():
            found.append((_text(entry["content"]), _id(int(number)), settings_of(entry)))

    if "tokenizer_config.json" in files:
        _read("tokenizer_config.json", files, decoder)
    if "added_tokens.json" in files:
        for token, number in _read("added_tokens.json", files, lambda data: _numbered(parse_object(data, unique=False))).items():
            found.append((token, number, settings_of({})))
    return found


def _numbered(vocab: Any) -> dict[str, int]:
    if not isinstance(vocab, dict):
        raise TypeError(f"the vocabulary is {type(vocab).__name__}, not an object of ids")
    return {token: _id(number) for token, number in vocab.items()}


def _id(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < _LARGEST_ID:
        raise ValueError(f"{shown(value)} is not the id of a token")
    return value


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{shown(value)} is not a token")
    return value


def json_text(value: Any) -> bytes:
    """A small JSON file as transformers lays it out: order kept, two spaces, no escapes."""
    return json.dumps(value, indent=2, ensure_ascii=False).encode()
