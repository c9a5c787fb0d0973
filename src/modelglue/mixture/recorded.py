"""Learned routers in words that YAML and JSON have: what a recipe keeps, so that it makes the same mixture again without a score."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from pydantic import BaseModel, ConfigDict, Field

from modelglue.checkpoint import TensorsCheckpoint, tensor_file
from modelglue.errors import UserError
from modelglue.mixture.gates import Gate, GateKind, gate_from
from modelglue.mixture.trained import TrainedRouter, Training

if TYPE_CHECKING:
    import torch

_PLACE = "the recipe's router"


class _Recorded(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: GateKind
    training: Training
    tensors: str
    """A safetensors file in base64."""

    def _read(self) -> dict[str, torch.Tensor]:
        from safetensors import SafetensorError
        from safetensors.torch import load

        try:
            tensors: dict[str, torch.Tensor] = load(base64.b64decode(self.tensors, validate=True))
        except (ValueError, SafetensorError) as error:
            raise UserError(f"{_PLACE} cannot be read ({error}). Restore the recipe, or learn the router again.") from error
        return tensors


class RecordedRouter(_Recorded):
    """The router of a mixture of complete models: a gate, and where it reads."""

    encoder: str
    """Like an expert's model, or an expert's name."""
    router_layer: Annotated[int, Field(ge=0)]
    temperature: Annotated[float, Field(gt=0, allow_inf_nan=False)]

    @classmethod
    def of(cls, found: TrainedRouter, encoder: str) -> RecordedRouter:
        """`encoder`: what the recipe calls the model that the router reads through."""
        return cls(
            kind=found.gate.kind, encoder=encoder, router_layer=found.layer, temperature=found.temperature, training=found.training,
            tensors=_text(found.gate.tensors()),
        )  # fmt: skip

    def trained(self, encoder: Path, experts: int) -> TrainedRouter:
        """The router again. CheckpointError or UserError for tensors that make none."""
        gate = gate_from(self.kind, self._read(), experts, _PLACE)
        return TrainedRouter(gate, encoder, self.router_layer, self.temperature, self.training)


class RecordedGates(_Recorded):
    """The gates of a mixture inside one model: one for every layer that decides, their tensors called `LAYER.NAME`."""

    @classmethod
    def of(cls, gates: Mapping[int, Gate], training: Training) -> RecordedGates:
        tensors = {f"{layer}.{name}": value for layer, gate in gates.items() for name, value in gate.tensors().items()}
        return cls(kind=next(iter(gates.values())).kind, training=training, tensors=_text(tensors))

    def gates(self, layers: range, experts: int) -> dict[int, Gate]:
        """The gates again. CheckpointError or UserError for tensors that are not one gate for each of these layers."""
        own: dict[str, dict[str, torch.Tensor]] = {str(layer): {} for layer in layers}
        for name, value in sorted(self._read().items()):
            layer, _, rest = name.partition(".")
            if layer not in own:
                raise UserError(f"{_PLACE} has a tensor '{name}'; layers {layers.start} to {layers.stop - 1} decide. Learn it again.")
            own[layer][rest] = value
        return {int(layer): gate_from(self.kind, tensors, experts, f"{_PLACE}, layer {layer}") for layer, tensors in own.items()}


def _text(tensors: Mapping[str, torch.Tensor]) -> str:
    return base64.b64encode(tensor_file(TensorsCheckpoint(tensors))).decode()
