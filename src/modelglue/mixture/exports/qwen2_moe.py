"""Qwen2MoeForCausalLM: Qwen2's experts, and those of Llama and Mistral where Mixtral has no place for something of theirs.

The class always has a shared expert, times the sigmoid of a gate. Where none is wanted it is a narrow one of zeros; one that is wanted
without a gate has a gate of zeros, sigmoid(0) = 1/2, and its last matrix doubled, which is exact in every dtype.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from modelglue.checkpoint import Checkpoint, TensorInfo, torch_dtype
from modelglue.mixture.exports.export import always_on, layer_name
from modelglue.mixture.exports.parts import Gates, Parts
from modelglue.mixture.exports.qwen_layout import QwenLayout

#: width of the shared expert that adds nothing; 0 would load in transformers, but not surely elsewhere
_NULL_WIDTH = 64


class Qwen2Moe(QwenLayout):
    name = "Qwen2MoeForCausalLM"
    model_type = "qwen2_moe"
    words = ("qwen", "qwen2", "qwen2_moe", "qwen moe")
    families = ("llama", "qwen2")

    def _refusals(self, parts: Parts) -> Iterable[str]:
        if parts.shared.window is not None:
            yield f"its sliding window is not that of {parts.shared.kind}"

    def _config(self, parts: Parts) -> dict[str, Any]:
        width = _NULL_WIDTH if parts.always is None else parts.always.inner
        return {**super()._config(parts), "shared_expert_intermediate_size": width, "use_sliding_window": False, "qkv_bias": True}

    def _gates(self, parts: Parts, gates: Gates) -> dict[str, Any]:
        found = super()._gates(parts, gates)
        if gates.always is not None:
            rows = gates.always.to(torch_dtype(parts.gate_dtype))
            found |= {layer_name(layer, "mlp.shared_expert_gate.weight"): rows[n][None] for n, layer in enumerate(parts.sparse_layers)}
        return found

    def _tensors(self, parts: Parts) -> list[Checkpoint]:
        return [*super()._tensors(parts), *always_on(parts, "mlp.shared_expert", factor=1.0 if parts.gated else 2.0)]

    def _zeros(self, parts: Parts) -> dict[str, TensorInfo]:
        shared, found = parts.shared, {}
        for layer in range(shared.layers):
            for part in "qkv":
                if not shared.has(f"self_attn.{part}_proj.bias"):
                    rows = shared.checkpoint.info(layer_name(layer, f"self_attn.{part}_proj.weight")).shape[0]
                    found[layer_name(layer, f"self_attn.{part}_proj.bias")] = TensorInfo((rows,), parts.dtype)
        for layer in parts.sparse_layers:
            if not parts.gated:
                found[layer_name(layer, "mlp.shared_expert_gate.weight")] = TensorInfo((1, shared.width), parts.gate_dtype)
            if parts.always is None:
                shapes = dict.fromkeys(("gate", "up"), (_NULL_WIDTH, shared.width)) | {"down": (shared.width, _NULL_WIDTH)}
                for part, shape in shapes.items():
                    found[layer_name(layer, f"mlp.shared_expert.{part}_proj.weight")] = TensorInfo(shape, parts.dtype)
        return found
