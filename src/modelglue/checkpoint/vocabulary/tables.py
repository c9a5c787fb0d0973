"""Which tensors have one row per token: the embedding, the output head and its bias, told from names, shapes and the config."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from modelglue.checkpoint.protocol import Checkpoint
from modelglue.checkpoint.remembered import once_per_checkpoint
from modelglue.checkpoint.tensor_names import layer_of

#: configs of models with several towers keep the language model's fields in one of these
LANGUAGE_CONFIGS = ("text_config", "llm_config", "language_config")

_POSITIONS = re.compile(r"position|(?:^|\.)(?:wpe|pos_embed\w*|embed_pos\w*)(?:\.|$)|token_type|segment")
_EMBEDDING = re.compile(
    r"(?:^|\.)(?:embed_tokens|tok_embeddings|word_embeddings?|wte|embed_in|shared|token_embedding|tokens_embed|embeddings?|embed)(?:\.weight)?$"
)
_HEAD = re.compile(
    r"(?:^|\.)(?:lm_head|embed_out|output|decoder|output_layer|lm_loss|pred_layer\.proj|vocab_projector|generator_lm_head|generator|head)"
    r"(?:\.weight)?$"
)
_HEAD_BIAS = re.compile(
    r"(?:^|\.)(?:lm_head|embed_out|output|decoder|output_layer|lm_loss|pred_layer\.proj|vocab_projector|generator_lm_head|predictions)\.bias$"
)
#: where encoder-decoder models with a shared table keep it, and where else it may stand
_PREFERRED = ("shared", "decoder.embed_tokens", "embed_tokens")


@dataclass(frozen=True)
class Tables:
    """The tensors of a checkpoint that have one row per token."""

    #: rows of each of them; 0 where there is no such tensor
    rows: int
    #: ids below this have a row that means something: the config's vocab_size, or the rows where it says nothing
    limit: int
    #: all of them, sorted: 2-D tables, 1-D head biases
    names: tuple[str, ...]
    #: the input embedding, None if there is none or it cannot be told
    embedding: str | None
    #: the 2-D ones that are no input embedding
    heads: tuple[str, ...]


def config_rows(config: Mapping[str, Any]) -> int | None:
    """The config's vocab_size, of the language model where there are several towers; None where it says nothing."""
    for part in (config, *(config.get(key) for key in LANGUAGE_CONFIGS)):
        rows = part.get("vocab_size") if isinstance(part, Mapping) else None
        if isinstance(rows, int) and not isinstance(rows, bool) and rows > 0:
            return rows
    return None


@once_per_checkpoint
def tables_of(checkpoint: Checkpoint) -> Tables:
    """Find the tables of a checkpoint; headers only.

    A table is a matrix outside the layers whose first dimension is the config's vocab_size; where no tensor has that many rows, or the
    config says nothing, the embedding is known by its usual names. Tables of positions are none. If a token's row is as
    long as the table is high, only usual names count, because then any square matrix would look like one.
    """
    outside = {name: checkpoint.info(name).shape for name in checkpoint.names() if layer_of(name) is None}
    matrices = {name: shape for name, shape in outside.items() if len(shape) == 2 and not _POSITIONS.search(name)}
    named = {name: shape[0] for name, shape in matrices.items() if _EMBEDDING.search(name)}
    claimed = config_rows(checkpoint.config)
    if claimed is not None and (any(rows == claimed for rows in named.values()) or not named):
        rows = claimed
    else:
        rows = max(named.values(), default=0)
    widths = {shape[1] for name, shape in matrices.items() if name in named and shape[0] == rows}
    usual_only = rows in widths

    def counts(name: str, shape: tuple[int, ...]) -> bool:
        return shape[0] == rows and (name in named or bool(_HEAD.search(name)) or (not usual_only and shape[1] != rows))

    found = sorted(name for name, shape in matrices.items() if counts(name, shape))
    embeddings = [name for name in found if name in named]
    heads = tuple(name for name in found if name not in named)
    if not embeddings and len(heads) == 1 and not _HEAD.search(heads[0]):
        embeddings, heads = [heads[0]], ()
    biases = [
        name
        for name, shape in outside.items()
        if (shape == (rows,) and (_HEAD_BIAS.search(name) or (name.endswith("bias") and not usual_only)))
        or (shape == (1, rows) and lies_flat(name))
    ]
    names = tuple(sorted([*embeddings, *heads, *biases])) if rows else ()
    limit = rows if claimed is None else min(claimed, rows)
    return Tables(rows if names else 0, limit if names else 0, names, _input_embedding(embeddings), heads if names else ())


def lies_flat(name: str) -> bool:
    """Whether a table is the bias that BART keeps as one row of all tokens."""
    return name.endswith("logits_bias")


def is_head(name: str) -> bool:
    """Whether a table's name says that it is an output head."""
    return not _EMBEDDING.search(name)


def _input_embedding(names: list[str]) -> str | None:
    """The table that an untouched head would be tied to."""
    for ending in _PREFERRED:
        for name in names:
            if name.removesuffix(".weight").endswith(ending):
                return name
    return names[0] if names else None
