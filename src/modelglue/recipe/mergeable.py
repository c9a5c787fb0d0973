"""May these models be merged at all? Asked of headers, configs and tokenizers, before a weight is read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from modelglue.checkpoint import Checkpoint, quantisation_of
from modelglue.checkpoint.engine.fit import label_of
from modelglue.checkpoint.vocabulary import all_tokens, check_vocabularies
from modelglue.errors import MergeError

#: config fields that change what equal weights compute (activation, heads, multipliers); the rotary ones are compared in `_rope`
_FUNCTIONAL = (
    "hidden_act", "hidden_activation", "num_attention_heads", "num_key_value_heads", "head_dim", "logit_scale",
    "attention_multiplier", "residual_multiplier", "embedding_multiplier",
)  # fmt: skip


def check_mergeable(checkpoints: Sequence[Checkpoint]) -> None:
    """MergeError unless all models share class and vocabulary. Different functions are the first model's to decide: see `warnings_of`."""
    check_architectures(checkpoints)
    check_vocabularies(checkpoints, None, [label_of(checkpoint) for checkpoint in checkpoints])


def check_architectures(checkpoints: Sequence[Checkpoint]) -> None:
    """MergeError for quantised models, and unless all models whose configs name a class name the same one."""
    quantised = [f"{label_of(model)} {what}" for model in checkpoints if (what := quantisation_of(model)) is not None]
    if quantised:
        raise MergeError("\n".join(dict.fromkeys(quantised)))
    first = checkpoints[0]
    for other in checkpoints[1:]:
        ours, theirs = architecture(first), architecture(other)
        if ours and theirs and ours != theirs:
            raise MergeError(
                f"{label_of(other)} is a {theirs} and {label_of(first)} a {ours}; one merge takes one architecture. "
                "Leave one of them out, join them as experts of a mixture, or say allow_mixed: true if their tensors fit."
            )


def warnings_of(checkpoints: Sequence[Checkpoint]) -> list[str]:
    """What does not forbid a merge but changes what it means: of each model, and where models differ. The output takes after the first."""
    found = [warning for checkpoint in checkpoints for warning in checkpoint.warnings]
    if not checkpoints[0].config and any(checkpoint.config for checkpoint in checkpoints):
        found.append(f"{label_of(checkpoints[0])} has no config.json, so the output has none. Put one there, or name another model first.")
    return found + different_functions(checkpoints, [label_of(checkpoint) for checkpoint in checkpoints])


def different_functions(checkpoints: Sequence[Checkpoint], labels: Sequence[str]) -> list[str]:
    """Where the configs of models say that equal weights compute something else than in the first."""
    found = []
    for other, label in zip(checkpoints[1:], labels[1:], strict=True):
        ours, theirs = _function(checkpoints[0].config), _function(other.config)
        for key in ours:
            if ours[key] != theirs[key] and ours[key] is not None and theirs[key] is not None:
                found.append(f"{label} has {key} = {theirs[key]}, {labels[0]} has {ours[key]}; the output takes the first one's.")
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


def vocabulary(checkpoint: Checkpoint) -> Mapping[str, int] | None:
    """Token string -> id of the tokenizer (added tokens included), or None where there is none to compare."""
    found = all_tokens(checkpoint)
    return None if found is None else found[0]


def architecture(checkpoint: Checkpoint) -> str | None:
    """The model class that the config names, or None."""
    names = checkpoint.config.get("architectures")
    return str(names[0]) if isinstance(names, list) and names else None
