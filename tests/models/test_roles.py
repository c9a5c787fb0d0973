"""The parts of a model, read from its class: values frozen for six architectures."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from modelglue.errors import CheckpointError
from modelglue.models import Roles, decoder_layers, roles_of
from tests.models.tiny import config, random_model

_PLAIN = Roles(
    embedding="model.embed_tokens", layers="model.layers", count=2, attention=("self_attn",), feed_forward=("mlp",),
    norms=("input_layernorm", "post_attention_layernorm"), final_norm="model.norm", head="lm_head", tied=False,
)  # fmt: skip
_TIED = replace(_PLAIN, tied=True)
_EXPECTED = {
    "llama": _PLAIN,
    "llama-tied": _TIED,
    "mixtral": _PLAIN,
    "qwen2": _TIED,
    "gemma": _TIED,
    "gpt_neox": Roles(
        embedding="gpt_neox.embed_in", layers="gpt_neox.layers", count=3, attention=("attention",), feed_forward=("mlp",),
        norms=("input_layernorm", "post_attention_layernorm"), final_norm="gpt_neox.final_layer_norm", head="lm_head", tied=False,
    ),
    "gpt2": Roles(
        embedding="transformer.wte", layers="transformer.h", count=2, attention=("attn",), feed_forward=("mlp",),
        norms=("ln_1", "ln_2"), final_norm="transformer.ln_f", head="lm_head", tied=True,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", _EXPECTED)
def test_roles_of_an_architecture(name: str) -> None:
    found = roles_of(config(name))
    if found.head == "embed_out":  # what GPT-NeoX called it in the first releases of transformers 5
        found = replace(found, head="lm_head")
    assert found == _EXPECTED[name]


def test_every_live_tensor_of_a_mixtral_has_its_role() -> None:
    roles = roles_of(config("mixtral", num_hidden_layers=1))
    found = {name: roles.role(name) for name in random_model("mixtral", num_hidden_layers=1).state_dict()}
    assert found == {
        "model.embed_tokens.weight": "embedding",
        "model.layers.0.self_attn.q_proj.weight": "attention",
        "model.layers.0.self_attn.k_proj.weight": "attention",
        "model.layers.0.self_attn.v_proj.weight": "attention",
        "model.layers.0.self_attn.o_proj.weight": "attention",
        "model.layers.0.mlp.gate.weight": "feed_forward",
        "model.layers.0.mlp.experts.gate_up_proj": "feed_forward",
        "model.layers.0.mlp.experts.down_proj": "feed_forward",
        "model.layers.0.input_layernorm.weight": "norm",
        "model.layers.0.post_attention_layernorm.weight": "norm",
        "model.norm.weight": "norm",
        "lm_head.weight": "head",
    }
    assert roles.role("model.layers.0.adapter.weight") == "other"


def test_roles_allocate_nothing() -> None:
    huge = config("llama", hidden_size=2**16, intermediate_size=2**18, num_attention_heads=512, num_key_value_heads=512, vocab_size=10**6)
    assert roles_of(huge) == _PLAIN


def test_a_model_without_a_list_of_layers_is_named() -> None:
    class Flat(torch.nn.Module):
        config = random_model("llama").config

    with pytest.raises(CheckpointError, match=r"Flat: a list of 2 decoder layers was not found"):
        decoder_layers(Flat())


def test_an_unknown_class_is_an_error() -> None:
    with pytest.raises(CheckpointError, match=r"transformers cannot build model_type 'no-such-model'"):
        roles_of({"model_type": "no-such-model"})
