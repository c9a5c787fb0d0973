"""What the classes have in common whose experts are called `mlp.experts.{e}.gate_proj` and so on."""

from __future__ import annotations

from typing import Any

from modelglue.checkpoint import Checkpoint
from modelglue.mixture.exports.export import Export, dense_tensors, gate_tensors, routed
from modelglue.mixture.exports.parts import Gates, Parts


class QwenLayout(Export):
    def _config(self, parts: Parts) -> dict[str, Any]:
        return {
            "intermediate_size": parts.shared.inner if parts.dense_layers else parts.experts[0].inner,
            "moe_intermediate_size": parts.experts[0].inner,
            "num_experts": len(parts.experts),
            "num_experts_per_tok": parts.top_k,
            "norm_topk_prob": True,
            "decoder_sparse_step": 1,
            "mlp_only_layers": list(range(parts.dense_layers)),
            "output_router_logits": False,
        }

    def _gates(self, parts: Parts, gates: Gates) -> dict[str, Any]:
        return gate_tensors(parts, gates, "mlp.gate.weight")

    def _tensors(self, parts: Parts) -> list[Checkpoint]:
        words = {part: f"{part}_proj" for part in ("gate", "up", "down")}
        return [*routed(parts, "mlp.experts.{e}.{part}.weight", words), *dense_tensors(parts)]
