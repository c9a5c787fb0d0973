"""May these models be merged at all? Asked of headers, configs and tokenizers, before a weight is read."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from modelglue.checkpoint import Checkpoint, file_bytes, file_place
from modelglue.errors import MergeError, UserError

#: config fields that change what equal weights compute (activation, heads, multipliers); the rotary ones are compared in `_rope`
_FUNCTIONAL = (
    "hidden_act", "hidden_activation", "num_attention_heads", "num_key_value_heads", "head_dim", "logit_scale",
    "attention_multiplier", "residual_multiplier", "embedding_multiplier",
)  # fmt: skip


def check_mergeable(checkpoints: Sequence[Checkpoint]) -> None:
    """MergeError unless all models share class and vocabulary. Different functions are the first model's to decide: see `warnings_of`."""
    first = checkpoints[0]
    for other in checkpoints[1:]:
        ours, theirs = architecture(first), architecture(other)
        if ours and theirs and ours != theirs:
            raise MergeError(
                f"{_name(other)} is a {theirs} and {_name(first)} a {ours}; one merge takes one architecture. "
                "Leave one of them out, or join them as experts of a mixture."
            )
        a, b = (None, None) if _same_tokenizer_file(first, other) else (vocabulary(first), vocabulary(other))
        if a is not None and b is not None and a != b:
            different = sorted(token for token in a.keys() | b.keys() if a.get(token) != b.get(token))
            raise MergeError(
                f"{_name(other)} and {_name(first)} number their tokens differently ({len(different)} tokens, among them {different[0]!r}: "
                f"{b.get(different[0])} and {a.get(different[0])}), so their embedding rows do not mean the same. "
                "Align the vocabularies first, or merge models that share a tokenizer."
            )


def warnings_of(checkpoints: Sequence[Checkpoint]) -> list[str]:
    """Differences that do not forbid a merge but change what it means. The output takes after the first checkpoint."""
    found = []
    first = checkpoints[0]
    for other in checkpoints[1:]:
        ours, theirs = _function(first.config), _function(other.config)
        for key in ours:
            if ours[key] != theirs[key] and ours[key] is not None and theirs[key] is not None:
                found.append(f"{_name(other)} has {key} = {theirs[key]}, {_name(first)} has {ours[key]}; the output takes the first one's.")
    return found


def _function(config: Mapping[str, Any]) -> dict[str, Any]:
    """What equal weights compute under this config; None where the config does not say."""
    return {**{key: config.get(key) for key in _FUNCTIONAL}, **_rope(config)}


def _rope(config: Mapping[str, Any]) -> dict[str, Any]:
    """The rotary settings, written as rope_theta and rope_scaling or together as rope_parameters. No scaling is a setting as well."""
    given = config.get("rope_parameters") or config.get("rope_scaling")
    given = given if isinstance(given, Mapping) else {}
    scaling = {key.replace("rope_type", "type"): value for key, value in given.items() if key != "rope_theta" and value is not None}
    if not config:
        return {"rope_theta": None, "rope_scaling": None}
    return {
        "rope_theta": given.get("rope_theta", config.get("rope_theta")),
        "rope_scaling": "none" if scaling.get("type", "default") == "default" else dict(sorted(scaling.items())),
    }


def _same_tokenizer_file(first: Checkpoint, other: Checkpoint) -> bool:
    """Whether both have the same bytes, which siblings mostly do: parsing a large vocabulary takes a tenth of a second."""
    ours, theirs = first.files.get("tokenizer.json"), other.files.get("tokenizer.json")
    return ours is not None and theirs is not None and file_bytes(ours) == file_bytes(theirs)


def vocabulary(checkpoint: Checkpoint) -> Mapping[str, int] | None:
    """Token string -> id of tokenizer.json (added tokens included), or None where there is none to compare."""
    file = checkpoint.files.get("tokenizer.json")
    if file is None:
        return None
    try:
        value = json.loads(file_bytes(file).decode())
        tokens = _tokens(value["model"]["vocab"])
        tokens.update({added["content"]: added["id"] for added in value.get("added_tokens", [])})
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise UserError(
            f"{file_place('tokenizer.json', file)}: is not a tokenizer file ({error!r}). Restore the model's tokenizer."
        ) from error
    return tokens


def _tokens(vocab: Any) -> dict[str, int]:
    if isinstance(vocab, dict):
        return dict(vocab)
    return {str(entry[0]): number for number, entry in enumerate(vocab)}  # unigram: [token, score] in order


def architecture(checkpoint: Checkpoint) -> str | None:
    """The model class that the config names, or None."""
    names = checkpoint.config.get("architectures")
    return str(names[0]) if isinstance(names, list) and names else None


def _name(checkpoint: Checkpoint) -> str:
    description = checkpoint.describe()
    return str(description.get("model", f"the {description.get('method')} merge"))
