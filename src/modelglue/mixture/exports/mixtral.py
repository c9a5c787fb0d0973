"""MixtralForCausalLM: experts of Llama, Mistral and Phi-3, nothing always on, every layer sparse."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from modelglue.checkpoint import Checkpoint
from modelglue.mixture.exports.export import Export, gate_tensors, routed
from modelglue.mixture.exports.parts import Gates, Parts

_WORDS = {"gate": "w1", "down": "w2", "up": "w3"}


class Mixtral(Export):
    name = "MixtralForCausalLM"
    model_type = "mixtral"
    words = ("mixtral",)
    families = ("llama",)

    def _refusals(self, parts: Parts) -> Iterable[str]:
        shared = parts.shared
        if parts.always is not None:
            yield "it has no expert that is always on"
        if parts.dense_layers:
            yield "all its layers are sparse"
        if any(shared.has(f"self_attn.{part}_proj.bias") for part in "qkv"):
            yield "its attention has no biases"
        if shared.scaled_rope:
            yield "transformers 4 ignores rotary scaling in it"

    def _config(self, parts: Parts) -> dict[str, Any]:
        windows = {model.window for model in (parts.shared, *parts.experts)}
        return {
            "intermediate_size": parts.experts[0].inner,
            "num_local_experts": len(parts.experts),
            "num_experts_per_tok": parts.top_k,
            "sliding_window": windows.pop() if len(windows) == 1 else None,
            "output_router_logits": False,
        }

    def _gates(self, parts: Parts, gates: Gates) -> dict[str, Any]:
        return gate_tensors(parts, gates, "block_sparse_moe.gate.weight")

    def _tensors(self, parts: Parts) -> list[Checkpoint]:
        return routed(parts, "block_sparse_moe.experts.{e}.{part}.weight", _WORDS)
