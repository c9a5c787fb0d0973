"""A dense model whose feed-forward networks may become experts of a mixture that transformers has a class for.

Models are read through one set of names, those of Llama; Phi-3's fused projections are cut apart. What a config leaves to its class
(rotary base, head width, window) is asked of the class, because the class of the mixture has other defaults.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from modelglue.checkpoint import Checkpoint, RenamedCheckpoint, SideFile
from modelglue.errors import CheckpointError
from modelglue.mixture.exports.pieced import Piece, PiecedCheckpoint, rows_of, whole
from modelglue.models.build import check_claims

#: model types whose parts mean what Llama's mean, by what their mixtures have in common
FAMILIES: Mapping[str, str] = {"llama": "llama", "mistral": "llama", "phi3": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "olmo2": "olmo2"}
FFN = ("gate", "up", "down")
OTHERWISE = "a mixture at the level model takes any model, and one in a folder with its own modelling code any decoder"
_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)")
_OUTSIDE = ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight")


@dataclass(frozen=True)
class Dense:
    """A model with Llama's names. `facts` is its config with everything that its class would add."""

    label: str
    checkpoint: Checkpoint
    facts: Mapping[str, Any]
    config: Mapping[str, Any]
    """config.json as it is."""
    files: Mapping[str, SideFile]
    vocabulary: int
    """Rows of its token embedding."""

    @property
    def kind(self) -> str:
        return str(self.config["model_type"])

    @property
    def family(self) -> str:
        return FAMILIES[self.kind]

    @property
    def layers(self) -> int:
        return int(self.facts["num_hidden_layers"])

    @property
    def width(self) -> int:
        return self.checkpoint.info(self.ffn(0, "gate")).shape[1]

    @property
    def inner(self) -> int:
        """Width of the feed-forward network."""
        return self.checkpoint.info(self.ffn(0, "gate")).shape[0]

    @property
    def heads(self) -> tuple[int, int, int]:
        """(query heads, key and value heads, width of a head)."""
        heads = int(self.facts["num_attention_heads"])
        return heads, int(self.facts.get("num_key_value_heads") or heads), int(self.facts.get("head_dim") or self.width // heads)

    @property
    def rope(self) -> dict[str, Any]:
        """Rotary parameters in transformers' present words: rope_theta, rope_type and what that type needs."""
        return dict(self.facts.get("rope_parameters") or {})

    @property
    def scaled_rope(self) -> bool:
        return str(self.rope.get("rope_type", "default")) != "default"

    @property
    def window(self) -> int | None:
        """Positions that attention looks back in all layers; None: all of them."""
        kinds = set(self.facts.get("layer_types") or ["sliding_attention"])
        return None if kinds == {"full_attention"} else self.facts.get("sliding_window") or None

    @property
    def mixed_window(self) -> bool:
        """Whether some layers look back further than others."""
        return len(set(self.facts.get("layer_types") or [])) > 1

    @cached_property
    def suffixes(self) -> tuple[str, ...]:
        """What stands in a layer beside the feed-forward network."""
        found = {match[2] for name in self.checkpoint.names() if (match := _LAYER.fullmatch(name))}
        return tuple(sorted(suffix for suffix in found if not suffix.startswith("mlp.")))

    def has(self, suffix: str) -> bool:
        return suffix in self.suffixes

    def ffn(self, layer: int, part: str) -> str:
        return f"model.layers.{layer}.mlp.{part}_proj.weight"

    def shared_names(self) -> list[str]:
        """Everything but the feed-forward networks."""
        return [name for name in self.checkpoint.names() if ".mlp." not in name]

    def ffn_names(self) -> list[str]:
        return [self.ffn(layer, part) for layer in range(self.layers) for part in FFN]

    def over(self, checkpoint: Checkpoint) -> Dense:
        """The same model with its tensors served otherwise."""
        return replace(self, checkpoint=checkpoint)


def dense(checkpoint: Checkpoint, label: str) -> Dense:
    """The model as a `Dense`. Reads headers and config only.

    CheckpointError, all faults together, for a class or a detail that none of transformers' sparse classes has a place for.
    """
    kind = checkpoint.config.get("model_type")
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise CheckpointError(
            f"{label}: is of model_type {kind!r}; no class of transformers holds its feed-forward networks as experts. "
            f"Allowed are {', '.join(FAMILIES)}; {OTHERWISE}."
        )
    check_claims(checkpoint, label)
    facts = _facts(checkpoint, label)
    canonical = _with_names_of_llama(checkpoint, facts)
    rows = canonical.info(_OUTSIDE[0]).shape[0] if _OUTSIDE[0] in canonical.names() else 0
    made = Dense(label, canonical, facts, checkpoint.config, checkpoint.files, rows)
    if faults := [*_faults_of_tensors(made), *_faults_of_config(made)]:
        raise CheckpointError("\n".join(f"{label}: {fault}" for fault in faults) + f"\nSo no standard export takes it; {OTHERWISE}.")
    return made


def _facts(checkpoint: Checkpoint, label: str) -> Mapping[str, Any]:
    from transformers import AutoConfig

    values = dict(checkpoint.config)
    try:
        parsed: Mapping[str, Any] = AutoConfig.for_model(values.pop("model_type"), **values).to_dict()
    except Exception as error:  # a foreign config goes through foreign code
        raise CheckpointError(f"{label}: its config.json cannot be used: {error}. Restore it.") from error
    return parsed


def _with_names_of_llama(checkpoint: Checkpoint, facts: Mapping[str, Any]) -> Checkpoint:
    """Saved without its head a model has no `model.`; Phi-3 fuses what others keep apart; frequencies are no weights."""
    names = [name for name in checkpoint.names() if not name.endswith("rotary_emb.inv_freq")]
    bare = not any(name.startswith("model.") for name in names)
    renamed = RenamedCheckpoint(checkpoint, {f"model.{name}" if bare and name != "lm_head.weight" else name: name for name in names})
    if not any(name.endswith((".qkv_proj.weight", ".gate_up_proj.weight")) for name in names):
        return renamed
    return _apart(renamed, facts)


def _apart(fused: Checkpoint, facts: Mapping[str, Any]) -> Checkpoint:
    heads = int(facts["num_attention_heads"])
    groups = int(facts.get("num_key_value_heads") or heads)
    tensors: dict[str, tuple[tuple[int, ...], list[Piece]]] = {}
    for name in fused.names():
        info = fused.info(name)
        owner, _, last = name.removesuffix(".weight").rpartition(".")
        if last == "qkv_proj":
            unit = info.shape[0] // (heads + 2 * groups)
            parts = {"q_proj": heads * unit, "k_proj": groups * unit, "v_proj": groups * unit}
        elif last == "gate_up_proj":
            parts = {"gate_proj": info.shape[0] // 2, "up_proj": info.shape[0] // 2}
        else:
            tensors[name] = (info.shape, [whole(fused, name)])
            continue
        row = 0
        for part, rows in parts.items():
            tensors[f"{owner}.{part}.weight"] = ((rows, *info.shape[1:]), [rows_of(fused, name, row, row + rows)])
            row += rows
    return PiecedCheckpoint(tensors)


def _faults_of_tensors(model: Dense) -> list[str]:
    """Tensors that are missing, that differ between layers, or for which there would be no place."""
    names = set(model.checkpoint.names())
    faults = [f"has no tensor '{name}'." for name in _OUTSIDE[:2] if name not in names]
    outside = [name for name in sorted(names) if not _LAYER.fullmatch(name) and name not in _OUTSIDE]
    inside = {int(match[1]) for name in names if (match := _LAYER.fullmatch(name))}
    if inside != set(range(model.layers)):
        faults.append(f"has tensors of {len(inside)} layers, its config says {model.layers}.")
    known = {f"self_attn.{part}_proj.weight" for part in "qkvo"} | {f"self_attn.{part}_proj.bias" for part in "qkv"}
    known |= {f"mlp.{part}_proj.weight" for part in FFN} | {f"self_attn.{part}_norm.weight" for part in "qk"}
    norms = ("post_attention", "post_feedforward") if model.family == "olmo2" else ("input", "post_attention")
    known |= {f"{norm}_layernorm.weight" for norm in norms}
    biases = {"self_attn.o_proj.bias", *(f"mlp.{part}_proj.bias" for part in FFN)}
    suffixes = {match[2] for name in names if (match := _LAYER.fullmatch(name))}
    if found := sorted(suffixes & biases):
        faults.append(f"has biases ({', '.join(found)}), which no sparse class has.")
    if found := [*outside, *sorted(suffixes - known - biases)]:
        faults.append(f"has tensors that Llama's layout does not know ({', '.join(found[:4])}{' ...' if len(found) > 4 else ''}).")
    missing = [f"model.layers.{layer}.{suffix}" for layer in sorted(inside) for suffix in sorted(suffixes & known)]
    needed = [f"model.layers.{layer}.mlp.{part}_proj.weight" for layer in sorted(inside) for part in FFN]
    if absent := [name for name in dict.fromkeys([*missing, *needed]) if name not in names]:
        faults.append(f"lacks {', '.join(absent[:3])}{' ...' if len(absent) > 3 else ''}.")
    return faults


def _faults_of_config(model: Dense) -> list[str]:
    faults = []
    facts, rope = model.facts, model.rope
    if facts.get("hidden_act") != "silu":
        faults.append(f"its activation is {facts.get('hidden_act')!r}; sparse classes are used with silu.")
    if float(rope.get("partial_rotary_factor", 1.0)) != 1.0:
        faults.append(f"only a share of {rope['partial_rotary_factor']} of its heads is rotated.")
    if rope.get("rope_type") == "longrope" or "rope_theta" not in rope:
        faults.append(f"its rotary positions are of the type {rope.get('rope_type', 'several')}, which is not carried over.")
    if model.mixed_window:
        faults.append("some of its layers have a sliding window and some have not.")
    return faults
