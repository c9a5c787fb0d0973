"""Ernie4_5_MoeForCausalLM: experts of Llama and Mistral, perhaps one that is always on, without a gate.

Its rotary positions pair neighbouring channels, those of Llama channel i with i + half, so the rows of the query and key projections
change places within each head.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from modelglue.checkpoint import Checkpoint, RenamedCheckpoint, TensorInfo
from modelglue.mixture.exports.export import always_on, layer_name, shared_tensors
from modelglue.mixture.exports.parts import Parts
from modelglue.mixture.exports.pieced import Piece, PiecedCheckpoint, rows_of
from modelglue.mixture.exports.qwen_layout import QwenLayout


class Ernie(QwenLayout):
    name = "Ernie4_5_MoeForCausalLM"
    model_type = "ernie4_5_moe"
    words = ("ernie", "ernie4_5_moe")
    families = ("llama",)
    recent = True

    def _refusals(self, parts: Parts) -> Iterable[str]:
        if parts.gated:
            yield "its expert that is always on has no gate"
        if parts.always is not None and parts.always.inner % parts.experts[0].inner:
            yield "its expert that is always on is as wide as one of the others, or several of them together"
        if parts.shared.window is not None:
            yield "it has no sliding window"
        if any(parts.shared.has(f"self_attn.{part}_proj.bias") for part in "qkv"):
            yield "its attention has no biases of its own"

    def _config(self, parts: Parts) -> dict[str, Any]:
        inner = parts.experts[0].inner
        return {
            "intermediate_size": parts.shared.inner if parts.dense_layers else inner,
            "moe_intermediate_size": inner,
            "moe_num_experts": len(parts.experts),
            "moe_num_shared_experts": 0 if parts.always is None else parts.always.inner // inner,
            "moe_k": parts.top_k,
            "moe_layer_start_index": parts.dense_layers,
            "moe_layer_end_index": parts.shared.layers - 1,
            "moe_layer_interval": 1,
            "use_bias": False,
            "output_router_logits": False,
        }

    def _tensors(self, parts: Parts) -> list[Checkpoint]:
        return [*super()._tensors(parts), *always_on(parts, "mlp.shared_experts")]

    def _zeros(self, parts: Parts) -> dict[str, TensorInfo]:
        shape = (1, len(parts.experts))
        name = "mlp.moe_statics.e_score_correction_bias"
        return {layer_name(layer, name): TensorInfo(shape, parts.gate_dtype) for layer in parts.sparse_layers}

    def _shared(self, parts: Parts) -> list[Checkpoint]:
        served = shared_tensors(parts)
        heads, groups, unit = parts.shared.heads
        turned: dict[str, tuple[tuple[int, ...], list[Piece]]] = {}
        for layer in range(parts.shared.layers):
            for part, count in (("q", heads), ("k", groups)):
                name = layer_name(layer, f"self_attn.{part}_proj.weight")
                turned[name] = (served.info(name).shape, [rows_of(served, name, row, row + 1) for row in _order(count, unit)])
        return [RenamedCheckpoint(served, {name: name for name in served.names() if name not in turned}), PiecedCheckpoint(turned)]


def _order(heads: int, unit: int) -> list[int]:
    """Old rows in their new order: of every head first i, then i + half, for each i."""
    return [head * unit + i + half for head in range(heads) for i in range(unit // 2) for half in (0, unit // 2)]
