"""Which tensors a similarity looks at: attention and feed-forward weights; never embedding, head or norms."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Literal

from modelglue.checkpoint import FLOATING, Checkpoint
from modelglue.errors import CheckpointError, UserError

if TYPE_CHECKING:
    from collections.abc import Sequence

Scope = Literal["all", "attn", "mlp"]

#: parts of a tensor's name, in lower case, that tell what it belongs to
_PARTS = {
    "attn": ("self_attn", "attn", "attention", "self_attention", "selfattention", "linear_attn"),
    "mlp": ("mlp", "ffn", "feed_forward", "feedforward", "block_sparse_moe", "densereludense"),
}
_IN_LAYER = re.compile(r"\.\d+\.")
#: stored by some models beside their weights: rotary frequencies and masks
_BUFFER = re.compile(r"(?:inv_freq|masked_bias|attn\.bias|attention\.bias)$")


def role(name: str) -> str | None:
    """ "attn", "mlp", or None for everything else."""
    for part in name.lower().split("."):
        for found, words in _PARTS.items():
            if part in words:
                return found
    return None


def counted_tensors(checkpoints: Sequence[Checkpoint], labels: Sequence[str], scope: Scope) -> list[list[str]]:
    """Names of the counted tensors of every model, sorted; the models share one architecture.

    Where names do not tell attention from feed-forward, scope `all` takes every matrix inside a layer. UserError
    if nothing is left to compare, CheckpointError for weights that are not stored as floating-point numbers.
    """
    usable = [_weights(checkpoint, label) for checkpoint, label in zip(checkpoints, labels, strict=True)]
    roles = {role(name) for names in usable for name in names} - {None}
    if scope == "all" and roles == {"attn", "mlp"}:
        found = [[name for name in names if role(name) is not None] for names in usable]
    elif scope == "all":
        found = [
            [name for name in names if _IN_LAYER.search(name) and len(checkpoint.info(name).shape) > 1]
            for checkpoint, names in zip(checkpoints, usable, strict=True)
        ]
    else:
        found = [[name for name in names if role(name) == scope] for names in usable]
    for label, names in zip(labels, found, strict=True):
        if not names:
            remedy = "Give a model with numbered layers." if scope == "all" else "Use scope: all."
            raise UserError(f"{label}: has no tensor that a similarity of scope '{scope}' looks at. {remedy}")
    return found


def _weights(checkpoint: Checkpoint, label: str) -> list[str]:
    found = []
    for name in sorted(checkpoint.names()):
        info = checkpoint.info(name)
        if info.dtype in FLOATING and info.numel and not (_BUFFER.search(name) and not _is_vector(info.shape, name)):
            found.append(name)
        elif info.dtype not in FLOATING and name.endswith("weight") and role(name):
            raise CheckpointError(
                f"{label}: tensor '{name}' is stored as {info.dtype}, allowed are {', '.join(sorted(FLOATING))}. "
                "Dequantise the model first."
            )
    return found


def _is_vector(shape: Sequence[int], name: str) -> bool:
    """A real bias, as opposed to a mask of the same name."""
    return len(shape) == 1 and not name.endswith(("inv_freq", "masked_bias"))
