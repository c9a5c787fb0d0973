"""Tiny models in memory, whose embedding row says whose it is, with tokenizers of every kind."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, normalizers, pre_tokenizers, trainers
from tokenizers import models as kinds

from modelglue.checkpoint import Checkpoint, TensorsCheckpoint
from tests.checkpoint.files import randn

EMBEDDING, HEAD, BIAS = "model.embed_tokens.weight", "lm_head.weight", "lm_head.bias"
WIDTH = 3

TEXTS = {
    "a": ["the cat sat on the mat", "the cats sat on the mats", "a cat that sat", "that is the cat"],
    "b": ["low lower lowest", "new newer newest", "the newest and the lowest cat", "wide wider widest"],
}


def word_level(ids: Mapping[str, int], added: Sequence[Mapping[str, Any]] = ()) -> bytes:
    """A tokenizer.json of whole words."""
    value = {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": list(added), "normalizer": None,
        "pre_tokenizer": {"type": "WhitespaceSplit"}, "post_processor": None, "decoder": None,
        "model": {"type": "WordLevel", "vocab": dict(ids), "unk_token": "<unk>"},
    }  # fmt: skip
    return json.dumps(value).encode()


def added(content: str, number: int, *, special: bool = True) -> dict[str, Any]:
    return {
        "id": number, "content": content, "single_word": False, "lstrip": False, "rstrip": False, "normalized": not special,
        "special": special,
    }  # fmt: skip


def trained(kind: str, text: str, size: int, specials: Sequence[str] = ("<unk>", "<s>", "</s>")) -> Tokenizer:
    """A tokenizer of a kind, trained on one of TEXTS."""
    if kind == "BPE":
        tokenizer = Tokenizer(kinds.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        trainer: Any = trainers.BpeTrainer(vocab_size=size, special_tokens=list(specials), show_progress=False)
    elif kind == "WordPiece":
        tokenizer = Tokenizer(kinds.WordPiece(unk_token="<unk>"))
        tokenizer.normalizer = normalizers.Lowercase()
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
        tokenizer.decoder = decoders.WordPiece()
        trainer = trainers.WordPieceTrainer(vocab_size=size, special_tokens=list(specials), show_progress=False)
    elif kind == "Unigram":
        tokenizer = Tokenizer(kinds.Unigram())
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
        tokenizer.decoder = decoders.Metaspace()
        trainer = trainers.UnigramTrainer(vocab_size=size, special_tokens=list(specials), unk_token="<unk>", show_progress=False)
    else:
        tokenizer = Tokenizer(kinds.WordLevel(unk_token="<unk>"))
        tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        trainer = trainers.WordLevelTrainer(vocab_size=size, special_tokens=list(specials), show_progress=False)
    tokenizer.train_from_iterator(TEXTS[text] * 3, trainer)
    return tokenizer


def with_added(tokenizer: Tokenizer, *tokens: str, special: bool = True) -> Tokenizer:
    settings = [AddedToken(token, special=special, normalized=False) for token in tokens]
    tokenizer.add_special_tokens(settings) if special else tokenizer.add_tokens(settings)
    return tokenizer


def model(
    ids: Mapping[str, int] | Sequence[str] | bytes,
    rows: int | None = None,
    *,
    seed: int = 1,
    head: bool = True,
    bias: bool = False,
    dtype: torch.dtype = torch.float32,
    files: Mapping[str, Any] | None = None,
    label: str = "",
    width: int = WIDTH,
    added_tokens: Sequence[Mapping[str, Any]] = (),
    **config: Any,
) -> TensorsCheckpoint:
    """A model of this vocabulary (its words in order, word -> id, or a tokenizer.json); `rows` of its tables, by default as needed."""
    if isinstance(ids, bytes):
        text, numbers = ids, list(_ids(ids).values())
    else:
        ids = dict(ids) if isinstance(ids, Mapping) else {token: number for number, token in enumerate(ids)}
        text = word_level(ids, added_tokens)
        numbers = [*ids.values(), *(entry["id"] for entry in added_tokens)]
    rows = max(numbers, default=-1) + 1 if rows is None else rows
    tensors = {
        EMBEDDING: randn(rows, width, seed=seed, dtype=dtype),
        "model.layers.0.norm.weight": randn(width, seed=seed + 1, dtype=dtype),
    }
    if head:
        tensors[HEAD] = randn(rows, width, seed=seed + 2, dtype=dtype)
    if bias:
        tensors[BIAS] = randn(rows, seed=seed + 3, dtype=dtype)
    fields = {"architectures": ["TinyForCausalLM"], "vocab_size": rows, "tie_word_embeddings": not head, **config}
    every = {"tokenizer.json": text, **(files or {})}
    return TensorsCheckpoint(
        tensors,
        {key: value for key, value in fields.items() if value is not None},
        {name: file for name, file in every.items() if file is not None},
        label or f"model{seed}",
    )


def _ids(text: bytes) -> dict[str, int]:
    return dict(Tokenizer.from_str(text.decode()).get_vocab(with_added_tokens=True))


def table(checkpoint: Checkpoint, name: str = EMBEDDING) -> torch.Tensor:
    return checkpoint.tensor(name).clone()
