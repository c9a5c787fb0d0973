"""Layers told from names: the stacks, towers and ends of real architectures, and the config of a model whose layers change."""

from __future__ import annotations

from typing import Any

import pytest

from modelglue.recipe.layer_config import LayerSource, layer_fields
from modelglue.recipe.layers import find_tower, kind_of, towers_of


def stack(start: str, count: int, *rest: str) -> list[str]:
    return [f"{start}.{number}.{name}" for number in range(count) for name in (rest or ("mlp.weight", "norm.weight"))]


LLAMA = [*stack("model.layers", 4), "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"]
LLAVA = [
    *(f"language_model.{name}" for name in LLAMA), *stack("vision_tower.vision_model.encoder.layers", 2),
    "vision_tower.vision_model.embeddings.patch_embedding.weight", "vision_tower.vision_model.post_layernorm.weight",
    "multi_modal_projector.linear_1.weight",
]  # fmt: skip
QWEN3_VL = [
    *stack("model.language_model.layers", 4), "model.language_model.embed_tokens.weight", "model.language_model.norm.weight",
    *stack("model.visual.blocks", 3), *stack("model.visual.deepstack_merger_list", 2, "linear_fc1.weight"),
    "model.visual.patch_embed.proj.weight", "model.visual.merger.linear_fc1.weight", "lm_head.weight",
]  # fmt: skip
T5 = [
    *stack("encoder.block", 2, "layer.0.SelfAttention.q.weight", "layer.1.DenseReluDense.wi.weight"),
    *stack("decoder.block", 3, "layer.0.SelfAttention.q.weight", "layer.1.EncDecAttention.q.weight"),
    "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight", "shared.weight", "encoder.final_layer_norm.weight",
    "decoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight", "decoder.final_layer_norm.weight", "lm_head.weight",
]  # fmt: skip


@pytest.mark.parametrize(
    ("names", "config", "towers"),
    [
        (LLAMA, {}, {"default": ("model.layers", 4)}),
        ([name.replace("model.layers", "h") for name in LLAMA], {"n_layer": 4}, {"default": ("h", 4)}),
        (LLAVA, {"text_config": {"num_hidden_layers": 4}, "vision_config": {"num_hidden_layers": 2}}, {
            "language_model": ("language_model.model.layers", 4),
            "vision_tower": ("vision_tower.vision_model.encoder.layers", 2),
            "multi_modal_projector": (None, 0),
        }),
        (QWEN3_VL, {"text_config": {"num_hidden_layers": 4}, "vision_config": {"depth": 3}}, {
            "language_model": ("model.language_model.layers", 4), "visual": ("model.visual.blocks", 3),
        }),
        (T5, {"is_encoder_decoder": True, "num_layers": 2, "num_decoder_layers": 3}, {
            "encoder": ("encoder.block", 2), "decoder": ("decoder.block", 3),
        }),
        # a head with numbered parts, a second stack for other tokens: still one tower
        ([*LLAMA, *stack("score", 2, "weight"), *stack("mtp.layers", 1)], {"num_hidden_layers": 4}, {"default": ("model.layers", 4)}),
        (["a.weight", "b.weight"], {}, {"default": (None, 0)}),
        ([*stack("merger.mlp", 3, "weight")[::2], "x.weight"], {}, {"default": (None, 0)}),
    ],
)  # fmt: skip
def test_towers(names: list[str], config: dict[str, Any], towers: dict[str, tuple[str | None, int]]) -> None:
    found = towers_of(names, config)
    assert {tower.name: (tower.stack, tower.count) for tower in found} == towers
    assert sorted(name for tower in found for name in tower.names) == sorted(names)


