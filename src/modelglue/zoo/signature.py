"""May two models be merged at all? Signatures answer from headers, config and tokenizer, before a weight is read."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from modelglue.recipe import vocabulary

if TYPE_CHECKING:
    from modelglue.checkpoint import Checkpoint

TokenRelation = Literal["equal", "prefix", "different", "unknown"]

#: field of the structural signature -> the names that configs give it
_STRUCTURE = {
    "layers": ("num_hidden_layers", "n_layer", "num_layers", "n_layers"),
    "hidden size": ("hidden_size", "n_embd", "d_model"),
    "feed-forward size": ("intermediate_size", "n_inner", "ffn_dim", "d_ff"),
    "attention heads": ("num_attention_heads", "n_head", "n_heads"),
    "key/value heads": ("num_key_value_heads",),
    "head size": ("head_dim",),
    "experts": ("num_local_experts", "num_experts", "n_routed_experts"),
}
#: fields that change what equal weights compute
_FUNCTION = {
    "activation": ("hidden_act", "hidden_activation", "activation_function"),
    "parallel residual": ("use_parallel_residual",),
    "experts per token": ("num_experts_per_tok",),
    "logit scaling": ("logit_scale", "logits_scaling"),
    "logit cap": ("final_logit_softcapping",),
    "attention cap": ("attn_logit_softcapping",),
    "attention multiplier": ("attention_multiplier", "query_pre_attn_scalar"),
    "residual multiplier": ("residual_multiplier",),
    "embedding multiplier": ("embedding_multiplier",),
}
#: fields that are worth a word but no separation
_SOFT = {
    "norm epsilon": ("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "layernorm_epsilon"),
    "sliding window": ("sliding_window",),
    "maximum length": ("max_position_embeddings", "n_positions"),
    "tied head": ("tie_word_embeddings",),
    "training dtype": ("dtype", "torch_dtype"),
}
#: what a model class means when its config does not say (else 10000)
_ROPE_BASE = {"mixtral": 1e6, "llama4_text": 5e5, "gpt_oss": 1.5e5}

_IN_LAYER = re.compile(r"\.\d+\.")
_VOCABULARY_TENSOR = re.compile(
    r"(?:^|\.)(?:embed_tokens|tok_embeddings|word_embeddings|wte|embed_in|embed_out|lm_head|shared|output)\.(?:weight|bias)$"
)


@dataclass(frozen=True)
class Signature:
    """What decides whether two models may be compared and merged.

    `architecture` and `tensors` together are the structural signature: a difference forbids merging. `function` are
    settings that change what equal weights compute. `tokens` maps token string to id (None: no tokenizer file). `soft`
    differences only deserve a warning.
    """

    architecture: Mapping[str, Any]
    tensors: Mapping[str, tuple[int, ...]]
    function: Mapping[str, Any]
    tokens: Mapping[str, int] | None
    soft: Mapping[str, Any]

    def same_structure(self, other: Signature) -> bool:
        """Whether class, sizes and all tensors but embedding and head agree."""
        return self.architecture == other.architecture and self.tensors == other.tensors

    def same_function(self, other: Signature) -> bool:
        """Whether equal weights would compute equal outputs."""
        return self.function == other.function

    def token_relation(self, other: Signature) -> TokenRelation:
        """Equal, one vocabulary the beginning of the other, different, or unknown where a tokenizer file is missing."""
        if self.tokens is None or other.tokens is None:
            return "unknown"
        if self.tokens == other.tokens:
            return "equal"
        small, large = sorted((self.tokens, other.tokens), key=len)
        extra = [number for token, number in large.items() if token not in small]
        is_prefix = small.items() <= large.items() and min(extra) > max(small.values(), default=-1)
        return "prefix" if is_prefix else "different"

    def differences(self, other: Signature) -> dict[str, list[str]]:
        """In words, by kind: structural, functional, token, soft. For messages."""
        tensors = [
            f"tensor {name}: {_shape(self.tensors.get(name))} and {_shape(other.tensors.get(name))}"
            for name in sorted(self.tensors.keys() | other.tensors.keys())
            if self.tensors.get(name) != other.tensors.get(name)
        ]
        relation = self.token_relation(other)
        return {
            "structural": _unequal(self.architecture, other.architecture) + tensors,
            "functional": _unequal(self.function, other.function),
            "token": [] if relation in ("equal", "unknown") else [f"vocabulary: {relation}"],
            "soft": _unequal(self.soft, other.soft),
        }


def signature(checkpoint: Checkpoint) -> Signature:
    """The signature of a model, from headers, config.json and tokenizer.json; knows no list of architectures."""
    config = _text_config(checkpoint.config)
    rows = config.get("vocab_size")
    tensors = {name: checkpoint.info(name).shape for name in checkpoint.names()}
    return Signature(
        architecture=architecture(checkpoint),
        tensors={name: shape for name, shape in tensors.items() if not is_vocabulary_tensor(name, shape, rows)},
        function={"rope": _rope(config), **{field: _first(config, keys) for field, keys in _FUNCTION.items()}},
        tokens=vocabulary(checkpoint),
        soft={field: _first(config, keys) for field, keys in _SOFT.items()},
    )


def architecture(checkpoint: Checkpoint) -> dict[str, Any]:
    """Class and sizes from the config; values are None where it does not say."""
    config = _text_config(checkpoint.config)
    names = checkpoint.config.get("architectures")
    sizes = {field: _first(config, keys) for field, keys in _STRUCTURE.items()}
    heads, width = sizes["attention heads"], sizes["hidden size"]
    if sizes["key/value heads"] is None:
        sizes["key/value heads"] = heads
    if sizes["head size"] is None and isinstance(heads, int) and isinstance(width, int) and heads:
        sizes["head size"] = width // heads
    return {"class": str(names[0]) if isinstance(names, list) and names else None, **sizes}


def is_vocabulary_tensor(name: str, shape: Sequence[int], rows: Any) -> bool:
    """Token embedding or output head: by its usual name, or as a matrix outside the layers with one row per token."""
    if _IN_LAYER.search(name):
        return False
    return bool(_VOCABULARY_TENSOR.search(name)) or (len(shape) == 2 and shape[0] == rows)


def groups(
    signatures: Sequence[Signature], *, allow_config_mismatch: bool = False, allow_vocabulary_mismatch: bool = False
) -> list[list[int]]:
    """Split model indices into groups inside which families may form; groups and members keep the order of the list.

    Structural differences always separate. Functional ones do unless `allow_config_mismatch`. Different vocabularies do
    unless `allow_vocabulary_mismatch`, because a merge does not align embedding rows (yet) and would be refused.
    A model joins the first group all of whose members it fits.
    """

    def fits(a: Signature, b: Signature) -> bool:
        return (
            a.same_structure(b)
            and (allow_config_mismatch or a.same_function(b))
            and (allow_vocabulary_mismatch or a.token_relation(b) in ("equal", "unknown"))
        )

    found: list[list[int]] = []
    for number, one in enumerate(signatures):
        for group in found:
            if all(fits(one, signatures[member]) for member in group):
                group.append(number)
                break
        else:
            found.append([number])
    return found


def config_warnings(signatures: Sequence[Signature], labels: Sequence[str]) -> list[str]:
    """Differences from the first model that do not forbid a merge but change what it means; ask it for one family."""
    found = []
    for label, other in zip(labels[1:], signatures[1:], strict=True):
        differences = signatures[0].differences(other)
        found += [
            f"'{labels[0]}' and '{label}' differ in {what}; a merge takes the first one's."
            for what in differences["functional"] + differences["soft"]
        ]
    return found


def _text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The language model's part of a composed config."""
    inner = config.get("text_config")
    return {**config, **inner} if isinstance(inner, Mapping) else config


