"""Deeper models: layers repeated and skipped, blocks that begin as the identity."""

from __future__ import annotations

import torch

from modelglue.checkpoint import Checkpoint, TensorsCheckpoint
from modelglue.recipe.stacking import Stack, stack
from tests.golden.cases import Adapter, Answer, Case


def _model(case: Case) -> Checkpoint:
    tensors = case.models[0]
    layers = {name.split(".")[2] for name in tensors if name.startswith("model.layers.")}
    return TensorsCheckpoint(tensors, {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "num_hidden_layers": len(layers)})


def _answer(made: Stack, depth: int) -> Answer:
    assert made.checkpoint.config["num_hidden_layers"] == depth
    return Answer({name: _read(made.checkpoint, name) for name in made.checkpoint.names()})


def _read(made: Checkpoint, name: str) -> torch.Tensor:
    return made.read(name).reshape(made.info(name).shape)


def _upscaled(case: Case) -> Answer:
    model = _model(case)
    return _answer(stack(["model0"], layers=case.params["layer_indices"], resolve=lambda _: model), case.params["num_hidden_layers_out"])


def _expanded(case: Case) -> Answer:
    model = _model(case)
    before, after = case.params["original_layers"], case.params["layers"]
    return _answer(stack(["model0"], new_layers=after - before, resolve=lambda _: model), after)


ADAPTERS: dict[str, Adapter] = {"depth_upscaling/": _upscaled, "llama-pro/": _expanded}