def test_what_stands_before_and_after() -> None:
    [llama] = towers_of(LLAMA, {})
    assert (llama.before, llama.after) == (("model.embed_tokens.weight",), ("lm_head.weight", "model.norm.weight"))
    towers = {tower.name: tower for tower in towers_of(T5, {"is_encoder_decoder": True})}
    assert towers["encoder"].before == ("encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight", "shared.weight")
    assert towers["decoder"].after == ("decoder.final_layer_norm.weight", "lm_head.weight")
    others = [
        "bert.embeddings.LayerNorm.weight", "transformer.word_embeddings_layernorm.weight", "model.rotary_emb.inv_freq",
        "model.decoder.project_in.weight", "vision_model.pre_layrnorm.bias", "transformer.wpe.weight",
    ]  # fmt: skip
    ends = ["embed_out.weight", "model.decoder.project_out.weight", "ln_f.bias", "cls.predictions.bias", "bert.pooler.dense.weight"]
    [tower] = towers_of([*others, *ends], {})
    assert (tower.before, tower.after) == (tuple(sorted(others)), tuple(sorted(ends)))


def test_positions() -> None:
    [llama] = towers_of(LLAMA, {})
    places = [llama.position_of(f"model.layers.{number}.mlp.weight") for number in range(4)]
    assert places == [0.0, 1 / 3, 2 / 3, 1.0]
    assert llama.position_of("lm_head.weight") == llama.position_of("model.norm.weight") == 0.0
    [single] = towers_of(stack("model.layers", 1), {})
    assert single.position_of("model.layers.0.mlp.weight") == 1.0


def test_layers_beyond_the_configs_count_are_not_counted() -> None:
    """The last layer of some models predicts the token after the next."""
    [tower] = towers_of(LLAMA, {"num_hidden_layers": 3})
    assert tower.count == 3
    assert {name for name in tower.after if ".layers." in name} == {"model.layers.3.mlp.weight", "model.layers.3.norm.weight"}
    assert tower.renumbered("model.layers.3.mlp.weight", 2) == "model.layers.5.mlp.weight"
    assert tower.position_of("model.layers.2.mlp.weight") == 1.0
    assert tower.position_of("model.layers.3.mlp.weight") == 0.0


def test_names_of_towers() -> None:
    llava = towers_of(LLAVA, {"text_config": {}})
    for said in ("language_model", "text_decoder", "text_model", "text", "decoder"):
        tower = find_tower(said, llava)
        assert tower is not None
        assert tower.name == "language_model"
    for said in ("vision_tower", "vision_model", "visual", "vision_encoder"):
        tower = find_tower(said, llava)
        assert tower is not None
        assert tower.name == "vision_tower"
    assert find_tower("audio_tower", llava) is None
    assert find_tower("model", llava) is find_tower("enc", llava) is None  # words that say nothing mean nothing
    assert find_tower("default", llava) is None
    [llama] = towers_of(LLAMA, {})
    assert find_tower("default", [llama]) is find_tower("text_decoder", [llama]) is llama
    assert [kind_of(name) for name in ("vision_encoder", "text_decoder", "decoder", "encoder", "model", "audio_tower")] == [
        "vision", "text", "decoder", "encoder", "text", "audio",
    ]  # fmt: skip


def sources(config: dict[str, Any], *numbers: int) -> list[LayerSource]:
    return [LayerSource(config, number) for number in numbers]


@pytest.mark.parametrize(
    ("names", "config", "numbers", "fields"),
    [
        (LLAMA, {"num_hidden_layers": 4}, (0, 1, 1, 2, 3), {"num_hidden_layers": 5}),
        (LLAMA, {"n_layer": 4}, (0, 1), {"n_layer": 2}),
        (
            LLAMA,
            {"num_hidden_layers": 4, "layer_types": ["a", "b", "c", "d"], "eos_token_id": [1, 2, 3, 4], "mlp_only_layers": [0, 3]},
            (0, 3, 3, 1),
            {"num_hidden_layers": 4, "layer_types": ["a", "d", "d", "b"], "mlp_only_layers": [0, 1, 2]},
        ),
        (LLAMA, {"num_hidden_layers": 4, "hybrid_override_pattern": "M-*M"}, (2, 0), {
            "num_hidden_layers": 2, "hybrid_override_pattern": "*M",
        }),
    ],
)  # fmt: skip
def test_config_of_other_layers(names: list[str], config: dict[str, Any], numbers: tuple[int, ...], fields: dict[str, Any]) -> None:
    [tower] = towers_of(names, config)
    assert layer_fields(config, tower, "text", sources(config, *numbers)) == (fields, [])