def _first(config: Mapping[str, Any], keys: Sequence[str]) -> Any:
    return next((config[key] for key in keys if config.get(key) is not None), None)


def _rope(config: Mapping[str, Any]) -> Any:
    """Rotary settings in one spelling, whether the config writes rope_theta and rope_scaling or rope_parameters."""
    given = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(given, Mapping):
        return repr(given)
    base = next((config[key] for key in ("rope_theta", "rotary_emb_base") if config.get(key) is not None), None)
    if base is None:
        base = _ROPE_BASE.get(str(config.get("model_type")), 10000.0)

    def plain(value: Mapping[str, Any]) -> dict[str, Any]:
        result = {("rope_type" if key == "type" else key): inner for key, inner in value.items() if inner is not None}
        result.pop("partial_rotary_factor", None)  # added to every spelling below
        result.setdefault("rope_theta", base)
        result["rope_theta"] = float(result["rope_theta"])
        if result.get("rope_type") == "default":
            del result["rope_type"]
        return result

    nested = {key: plain(value) for key, value in given.items() if isinstance(value, Mapping)}
    share = given.get("partial_rotary_factor") or _first(config, ("partial_rotary_factor", "rotary_pct"))
    settings: dict[str, Any] = nested or plain(given)
    if share is not None:
        settings["share"] = share
    return json.loads(json.dumps(settings, sort_keys=True))


def _unequal(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[str]:
    return [f"{field} ({ours.get(field)} and {theirs.get(field)})" for field in ours if ours.get(field) != theirs.get(field)]


def _shape(shape: tuple[int, ...] | None) -> str:
    return "absent" if shape is None else " x ".join(map(str, shape)) or "scalar"
