"""Qwen3MoeForCausalLM: experts of Qwen3, nothing always on."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from modelglue.mixture.exports.parts import Parts
from modelglue.mixture.exports.qwen_layout import QwenLayout


class Qwen3Moe(QwenLayout):
    name = "Qwen3MoeForCausalLM"
    model_type = "qwen3_moe"
    words = ("qwen3", "qwen3_moe", "qwen3 moe")
    families = ("qwen3",)

    def _refusals(self, parts: Parts) -> Iterable[str]:
        if parts.always is not None:
            yield "it has no expert that is always on"
        if any(parts.shared.has(f"self_attn.{part}_proj.bias") for part in "qkv"):
            yield "its attention has biases in all projections or in none"

    def _config(self, parts: Parts) -> dict[str, Any]:
        window = parts.shared.window
        return {
            **super()._config(parts),
            "attention_bias": False,
            "use_sliding_window": window is not None,
            "sliding_window": window,
        }
