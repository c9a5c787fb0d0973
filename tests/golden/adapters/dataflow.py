"""A path through the layers of two models with scales, folded into an ordinary checkpoint: its logits."""

from __future__ import annotations

import torch

from modelglue.checkpoint import TensorsCheckpoint
from modelglue.models import load_live
from modelglue.recipe.dataflow import Hop, fold
from tests.golden.cases import Adapter, Answer, Case


def _logits(case: Case) -> Answer:
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "num_hidden_layers": case.params["layers"],
        "tie_word_embeddings": False, **case.params["config"],
    }  # fmt: skip
    members = {f"model{number}": TensorsCheckpoint(tensors, config) for number, tensors in enumerate(case.models)}
    data = case.tensors("data")
    hops = [
        Hop(f"model{model}", layer, scale)
        for model, layer, scale in zip(data["hop_model"].tolist(), data["hop_layer"].tolist(), data["hop_scale"].tolist(), strict=True)
    ]
    live = load_live(fold(hops, members, case.params["embedding_and_head_from"]).checkpoint)
    with torch.no_grad():
        return Answer({"logits": live(data["input_ids"]).logits})


ADAPTERS: dict[str, Adapter] = {"dataflow/": _logits}
