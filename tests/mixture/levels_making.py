"""Mixtures inside one model, in memory: random experts of several architectures, and gates by chance."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from modelglue.checkpoint import Checkpoint, TensorsCheckpoint
from modelglue.mixture.gates import Gate, LinearGate
from modelglue.mixture.levels import LevelSpec, deciding_layers, join
from modelglue.models import load_live
from tests.models.tiny import config

_COMMON = {
    "vocab_size": 64, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "initializer_range": 0.5, "hidden_size": 16,
    "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip
_OTHERS: dict[str, dict[str, Any]] = {
    "qwen3": {**_COMMON, "head_dim": 4},
    "gemma2": {**_COMMON, "head_dim": 4, "sliding_window": 4},
    "bloom": {"vocab_size": 64, "pad_token_id": 0, "initializer_range": 0.5, "hidden_size": 16, "n_layer": 2, "n_head": 4},
}  # fmt: skip
ARCHITECTURES = ("llama", "mistral-window", "qwen3", "gemma", "gemma2", "gpt_neox", "gpt2", "bloom")
#: level, routing
LEVELS = (("ffn", "token"), ("ffn", "sample"), ("block", "sample"), ("model", "sample"))


def model(kind: str, seed: int, **changes: Any) -> Any:
    """A live model with random weights."""
    values = {"model_type": kind, **_OTHERS[kind], **changes} if kind in _OTHERS else config(kind, **changes)
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(values.pop("model_type"), **values), dtype=torch.float32).eval()


def checkpoint(live: Any) -> Checkpoint:
    """A live model as a checkpoint in memory."""
    tensors = {name: value.clone() for name, value in live.state_dict().items()}
    if live.config.get_text_config().tie_word_embeddings:
        tensors.pop("lm_head.weight", None)
    return TensorsCheckpoint(tensors, {**live.config.to_dict(), "architectures": [type(live).__name__]})


def gates(spec: LevelSpec, experts: int, seed: int = 0, *, layers: int = 2, width: int = 16) -> dict[int, Gate]:
    generator = torch.Generator().manual_seed(seed)
    return {layer: LinearGate(torch.randn(experts, width, generator=generator)) for layer in deciding_layers(spec, layers)}


def mixture(models: list[Any], spec: LevelSpec, seed: int = 0, *, shared: Any = None, merged: Any = None, gate: Any = None) -> Any:
    """A live mixture of live models; the first is the shared one where none is given."""
    experts = {f"e{number}": checkpoint(one) for number, one in enumerate(models)}
    base = checkpoint(models[0] if shared is None else shared)
    layers = models[0].config.num_hidden_layers
    given = gates(spec, len(models), seed, layers=layers) if gate is None else gate
    return load_live(join(experts, base, given, spec, merged=None if merged is None else checkpoint(merged)))


def logits(live: Any, ids: torch.Tensor, **given: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = live(ids, **given).logits
    return found


def some_ids(rows: int = 3, length: int = 7, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, 64, (rows, length), generator=torch.Generator().manual_seed(seed))


def left_pads(ids: torch.Tensor, pads: list[int]) -> torch.Tensor:
    """A mask that calls the first positions of every row padding."""
    mask = torch.ones_like(ids)
    for row, count in enumerate(pads):
        mask[row, :count] = 0
    return mask
