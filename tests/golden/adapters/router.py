"""Gates from prompts: the file's model made live, its token ids and masks read by our encoder, layer by layer."""

from __future__ import annotations

from typing import Any

import torch

from modelglue.checkpoint import TensorsCheckpoint
from modelglue.mixture import Encoded, entering, gate_row
from modelglue.models import load_live
from tests.golden.cases import Adapter, Answer, Case


def _gates(case: Case) -> Answer:
    config = {"model_type": "llama", **case.params["config"]}
    model = load_live(TensorsCheckpoint(case.tensors("base"), config))
    layers, experts = config["num_hidden_layers"], case.params["num_experts"]
    answer = {}
    for name in case.tensors("expected"):
        mode = name.removeprefix("gate.")
        rows = [[_row(case, model, expert, mode, layer) for expert in range(experts)] for layer in range(layers)]
        answer[name] = torch.stack([torch.stack(row) for row in rows])
    return Answer(answer)


def _row(case: Case, model: Any, expert: int, mode: str, layer: int) -> torch.Tensor:
    positive, negative = (_encoded(case, model, f"data.expert{expert}.{side}", mode, layer) for side in ("positive", "negative"))
    assert positive is not None
    return gate_row(positive, negative, mode)


def _encoded(case: Case, model: Any, prefix: str, mode: str, layer: int) -> Encoded | None:
    prompts = case.tensors(prefix)
    if not prompts:
        return None
    ids = prompts["input_ids"]
    mask = prompts.get("attention_mask", torch.ones_like(ids))
    return Encoded(entering(model, ids, mask, 0 if mode == "cheap_embed" else layer), mask)


ADAPTERS: dict[str, Adapter] = {"model-glue/router-prompts-": _gates}
