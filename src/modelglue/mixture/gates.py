"""What a router computes from a pooled state: one logit per expert, by one matrix or by two with a ReLU between them.

A gate is a function of its tensors and nothing else; they stand in `router.safetensors` under the names that `tensors` gives.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal, TypeAlias

from modelglue.errors import CheckpointError

if TYPE_CHECKING:
    import torch

GateKind = Literal["linear", "mlp"]


@dataclass(frozen=True)
class LinearGate:
    """Logits `weight x (+ bias)`; gates from prompts have no bias."""

    weight: torch.Tensor
    """[experts, d], float32."""
    bias: torch.Tensor | None = None
    """[experts], float32."""
    kind: ClassVar[GateKind] = "linear"

    @property
    def width(self) -> int:
        """Length d of the states that it reads."""
        return int(self.weight.shape[1])

    def logits(self, pooled: torch.Tensor) -> torch.Tensor:
        """[B, experts] of pooled states [B, d] in float32. Row for row the same bits, whatever a row is batched with."""
        return _rows(pooled, self.weight, self.bias)

    def tensors(self) -> dict[str, torch.Tensor]:
        return {"gate": self.weight, **({} if self.bias is None else {"bias": self.bias})}


@dataclass(frozen=True)
class MlpGate:
    """Logits `second relu(first x (+ first_bias)) (+ second_bias)`."""

    first: torch.Tensor
    """[m, d], float32."""
    second: torch.Tensor
    """[experts, m], float32."""
    first_bias: torch.Tensor | None = None
    second_bias: torch.Tensor | None = None
    kind: ClassVar[GateKind] = "mlp"

    @property
    def width(self) -> int:
        """Length d of the states that it reads."""
        return int(self.first.shape[1])

    def logits(self, pooled: torch.Tensor) -> torch.Tensor:
        """[B, experts] of pooled states [B, d] in float32. Row for row the same bits, whatever a row is batched with."""
        return _rows(_rows(pooled, self.first, self.first_bias).clamp(min=0), self.second, self.second_bias)

    def tensors(self) -> dict[str, torch.Tensor]:
        biases = {"mlp.0.bias": self.first_bias, "mlp.2.bias": self.second_bias}
        return {"mlp.0.weight": self.first, "mlp.2.weight": self.second} | {k: v for k, v in biases.items() if v is not None}


Gate: TypeAlias = LinearGate | MlpGate

#: per kind: name -> axes of its shape; biases may be missing
_SHAPES: Mapping[GateKind, Mapping[str, str]] = {
    "linear": {"gate": "nd", "bias": "n"},
    "mlp": {"mlp.0.weight": "md", "mlp.0.bias": "m", "mlp.2.weight": "nm", "mlp.2.bias": "n"},
}


def gate_from(kind: GateKind, tensors: Mapping[str, torch.Tensor], experts: int, place: str) -> Gate:
    """The gate that these tensors make.

    Raises CheckpointError naming `place` and every tensor that is missing, unknown, of a wrong shape or dtype, or not finite.
    """
    import torch

    shapes = _SHAPES[kind]
    sizes = {"n": experts}
    faults = [f"{name}: unknown" for name in sorted(set(tensors) - set(shapes))]
    for name, axes in shapes.items():
        value = tensors.get(name)
        if value is None:
            faults += [f"{name}: missing"] if len(axes) == 2 else []
            continue
        wanted = "[" + ", ".join(str(sizes.get(axis, axis)) for axis in axes) + "]"
        fits = value.dtype == torch.float32 and value.dim() == len(axes) and min(value.shape) > 0
        if not fits or any(sizes.setdefault(axis, size) != size for axis, size in zip(axes, value.shape, strict=True)):
            faults.append(f"{name} is {str(value.dtype).removeprefix('torch.')} {list(value.shape)}, allowed is float32 {wanted}")
        elif not bool(value.isfinite().all()):
            faults.append(f"{name} holds values that are not finite")
    if faults:
        raise CheckpointError(f"{place}: no {kind} router for {experts} experts ({'; '.join(faults)}). Make the mixture again.")
    if kind == "linear":
        return LinearGate(tensors["gate"], tensors.get("bias"))
    return MlpGate(tensors["mlp.0.weight"], tensors["mlp.2.weight"], tensors.get("mlp.0.bias"), tensors.get("mlp.2.bias"))


def _rows(states: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """Row by row: a product of matrices gives a row other bits when other rows stand beside it."""
    import torch

    found = torch.empty(len(states), len(weight))
    for number, row in enumerate(states):
        found[number] = (weight * row).sum(dim=-1)
    return found if bias is None else found + bias
