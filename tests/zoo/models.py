"""Small models in memory: real tensor names, made-up weights."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from modelglue.checkpoint import TensorsCheckpoint

if TYPE_CHECKING:
    from collections.abc import Mapping

CONFIG: Mapping[str, Any] = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 6, "intermediate_size": 10,
    "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 8, "hidden_act": "silu", "rms_norm_eps": 1e-6,
}  # fmt: skip
SHAPES = {"self_attn.q_proj": (6, 6), "self_attn.k_proj": (4, 6), "mlp.up_proj": (10, 6), "mlp.down_proj": (6, 10)}


def tensors(seed: int, *, layers: int = 2, bias: bool = True, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """Attention, feed-forward, norms, embedding and head, filled with normal numbers."""
    generator = torch.Generator().manual_seed(seed)
    found = {"model.embed_tokens.weight": torch.randn(8, 6, generator=generator)}
    for layer in range(layers):
        start = f"model.layers.{layer}."
        for name, shape in SHAPES.items():
            found[f"{start}{name}.weight"] = torch.randn(shape, generator=generator)
        if bias:
            found[f"{start}self_attn.q_proj.bias"] = torch.randn(6, generator=generator)
        found[f"{start}input_layernorm.weight"] = torch.randn(6, generator=generator)
    found["lm_head.weight"] = torch.randn(8, 6, generator=generator)
    return {name: value.to(dtype) for name, value in found.items()}


def model(weights: Mapping[str, torch.Tensor], **config: Any) -> TensorsCheckpoint:
    return TensorsCheckpoint(dict(weights), {**CONFIG, **config})


def siblings(seed: int, count: int, spread: float = 0.3, **options: Any) -> list[dict[str, torch.Tensor]]:
    """A common ancestor plus noise of relative size `spread`."""
    base = tensors(seed, **options)
    found = []
    for number in range(count):
        noise = tensors(1000 * (seed + 1) + number, **options)
        found.append({name: value + spread * noise[name] for name, value in base.items()})
    return found


def reference(a: Mapping[str, torch.Tensor], b: Mapping[str, torch.Tensor], mode: str = "column", scope: str = "all") -> float:
    """The definition, written down plainly in float64: counted tensors, cosine per column, mean, mean."""
    parts = {"all": ("self_attn", "mlp"), "attn": ("self_attn",), "mlp": ("mlp",)}[scope]
    values = []
    joined: tuple[list[torch.Tensor], list[torch.Tensor]] = ([], [])
    for name in sorted(a):
        if not any(part in name for part in parts):
            continue
        A, B = (side[name].double().reshape(side[name].shape[0], -1) for side in (a, b))
        joined[0].append(A.flatten())
        joined[1].append(B.flatten())
        if mode == "tensor":
            A, B = A.reshape(-1, 1), B.reshape(-1, 1)
        norms = A.norm(dim=0) * B.norm(dim=0)
        says = (A.norm(dim=0) > 0) | (B.norm(dim=0) > 0)
        if says.any():
            values.append(float(((A * B).sum(0) / norms.clamp(min=1e-8))[says].mean()))
    if mode == "global":
        A, B = torch.cat(joined[0]), torch.cat(joined[1])
        return float(A @ B / (A.norm() * B.norm()).clamp(min=1e-8))
    return sum(values) / len(values)
