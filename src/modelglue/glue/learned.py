"""The learned router of a run, as `router.json` and `recipe.yaml` keep it: its gate in words that YAML and JSON have.

A replay scores nothing, so the router that was learned from scores stands in the recipe with all its numbers.
"""

from __future__ import annotations

import base64
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from modelglue.checkpoint import TensorsCheckpoint, tensor_file
from modelglue.errors import UserError
from modelglue.mixture import Training
from modelglue.mixture.gates import Gate, GateKind, gate_from


class PlannedRouter(BaseModel):
    """A gate that was learned, where it reads, and how it was found."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: GateKind
    encoder: str
    """Like an expert's model: relative to the run folder, or a hub id."""
    router_layer: Annotated[int, Field(ge=0)]
    temperature: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    training: Training
    tensors: str
    """router.safetensors in base64."""

    @staticmethod
    def text_of(gate: Gate) -> str:
        """What stands in `tensors`."""
        return base64.b64encode(tensor_file(TensorsCheckpoint(gate.tensors()))).decode()

    def gate(self, experts: int) -> Gate:
        """The gate. CheckpointError or UserError for tensors that make none."""
        from safetensors import SafetensorError
        from safetensors.torch import load

        try:
            tensors = load(base64.b64decode(self.tensors, validate=True))
        except (ValueError, SafetensorError) as error:
            raise UserError(f"the recipe's router cannot be read ({error}). Restore the recipe, or run the glue file again.") from error
        return gate_from(self.kind, tensors, experts, "the recipe's router")
