"""SMEAR: the file's experts and router put into our modules."""

from __future__ import annotations

import torch

from modelglue.mixture.smear import Adapter, Smear, SmearRouter
from tests.golden.cases import Adapter as GoldenAdapter
from tests.golden.cases import Answer, Case


def _smear(case: Case) -> Answer:
    states, given = case.tensors("data"), case.tensors("data.router")
    width, count = given["weight"].shape
    normalize = case.params.get("normalize_router_weights", True)
    router = SmearRouter(
        width, count, normalize_weights=normalize, bias="bias" in given, eps=case.params.get("layer_norm_eps", 1e-5)
    )  # fmt: skip
    names = {"input_norm": "input_ln", "weight_norm": "weight_ln"}
    router.load_state_dict({name: given[".".join(names.get(part, part) for part in name.split("."))] for name in router.state_dict()})
    activation = case.params.get("activation", "silu")
    experts = [Adapter(one["down.weight"], one["up.weight"], one.get("down.bias"), one.get("up.bias"), activation) for one in case.models]
    module = Smear(experts, router).eval()
    with torch.inference_mode():
        mask = states.get("attention_mask")
        p = module.probabilities(states["x"], mask)
        return Answer({"logits": router(states["x"], mask), "probs": p, "output": module(states["x"], mask)})


ADAPTERS: dict[str, GoldenAdapter] = {"smear/": _smear}
