"""GraniteMoeSharedForCausalLM: experts of Llama and Mistral and one that is always on, without a gate; experts stacked in one tensor."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from modelglue.checkpoint import Checkpoint
from modelglue.mixture.exports.dense import Dense
from modelglue.mixture.exports.export import Export, gate_tensors, layer_name
from modelglue.mixture.exports.parts import Gates, Parts
from modelglue.mixture.exports.pieced import Piece, PiecedCheckpoint, whole


class GraniteMoeShared(Export):
    name = "GraniteMoeSharedForCausalLM"
    model_type = "granitemoeshared"
    words = ("granite", "granitemoeshared")
    families = ("llama",)
    recent = True

    def _refusals(self, parts: Parts) -> Iterable[str]:
        shared = parts.shared
        if parts.gated:
            yield "its expert that is always on has no gate"
        if parts.dense_layers:
            yield "all its layers are sparse"
        if shared.window is not None:
            yield "it has no sliding window"
        heads, _, unit = shared.heads
        if heads * unit != shared.width:
            yield "its heads together are as wide as the model"
        if any(shared.has(f"self_attn.{part}_proj.bias") for part in "qkv"):
            yield "its attention has biases in all projections or in none"

    def _config(self, parts: Parts) -> dict[str, Any]:
        return {
            "intermediate_size": parts.experts[0].inner,
            "shared_intermediate_size": parts.always.inner if parts.always is not None else 0,
            "num_local_experts": len(parts.experts),
            "num_experts_per_tok": parts.top_k,
            "attention_bias": False,
            "attention_multiplier": parts.shared.heads[2] ** -0.5,
            "embedding_multiplier": 1.0,
            "residual_multiplier": 1.0,
            "logits_scaling": 1.0,
            "output_router_logits": False,
        }

    def _gates(self, parts: Parts, gates: Gates) -> dict[str, Any]:
        return gate_tensors(parts, gates, "block_sparse_moe.router.layer.weight")

    def _tensors(self, parts: Parts) -> list[Checkpoint]:
        count, inner, width = len(parts.experts), parts.experts[0].inner, parts.shared.width
        tensors: dict[str, tuple[tuple[int, ...], list[Piece]]] = {}
        for layer in parts.sparse_layers:
            first = [piece for expert in parts.experts for piece in _gate_and_up(expert, layer)]
            last = [whole(expert.checkpoint, expert.ffn(layer, "down")) for expert in parts.experts]
            tensors[layer_name(layer, "block_sparse_moe.input_linear.weight")] = ((count, 2 * inner, width), first)
            tensors[layer_name(layer, "block_sparse_moe.output_linear.weight")] = ((count, width, inner), last)
            if (always := parts.always) is not None:
                tensors[layer_name(layer, "shared_mlp.input_linear.weight")] = ((2 * always.inner, width), _gate_and_up(always, layer))
                tensors[layer_name(layer, "shared_mlp.output_linear.weight")] = (
                    (width, always.inner),
                    [whole(always.checkpoint, always.ffn(layer, "down"))],
                )
        return [PiecedCheckpoint(tensors)]


def _gate_and_up(expert: Dense, layer: int) -> list[Piece]:
    return [whole(expert.checkpoint, expert.ffn(layer, part)) for part in ("gate", "up")]
