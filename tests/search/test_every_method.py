"""Whatever method `modelglue methods` lists can be searched, for whole models and layer by layer, and what is found merges again."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch

from modelglue.checkpoint import Checkpoint, TensorsCheckpoint
from modelglue.evaluation import FunctionEvaluator, ScoreStore
from modelglue.evaluation.members import Members
from modelglue.methods import Method, all_methods
from modelglue.recipe import build, read_recipe
from modelglue.search import Facts, SearchSettings, run_study

LAYERS = 3
#: for methods whose parameters have no range by themselves
RANGES: Mapping[str, Mapping[str, Any]] = {
    "karcher": {"max_iter": [1, 10]}, "model_stock": {"filter_wise": [False, True]}, "ram": {"epsilon": [1e-6, 1e-3]},
    "ramplus_tl": {"alpha": [0.0, 1.0]}, "passthrough": {"scale": [0.5, 1.5]},
}  # fmt: skip


def model(seed: int, near: TensorsCheckpoint | None = None) -> TensorsCheckpoint:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"model.embed_tokens.weight": (11, 8), "model.norm.weight": (8,), "lm_head.weight": (11, 8)}
    for layer in range(LAYERS):
        shapes |= {
            f"model.layers.{layer}.self_attn.q_proj.weight": (8, 8), f"model.layers.{layer}.mlp.up_proj.weight": (12, 8),
            f"model.layers.{layer}.input_layernorm.weight": (8,),
        }  # fmt: skip
    drawn = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    tensors = drawn if near is None else {name: near.tensor(name) + 0.1 * value for name, value in drawn.items()}
    return TensorsCheckpoint(tensors, {"architectures": ["LlamaForCausalLM"], "num_hidden_layers": LAYERS}, label=f"model {seed}")


BASE = model(0)
MODELS: Mapping[str, Checkpoint] = {"base": BASE, **{alias: model(n, BASE) for n, alias in enumerate("abc", 1)}}


def closeness(found: Checkpoint) -> float:
    """A score that every weight has a part in."""
    return -sum(float(((found.tensor(name) - MODELS["a"].tensor(name)).float() ** 2).sum()) for name in found.names())


@pytest.mark.parametrize("granularity", ["model", "layer"])
@pytest.mark.parametrize("method", all_methods(), ids=lambda method: method.id)
def test_two_trials_of_every_method(method: Method, granularity: str) -> None:
    most = 3 if method.max_models is None or (method.max_models == 1 and method.needs_base) else method.max_models
    base = "base" if method.takes_base else None
    settings = SearchSettings(
        members=tuple("abc"[:most]), base=base, searcher={"name": "random", "trials": 2},  # type: ignore[arg-type]
        space={"method": method.id, "granularity": granularity, "parameters": RANGES.get(method.id, {})}, fitness={"kind": "everything"},  # type: ignore[arg-type]
    )  # fmt: skip
    with ScoreStore(":memory:") as store:
        report = run_study(settings, FunctionEvaluator(closeness, MODELS, store), None, facts=Facts(layers=LAYERS))
    assert [(one.status, one.scores.error) for one in report.outcomes] == [("ok", "")] * 2
    assert report.best is not None
    candidate = report.best.proposal.candidate
    assert candidate is not None
    assert candidate.method == method.id
    merged = build(read_recipe(dict(candidate.recipe)), resolve=MODELS.__getitem__)
    live = Members(MODELS).expression(candidate)
    assert merged.names() == BASE.names()
    assert all(torch.equal(merged.tensor(name), live.tensor(name)) for name in merged.names())
    assert closeness(merged) == report.best.value
