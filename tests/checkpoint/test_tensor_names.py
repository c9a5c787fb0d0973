"""Layers and roles from the names that real families give their tensors."""

from __future__ import annotations

import pytest

from modelglue.checkpoint.tensor_names import ROLES, layer_of, role_of

NAMES = {
    # Llama, Mistral, Qwen and everything built like them
    "model.embed_tokens.weight": ("embedding", None),
    "model.layers.0.self_attn.q_proj.weight": ("attention", ("model.layers", 0)),
    "model.layers.11.self_attn.q_norm.weight": ("norm", ("model.layers", 11)),
    "model.layers.11.mlp.gate_proj.weight": ("feed_forward", ("model.layers", 11)),
    "model.layers.11.post_attention_layernorm.weight": ("norm", ("model.layers", 11)),
    "model.norm.weight": ("norm", None),
    "lm_head.weight": ("head", None),
    # experts
    "model.layers.3.block_sparse_moe.experts.7.w1.weight": ("feed_forward", ("model.layers", 3)),
    "model.layers.3.block_sparse_moe.gate.weight": ("feed_forward", ("model.layers", 3)),
    "model.layers.3.mlp.shared_expert_gate.weight": ("feed_forward", ("model.layers", 3)),
    # GPT-2, GPT-NeoX, OPT, Falcon
    "transformer.wte.weight": ("embedding", None),
    "wpe.weight": ("embedding", None),
    "h.10.attn.c_attn.bias": ("attention", ("h", 10)),
    "h.10.ln_1.weight": ("norm", ("h", 10)),
    "transformer.ln_f.bias": ("norm", None),
    "gpt_neox.embed_in.weight": ("embedding", None),
    "gpt_neox.layers.2.attention.query_key_value.weight": ("attention", ("gpt_neox.layers", 2)),
    "gpt_neox.layers.2.mlp.dense_h_to_4h.weight": ("feed_forward", ("gpt_neox.layers", 2)),
    "gpt_neox.final_layer_norm.weight": ("norm", None),
    "embed_out.weight": ("head", None),
    "model.decoder.embed_positions.weight": ("embedding", None),
    "model.decoder.layers.0.fc1.weight": ("feed_forward", ("model.decoder.layers", 0)),
    "transformer.word_embeddings_layernorm.weight": ("norm", None),
    # T5: two stacks, and numbers inside a layer
    "shared.weight": ("embedding", None),
    "encoder.block.4.layer.0.SelfAttention.relative_attention_bias.weight": ("attention", ("encoder.block", 4)),
    "encoder.block.4.layer.1.DenseReluDense.wi_0.weight": ("feed_forward", ("encoder.block", 4)),
    "decoder.block.4.layer.1.EncDecAttention.k.weight": ("attention", ("decoder.block", 4)),
    "decoder.block.4.layer.2.layer_norm.weight": ("norm", ("decoder.block", 4)),
    # BERT
    "bert.embeddings.word_embeddings.weight": ("embedding", None),
    "bert.embeddings.LayerNorm.weight": ("norm", None),
    "bert.encoder.layer.1.attention.self.query.weight": ("attention", ("bert.encoder.layer", 1)),
    "bert.encoder.layer.1.attention.output.dense.bias": ("attention", ("bert.encoder.layer", 1)),
    "bert.encoder.layer.1.attention.output.LayerNorm.bias": ("norm", ("bert.encoder.layer", 1)),
    "bert.encoder.layer.1.intermediate.dense.weight": ("feed_forward", ("bert.encoder.layer", 1)),
    "bert.encoder.layer.1.output.dense.weight": ("feed_forward", ("bert.encoder.layer", 1)),
    "bert.pooler.dense.weight": ("other", None),
    "cls.predictions.decoder.weight": ("head", None),
    # vision and language
    "vision_tower.vision_model.embeddings.patch_embedding.weight": ("embedding", None),
    "vision_tower.vision_model.encoder.layers.5.self_attn.out_proj.weight": ("attention", ("vision_tower.vision_model.encoder.layers", 5)),
    "multi_modal_projector.linear_1.weight": ("other", None),
    # state space, diffusion
    "backbone.layers.0.mixer.in_proj.weight": ("other", ("backbone.layers", 0)),
    "backbone.norm_f.weight": ("norm", None),
    "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q.weight": ("attention", ("down_blocks", 1)),
    "down_blocks.1.attentions.0.transformer_blocks.0.ff.net.2.weight": ("feed_forward", ("down_blocks", 1)),
    "mid_block.resnets.0.conv1.weight": ("other", ("mid_block.resnets", 0)),
    # nobody's
    "w": ("other", None),
    "0.weight": ("other", None),
    "a.7": ("other", None),
}


@pytest.mark.parametrize("name", NAMES)
def test_role_and_layer(name: str) -> None:
    assert (role_of(name), layer_of(name)) == NAMES[name]


def test_every_role_has_an_example() -> None:
    assert {role for role, _ in NAMES.values()} == set(ROLES)
