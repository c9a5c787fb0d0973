"""Mixtures inside one model: the file's models joined as an expression and run live."""

from __future__ import annotations

import torch

from modelglue.checkpoint import TensorsCheckpoint
from modelglue.mixture.gates import LinearGate
from modelglue.mixture.levels import LevelSpec, deciding_layers, join
from modelglue.models import load_live
from tests.golden.cases import Adapter, Answer, Case


def _mixture(case: Case) -> Answer:
    answer = {}
    for variant in case.params["variants"]:
        answer |= {f"{variant}.{name}": value for name, value in _variant(case, variant).items()}
    return Answer(answer)


def _variant(case: Case, variant: str) -> dict[str, torch.Tensor]:
    """One call on whole sequences, as the numbers were made: the route spans everything, and attention is the plain one."""
    params, asked = case.params, case.params["variants"][variant]
    config = {"model_type": "llama", "hidden_act": params.get("hidden_act", "silu"), **params["config"]}
    data = case.tensors("data")
    spec = LevelSpec(
        asked["level"], asked["routing"], top_k=asked["top_k"], merged_layers=params["num_dense_layers"], route_span="full",
        compat="official" if "attention_mask" in data else "none",
    )  # fmt: skip
    layers = deciding_layers(spec, config["num_hidden_layers"])
    experts = {f"expert{i}": TensorsCheckpoint(case.tensors(f"model{i}"), config) for i in range(params["num_experts"])}
    joined = join(experts, TensorsCheckpoint(case.tensors("base"), config), {n: LinearGate(data["gate"][n]) for n in layers}, spec)
    model = load_live(joined)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        output = model(data["input_ids"], attention_mask=data.get("attention_mask"), output_router_logits=True)
    routed = zip(layers, output.router_logits, strict=True)
    return {"logits": output.logits, **{f"router_logits.layer{layer}": value for layer, value in routed}}


ADAPTERS: dict[str, Adapter] = {"model-glue/mixture-": _mixture}
