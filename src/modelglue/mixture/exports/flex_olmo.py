"""FlexOlmoForCausalLM: experts of OLMo-2, whose norms stand behind attention and feed-forward network."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from modelglue.mixture.exports.parts import Parts
from modelglue.mixture.exports.qwen_layout import QwenLayout


class FlexOlmo(QwenLayout):
    name = "FlexOlmoForCausalLM"
    model_type = "flex_olmo"
    words = ("flex_olmo", "flexolmo", "olmo")
    families = ("olmo2",)
    recent = True

    def _refusals(self, parts: Parts) -> Iterable[str]:
        if parts.always is not None:
            yield "it has no expert that is always on"
        if parts.dense_layers:
            yield "all its layers are sparse"

    def _config(self, parts: Parts) -> dict[str, Any]:
        return {
            "intermediate_size": parts.experts[0].inner,
            "num_experts": len(parts.experts),
            "num_experts_per_tok": parts.top_k,
            "norm_topk_prob": True,
            "attention_bias": False,
            "output_router_logits": False,
        }
