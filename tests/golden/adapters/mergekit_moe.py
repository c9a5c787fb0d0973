"""Gates at every layer, from hidden states that the file brings, and how well conditioned they are."""

from __future__ import annotations

import torch

from modelglue.mixture import Encoded, gate_row
from modelglue.mixture.layer_gates import conditions
from tests.golden.cases import Adapter, Answer, Case


def _gates(case: Case) -> Answer:
    layers = int(case.params["num_layers"])
    gates = {mode: torch.stack([_layer(case, mode, layer) for layer in range(layers)]) for mode in case.params["modes"]}
    answer = {f"gate.{mode}": gate for mode, gate in gates.items()}
    for name in case.tensors("expected"):
        if name.startswith("condition_number."):
            answer[name] = torch.tensor(conditions(gates[name.removeprefix("condition_number.")]))
    return Answer({name: answer[name] for name in case.tensors("expected")})


def _layer(case: Case, mode: str, layer: int) -> torch.Tensor:
    experts = {name.split(".")[0] for name in case.tensors("data") if name.startswith("expert")}
    rows = []
    for number in range(len(experts)):
        positive, negative = (_encoded(case, f"data.expert{number}.{side}", mode, layer) for side in ("positive", "negative"))
        assert positive is not None
        rows.append(gate_row(positive, negative, mode.removesuffix("_last")))
    return torch.stack(rows)


def _encoded(case: Case, prefix: str, mode: str, layer: int) -> Encoded | None:
    """The file's `hidden_avg` counts padding as mergekit does, so all of its positions are given as real."""
    side = case.tensors(prefix)
    if not side:
        return None
    mask = torch.ones_like(side["attention_mask"]) if mode == "hidden_avg" else side["attention_mask"]
    states = case.all_tensors["data.embed_tokens"][side["input_ids"]] if mode == "cheap_embed" else side["hidden_states"][layer]
    return Encoded(states, mask)


ADAPTERS: dict[str, Adapter] = {"mergekit-moe/": _gates}
