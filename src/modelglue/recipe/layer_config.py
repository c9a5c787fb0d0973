"""The config of a model whose layers are others than its donor's: their number, and what it says layer by layer."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from modelglue.recipe.layers import DEFAULT, Tower, count_keys, sub_config, sub_config_key

#: lists with one item per layer
_PER_LAYER = re.compile(r"layer|type|pattern|block|head|intermediate_size|rope|window|expert")
#: lists of layer numbers
_NUMBERS = re.compile(r"only_layers|layer_indices|layers_idx|attention_layers$|attn_idxs|skip_layers")
#: rules that count layers: they hold for a run of layers from 0 only
_RULES = (
    "full_attention_interval", "sliding_window_pattern", "first_k_dense_replace", "decoder_sparse_step", "moe_layer_freq",
    "max_window_layers", "interleave_moe_layer_step", "attn_layer_period", "attn_layer_offset", "expert_layer_period",
    "expert_layer_offset", "no_rope_layer_interval", "global_attn_every_n_layers", "num_kv_shared_layers",
)  # fmt: skip
#: of those, what holds below a layer or from it on
_FROM_LAYER = ("first_k_dense_replace", "max_window_layers")
#: of those, what comes back every so many layers
_EVERY = (
    "full_attention_interval", "sliding_window_pattern", "decoder_sparse_step", "moe_layer_freq", "interleave_moe_layer_step",
    "attn_layer_period", "expert_layer_period", "no_rope_layer_interval", "global_attn_every_n_layers",
)  # fmt: skip
#: each belongs to a period, and follows where that does
_OFFSETS = {"attn_layer_offset": "attn_layer_period", "expert_layer_offset": "expert_layer_period"}
#: model types that know the kind of every layer where the config does not list it: every how many layers attention is full, what it is else
_KNOWN_TYPES: Mapping[str, tuple[int, str]] = {
    "gemma2": (2, "sliding_attention"), "gpt_oss": (2, "sliding_attention"), "gemma3_text": (6, "sliding_attention"),
    "cohere2": (4, "sliding_attention"), "olmo3": (4, "sliding_attention"), "qwen3_next": (4, "linear_attention"),
}  # fmt: skip
#: what most configs call the number of layers
_USUAL = "num_hidden_layers"
#: those that only say how the list of types came about, where there is one
_SAID_BY_TYPES = ("full_attention_interval", "sliding_window_pattern", "max_window_layers", "global_attn_every_n_layers")


@dataclass(frozen=True)
class LayerSource:
    """Where an output layer comes from: the config of the model, and the layer's number there."""

    config: Mapping[str, Any]
    number: int


def layer_fields(config: Mapping[str, Any], tower: Tower, kind: str, layers: Sequence[LayerSource]) -> tuple[dict[str, Any], list[str]]:
    """Fields to update in the donor's config for a tower that now has these layers, and what cannot be expressed.

    `tower` is the donor's. Lists with one item per layer are put together from the configs of the models that the layers come
    from; lists of layer numbers are renumbered; rules by layer number are moved where the new order still follows one.
    """
    own = sub_config(config, kind)
    count = len(layers)
    warnings: list[str] = []
    known = count_keys(own, kind)
    fields: dict[str, Any] = {key: count for key in known if own[key] == tower.count or key == known[0]}
    if kind == "decoder" and "num_decoder_layers" not in own and "decoder_layers" not in own and "num_layers" in own:
        fields = {"num_decoder_layers": count}  # where it is not given, the decoder is as deep as the encoder
    if config and not known and count != tower.count:
        fields = {_USUAL: count}
        warnings.append(
            f"the config does not say how many layers {'the model' if tower.name == DEFAULT else tower.name} has, and now there are "
            f"{count} instead of {tower.count}; '{_USUAL}: {count}' is written. Check that its class reads that."
        )
    for key, value in own.items():
        if isinstance(value, list) and _NUMBERS.search(key) and all(isinstance(item, int) for item in value):
            fields[key] = [at for at, layer in enumerate(layers) if layer.number in _list(layer, kind, key, value)]
        elif isinstance(value, list) and _PER_LAYER.search(key) and len(value) == tower.count:
            fields[key] = _items(key, kind, layers, value)
        elif isinstance(value, str) and "pattern" in key and len(value) == tower.count:
            fields[key] = "".join(_items(key, kind, layers, list(value)))
    if not all(layer.number == at for at, layer in enumerate(layers)):
        moved, odd = _moved_rules(own, kind, layers)
        fields |= moved
        warnings += odd
    where = sub_config_key(config, kind)
    return ({where: fields} if where is not None else fields), warnings


def _moved_rules(own: Mapping[str, Any], kind: str, layers: Sequence[LayerSource]) -> tuple[dict[str, Any], list[str]]:
    """Rules by layer number that say of the new order what they said of the old one, and what is odd about those that cannot."""
    fields: dict[str, Any] = {}
    warnings = []
    numbers = [layer.number for layer in layers]
    alike = [all(sub_config(layer.config, kind).get(key) == own.get(key) for layer in layers) for key in _RULES]
    for key, same in zip(_RULES, alike, strict=True):
        value = own.get(key)
        every = 0 if key in _FROM_LAYER or key == "num_kv_shared_layers" else 1  # no rule: the same for all layers
        if value in (None, 0, every):
            continue
        if same and key in _FROM_LAYER and isinstance(value, int):
            below = [number < value for number in numbers]
            if below == sorted(below, reverse=True):
                fields[key] = sum(below) if sum(below) < len(below) else max(value, len(below))
                continue
        period = own.get(_OFFSETS.get(key, key)) if key in _EVERY or key in _OFFSETS else None
        if same and isinstance(period, int) and period > 0 and all((number - at) % period == 0 for at, number in enumerate(numbers)):
            continue
        if not (key in _SAID_BY_TYPES and "layer_types" in own):
            warnings.append(f"the config says '{key}: {value}', a rule by layer number that the new order of layers need not follow.")
    kinds = [_known_types(sub_config(layer.config, kind), layer.number) for layer in layers]
    if own.get("layer_types") is None and kinds != [_known_types(own, at) for at in range(len(layers))]:
        fields["layer_types"] = kinds
        warnings = [text for text in warnings if not any(f"'{key}:" in text for key in _SAID_BY_TYPES)]
    return fields, warnings


def _known_types(config: Mapping[str, Any], number: int) -> str | None:
    """What a layer is where the config says it only by its model type."""
    if config.get("model_type") not in _KNOWN_TYPES:
        return None
    usual, otherwise = _KNOWN_TYPES[config["model_type"]]
    every = next((config[key] for key in ("sliding_window_pattern", "full_attention_interval") if isinstance(config.get(key), int)), usual)
    return "full_attention" if every and (number + 1) % every == 0 else otherwise


def _list(layer: LayerSource, kind: str, key: str, default: Any) -> Any:
    return sub_config(layer.config, kind).get(key, default)


def _items(key: str, kind: str, layers: Sequence[LayerSource], default: Sequence[Any]) -> list[Any]:
    """One item per output layer, from the model that it comes from."""
    found = []
    for layer in layers:
        values = _list(layer, kind, key, default)
        values = values if layer.number < len(values) else default
        found.append(values[layer.number] if layer.number < len(values) else default[-1])
    return found
