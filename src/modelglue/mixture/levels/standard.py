"""A mixture of feed-forward networks in a class that transformers has, where one holds it: no code of ours runs it then."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from modelglue.checkpoint import Checkpoint
from modelglue.errors import UserError
from modelglue.mixture.exports import Gates, Parts, check, choose, dense
from modelglue.mixture.gates import Gate, LinearGate
from modelglue.mixture.levels.assemble import LevelSpec


def in_standard_class(
    experts: Mapping[str, Checkpoint],
    shared: Checkpoint,
    gates: Mapping[int, Gate],
    spec: LevelSpec,
    *,
    merged: Checkpoint | None,
    description: Mapping[str, Any],
) -> Checkpoint:
    """The same function as `join` gives, under the names of Mixtral, Qwen2-MoE or whatever class holds it.

    The temperature is multiplied into the gates. Raises UserError saying why no class does.
    """
    if spec.level != "ffn" or spec.routing != "token":
        raise UserError("no class of transformers routes prompts as a whole, or to decoder layers")
    if spec.merged_layers and merged is not None and merged is not shared:
        raise UserError("the lowest layers are another model's than the shared parts")
    weights = {layer: gate.weight for layer, gate in gates.items() if isinstance(gate, LinearGate) and gate.bias is None}
    if len(weights) < len(gates):
        raise UserError("no class of transformers has routers of two matrices, or with a bias")
    import torch

    base = dense(shared, "shared")
    found = Parts(
        base, tuple(dense(checkpoint, name) for name, checkpoint in experts.items()), spec.top_k,
        shared.info("model.embed_tokens.weight").dtype, dense_layers=spec.merged_layers,
    )  # fmt: skip
    check(found)
    export = choose(found)
    rows = torch.stack([weights[layer] for layer in found.sparse_layers]) / spec.temperature
    return export.build(found, Gates(rows), description)