def test_items_come_from_the_model_of_the_layer() -> None:
    ours, theirs = ({"num_hidden_layers": 4, "layer_types": [kind] * 4} for kind in "ab")
    [tower] = towers_of(LLAMA, ours)
    fields, _ = layer_fields(ours, tower, "text", [*sources(ours, 0, 1), *sources(theirs, 2, 3)])
    assert fields["layer_types"] == ["a", "a", "b", "b"]


def test_config_of_towers() -> None:
    config: dict[str, Any] = {"text_config": {"num_hidden_layers": 4}, "vision_config": {"num_hidden_layers": 2}}
    text, vision, _ = towers_of(LLAVA, config)
    assert layer_fields(config, text, text.kind, sources(config, 0, 1))[0] == {"text_config": {"num_hidden_layers": 2}}
    assert layer_fields(config, vision, vision.kind, sources(config, 1))[0] == {"vision_config": {"num_hidden_layers": 1}}
    config = {"is_encoder_decoder": True, "num_layers": 2, "num_decoder_layers": 3}
    towers = {tower.name: tower for tower in towers_of(T5, config)}
    assert layer_fields(config, towers["encoder"], "encoder", sources(config, 0))[0] == {"num_layers": 1}
    assert layer_fields(config, towers["decoder"], "decoder", sources(config, 0, 1, 2, 2))[0] == {"num_decoder_layers": 4}
    equal = {"is_encoder_decoder": True, "num_layers": 3}  # the decoder is as deep as the encoder unless it says so
    assert layer_fields(equal, towers["decoder"], "decoder", sources(equal, 0))[0] == {"num_decoder_layers": 1}


def test_rules_by_layer_number_are_named() -> None:
    config = {"num_hidden_layers": 4, "first_k_dense_replace": 1, "full_attention_interval": 4, "moe_layer_freq": 1}
    [tower] = towers_of(LLAMA, config)
    assert layer_fields(config, tower, "text", sources(config, 0, 1, 2))[1] == []
    assert [text.split("'")[1] for text in layer_fields(config, tower, "text", sources(config, 0, 1, 0))[1]] == [
        "full_attention_interval: 4", "first_k_dense_replace: 1",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("rules", "numbers", "moved"),
    [
        ({"first_k_dense_replace": 1}, (0, 0, 1, 1), {"first_k_dense_replace": 2}),
        ({"first_k_dense_replace": 2}, (2, 3), {"first_k_dense_replace": 0}),
        ({"max_window_layers": 1}, (0, 0, 1), {"max_window_layers": 2}),
        ({"max_window_layers": 4}, (0, 1, 2, 3, 0, 1, 2, 3), {"max_window_layers": 8}),
        ({"decoder_sparse_step": 2}, (0, 1, 2, 1, 2, 3), {}),
        ({"attn_layer_period": 2, "attn_layer_offset": 1}, (2, 3), {}),
        ({"model_type": "gemma2"}, (0, 1, 0, 1), {}),
        ({"model_type": "gemma2"}, (0, 0, 1), {"layer_types": ["sliding_attention", "sliding_attention", "full_attention"]}),
        (
            {"model_type": "gemma3_text", "sliding_window_pattern": 2}, (1, 2),
            {"layer_types": ["full_attention", "sliding_attention"]},
        ),
    ],
)  # fmt: skip
def test_rules_by_layer_number_move_with_the_layers(rules: dict[str, Any], numbers: tuple[int, ...], moved: dict[str, Any]) -> None:
    config = {"num_hidden_layers": 4, **rules}
    [tower] = towers_of(LLAMA, config)
    assert layer_fields(config, tower, "text", sources(config, *numbers)) == ({"num_hidden_layers": len(numbers), **moved}, [])


def test_a_rule_that_differs_between_models_is_not_moved() -> None:
    ours, theirs = {"num_hidden_layers": 4, "max_window_layers": 1}, {"num_hidden_layers": 4, "max_window_layers": 2}
    [tower] = towers_of(LLAMA, ours)
    _, odd = layer_fields(ours, tower, "text", [*sources(ours, 0, 0), *sources(theirs, 1)])
    assert [text.split("'")[1] for text in odd] == ["max_window_layers: 1"]
