"""The router's encoder with no more of its model in memory than what the router reads."""

from __future__ import annotations

from typing import Any

from modelglue.checkpoint import Checkpoint
from modelglue.mixture.router import Reader
from modelglue.models import load_tokenizer, roles_of
from modelglue.models.build import check_claims
from modelglue.models.mapped import load_mapped


def slim_reader(checkpoint: Checkpoint, layer: int) -> Reader:
    """The `Reader` of a checkpoint at one layer, in float32 as gates are made, bit for bit that of the whole model.

    Memory: the layers below `layer` in float32, and the rows of the embedding that texts use: the table stays in its file.
    """
    import torch

    check_claims(checkpoint, repr(checkpoint))
    roles = roles_of(checkpoint.config)
    above = tuple(f"{roles.layers}.{number}." for number in range(layer, roles.count))
    head = () if roles.head is None or roles.tied else (f"{roles.head}.",)
    model = load_mapped(checkpoint, wanted=lambda live: not live.startswith(above + head))
    embedding = model.get_input_embeddings()
    plain = type(embedding) is torch.nn.Embedding  # other classes compute with the table's dtype
    for name, parameter in model.named_parameters():
        if name.startswith(above + head) or (plain and parameter is embedding.weight):
            continue
        parameter.data = parameter.data.float()
    if plain:
        embedding.register_forward_hook(_in_float32)
    return Reader(model, load_tokenizer(checkpoint), layer)


def _in_float32(_module: Any, _arguments: Any, output: Any) -> Any:
    return output.float()
