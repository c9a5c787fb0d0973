"""May these models be merged at all? Asked of headers, configs and tokenizers, before a weight is read."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from modelglue.checkpoint import Checkpoint
from modelglue.errors import MergeError, UserError

#: config fields that change what equal weights compute (RoPE, activation, multipliers)
_FUNCTIONAL = (
    "rope_theta", "rope_scaling", "rope_parameters", "hidden_act", "hidden_activation", "num_attention_heads",
    "num_key_value_heads", "head_dim", "logit_scale", "attention_multiplier", "residual_multiplier", "embedding_multiplier",
)  # fmt: skip


def check_mergeable(checkpoints: Sequence[Checkpoint]) -> None:
    """MergeError unless all models share class and vocabulary. Different functions are the first model's to decide: see `warnings_of`."""
    first = checkpoints[0]
    for other in checkpoints[1:]:
        ours, theirs = _architecture(first), _architecture(other)
        if ours and theirs and ours != theirs:
            raise MergeError(
                f"{_name(other)} is a {theirs} and {_name(first)} a {ours}; one merge takes one architecture. "
                "Leave one of them out, or join them as experts of a mixture."
            )
        a, b = vocabulary(first), vocabulary(other)
        if a is not None and b is not None and a != b:
            different = sorted(token for token in a.keys() | b.keys() if a.get(token) != b.get(token))
            raise MergeError(
                f"{_name(other)} and {_name(first)} number their tokens differently ({len(different)} tokens, among them {different[0]!r}: "
                f"{b.get(different[0])} and {a.get(different[0])}), so their embedding rows do not mean the same. "
                "Align the vocabularies first, or merge models that share a tokenizer."
            )


def warnings_of(checkpoints: Sequence[Checkpoint]) -> list[str]:
    """Differences that do not forbid a merge but change what it means."""
    found = []
    first = checkpoints[0]
    for other in checkpoints[1:]:
        for key in _FUNCTIONAL:
            ours, theirs = first.config.get(key), other.config.get(key)
            if ours != theirs and ours is not None and theirs is not None:
                found.append(f"{_name(other)} has {key} = {theirs}, {_name(first)} has {ours}; the output takes the first one's.")
    return found


def vocabulary(checkpoint: Checkpoint) -> Mapping[str, int] | None:
    """Token string -> id of tokenizer.json (added tokens included), or None where there is none to compare."""
    path = checkpoint.files.get("tokenizer.json")
    if path is None:
        return None
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        tokens = _tokens(value["model"]["vocab"])
        tokens.update({added["content"]: added["id"] for added in value.get("added_tokens", [])})
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: is not a tokenizer file ({error!r}). Restore the model's tokenizer.") from error
    return tokens


def _tokens(vocab: Any) -> dict[str, int]:
    if isinstance(vocab, dict):
        return dict(vocab)
    return {str(entry[0]): number for number, entry in enumerate(vocab)}  # unigram: [token, score] in order


def _architecture(checkpoint: Checkpoint) -> str | None:
    names = checkpoint.config.get("architectures")
    return str(names[0]) if isinstance(names, list) and names else None


def _name(checkpoint: Checkpoint) -> str:
    description = checkpoint.describe()
    return str(description.get("model", f"the {description.get('method')} merge"))
