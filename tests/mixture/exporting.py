"""Small dense models of every class that an export takes, and the mixture that their export should be, put together by hand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from modelglue.checkpoint import Checkpoint, TensorsCheckpoint
from modelglue.mixture.exports import Dense, Gates, Parts, dense, named
from tests.models.tiny import random_dense

LLAMA3 = {
    "rope_theta": 5e5,
    "rope_scaling": {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16,
    },
}  # fmt: skip


@dataclass(frozen=True)
class Sparse:
    """One row of the table of exports: what goes in, and which class should come out."""

    expected: str
    kind: str = "llama"
    changes: dict[str, Any] = field(default_factory=dict)
    wanted: str | None = None
    always: str | None = None
    """`plain` or `gated`: an expert that is always on, perhaps behind a gate of its own."""
    dense_layers: int = 0

    def model(self, seed: int) -> Any:
        return random_dense(self.kind, seed, **self.changes)

    def parts(self, models: Sequence[Any], top_k: int, dtype: str = "F32") -> Parts:
        """The first model is shared, the others are experts, the last the one that is always on, where there is one."""
        read = [opened(model, f"model{number}") for number, model in enumerate(models)]
        always = read.pop() if self.always else None
        return Parts(read[0], tuple(read[1:]), top_k, dtype, always, self.always == "gated", self.dense_layers)

    def export(self) -> Any:
        return None if self.wanted is None else named(self.wanted)


#: id -> row; llama3 is what Llama 3.1 does to its rotary positions
SPARSE = {
    "mixtral": Sparse("MixtralForCausalLM"),
    "mixtral-mistral": Sparse("MixtralForCausalLM", "mistral", {"sliding_window": 6}),
    "mixtral-wide-heads": Sparse("MixtralForCausalLM", "mistral", {"head_dim": 8, "sliding_window": None}),
    "mixtral-phi3": Sparse("MixtralForCausalLM", "phi3"),
    "mixtral-tied": Sparse("MixtralForCausalLM", changes={"tie_word_embeddings": True, "rope_theta": 300.0}),
    "qwen2-llama3": Sparse("Qwen2MoeForCausalLM", changes=LLAMA3),
    "qwen2-hybrid": Sparse("Qwen2MoeForCausalLM", dense_layers=1),
    "qwen2-always": Sparse("Qwen2MoeForCausalLM", always="plain"),
    "qwen2-gated": Sparse("Qwen2MoeForCausalLM", always="gated"),
    "qwen2": Sparse("Qwen2MoeForCausalLM", "qwen2"),
    "qwen3": Sparse("Qwen3MoeForCausalLM", "qwen3", {"head_dim": 8}),
    "qwen3-hybrid": Sparse("Qwen3MoeForCausalLM", "qwen3", dense_layers=1),
    "olmo2": Sparse("FlexOlmoForCausalLM", "olmo2"),
    "ernie": Sparse("Ernie4_5_MoeForCausalLM", changes=LLAMA3, wanted="ernie"),
    "ernie-always-hybrid": Sparse("Ernie4_5_MoeForCausalLM", wanted="ernie", always="plain", dense_layers=1),
    "granite": Sparse("GraniteMoeSharedForCausalLM", wanted="granite"),
    "granite-always": Sparse("GraniteMoeSharedForCausalLM", wanted="granite", always="plain"),
}


def opened(model: Any, label: str) -> Dense:
    return dense(checkpoint_of(model), label)


def checkpoint_of(model: Any) -> Checkpoint:
    """A live dense model as it would be read from its folder."""
    head = () if not model.config.tie_word_embeddings else ("lm_head.weight",)
    tensors = {name: value for name, value in model.state_dict().items() if name not in head}
    return TensorsCheckpoint(tensors, model.config.to_dict())


def random_gates(parts: Parts, seed: int = 0) -> Gates:
    generator = torch.Generator().manual_seed(seed)
    layers, width = len(parts.sparse_layers), parts.shared.width
    rows = torch.randn(layers, len(parts.experts), width, generator=generator)
    return Gates(rows, torch.randn(layers, width, generator=generator) if parts.gated else None)


class ByHand(nn.Module):
    """softmax(W x), the k largest, renormalised; the weighted sum of what whole networks answer, all of them computed."""

    def __init__(
        self, networks: Sequence[nn.Module], gate: Tensor, top_k: int, always: nn.Module | None, always_gate: Tensor | None
    ) -> None:
        super().__init__()
        self.networks, self.gate, self.top_k = nn.ModuleList(networks), gate, top_k
        self.always, self.always_gate = always, always_gate

    def forward(self, x: Tensor) -> Tensor:
        p = (x @ self.gate.T).softmax(dim=-1)
        best = p.topk(self.top_k, dim=-1)
        weights = torch.zeros_like(p).scatter(-1, best.indices, best.values / best.values.sum(dim=-1, keepdim=True))
        mixed = torch.stack([weights[..., number, None] * network(x) for number, network in enumerate(self.networks)]).sum(dim=0)
        if self.always is not None:
            share = 1.0 if self.always_gate is None else (x @ self.always_gate).sigmoid()[..., None]
            mixed = mixed + share * self.always(x)
        return mixed


def by_hand(row: Sparse, models: Sequence[Any], gates: Gates, top_k: int) -> Any:
    """The shared model (changed in place) with the mixture of the others' networks in every layer that is sparse."""
    shared, *experts = models
    always = experts.pop() if row.always else None
    for number, layer in enumerate(range(row.dense_layers, shared.config.num_hidden_layers)):
        shared.model.layers[layer].mlp = ByHand(
            [expert.model.layers[layer].mlp for expert in experts], gates.routed[number], top_k,
            None if always is None else always.model.layers[layer].mlp, None if gates.always is None else gates.always[number],
        )  # fmt: skip
    return shared


def logits(model: Any, ids: Tensor) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(ids).logits
    return found


def some_ids() -> Tensor:
    return torch.randint(3, 60, (2, 20), generator=torch.Generator().manual_seed(7))
