"""Paths through the layers of several models: decoding, and folding held against the models' own code with scaled inputs."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from modelglue.checkpoint import Checkpoint, TensorsCheckpoint, open_checkpoint, save
from modelglue.errors import CheckpointError, RecipeError, UserError
from modelglue.models import load_live
from modelglue.models.build import empty_model
from modelglue.models.roles import decoder_layers
from modelglue.recipe import build, dump, read_recipe
from modelglue.recipe.dataflow import FlowSpace, Hop, depth, fold
from modelglue.recipe.residual import fold_factors

COMMON = {"vocab_size": 20, "hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 3, "max_position_embeddings": 32}
LLAMA = {**COMMON, "intermediate_size": 24, "num_key_value_heads": 1, "rms_norm_eps": 1e-6, "tie_word_embeddings": False}
#: (class, config) of pre-norm families that call things differently
FAMILIES: dict[str, dict[str, Any]] = {
    "LlamaForCausalLM": {"model_type": "llama", **LLAMA},
    "Qwen2ForCausalLM": {"model_type": "qwen2", **LLAMA, "layer_types": ["full_attention"] * 3},
    "Qwen3ForCausalLM": {"model_type": "qwen3", **LLAMA, "head_dim": 8},
    "MixtralForCausalLM": {"model_type": "mixtral", **LLAMA, "num_local_experts": 2, "num_experts_per_tok": 1},
    "GPTNeoXForCausalLM": {"model_type": "gpt_neox", **COMMON, "intermediate_size": 24, "use_parallel_residual": True},
    "GPT2LMHeadModel": {"model_type": "gpt2", "vocab_size": 20, "n_embd": 16, "n_head": 2, "n_layer": 3, "n_positions": 32},
    "OPTForCausalLM": {"model_type": "opt", **COMMON, "ffn_dim": 24, "word_embed_proj_dim": 16, "do_layer_norm_before": True},
    "PhiForCausalLM": {"model_type": "phi", **LLAMA},
    "FalconForCausalLM": {"model_type": "falcon", **COMMON, "new_decoder_architecture": True, "num_kv_heads": 1, "bias": True},
    "GemmaForCausalLM": {"model_type": "gemma", **LLAMA, "head_dim": 8, "tie_word_embeddings": True},
}
OFFSET_NORMS = ("GemmaForCausalLM",)


def made(name: str, seed: int, **config: Any) -> TensorsCheckpoint:
    """A model of a class with random weights, biases and norms included, under the names on disk."""
    whole = {"architectures": [name], **FAMILIES.get(name, {}), **config}
    model = empty_model(whole, name)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3 + (1.0 if parameter.ndim == 1 else 0.0))
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        stored = open_checkpoint(folder)
        tensors = {one: stored.tensor(one).clone() for one in stored.names()}
        return TensorsCheckpoint(tensors, {**stored.config, "architectures": [name]}, label=f"{name}-{seed}")


def members(name: str = "LlamaForCausalLM") -> dict[str, Checkpoint]:
    return {"a": made(name, 1), "b": made(name, 2)}


MODELS = members()
IDS = torch.tensor([[1, 5, 3, 2, 7], [4, 4, 9, 0, 19]])


def logits(checkpoint: Checkpoint, scales: Sequence[float] = ()) -> torch.Tensor:
    """What the model's own code says when the input of each layer is multiplied by its scale."""
    live = load_live(checkpoint)
    if scales:
        _, layers = decoder_layers(live)
        assert len(layers) == len(scales)
        for layer, scale in zip(layers, scales, strict=True):

            def scaled(_: Any, given: tuple[Any, ...], keys: dict[str, Any], scale: float = scale) -> Any:
                if given:
                    return (given[0] * scale, *given[1:]), keys
                return given, {**keys, "hidden_states": keys["hidden_states"] * scale}

            layer.register_forward_pre_hook(scaled, with_kwargs=True)
    with torch.no_grad():
        found: torch.Tensor = live(IDS, use_cache=False).logits
    return found


PATH = [("a", 0), ("a", 1), ("b", 1), ("b", 2), ("a", 1), ("a", 2)]


def hops(scales: Sequence[float]) -> list[Hop]:
    return [Hop(model, layer, scale) for (model, layer), scale in zip(PATH, scales, strict=True)]


# -- folding ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("sign", [1.0, -1.0], ids=["positive", "negative"])
def test_a_folded_path_computes_what_the_scaled_path_computes(name: str, sign: float) -> None:
    scales = [1.0, 0.6, sign * 1.5, 2.0, sign * 0.7, sign * 0.9]
    models = members(name)
    if sign < 0 and name in OFFSET_NORMS:
        with pytest.raises(CheckpointError, match=r"b, layer 1: the norms of gemma multiply by 1 \+ weight"):
            fold(hops(scales), models, "a")
        return
    plain = fold(hops([1.0] * 6), models, "a").checkpoint
    expected = logits(plain, scales)
    found = logits(fold(hops(scales), models, "a").checkpoint)
    assert (logits(plain) - expected).abs().max() > 1e-2  # the scales do something
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", ["LlamaForCausalLM", "GPT2LMHeadModel", "Qwen2ForCausalLM"])
def test_all_layers_of_a_model_in_order_are_that_model(name: str) -> None:
    models = members(name)
    folded = fold([Hop("b", number) for number in range(3)], models, "b")
    assert folded.warnings == ()
    assert folded.checkpoint.names() == models["b"].names()
    assert dict(folded.checkpoint.config) == dict(models["b"].config)
    for one in models["b"].names():
        assert torch.equal(folded.checkpoint.tensor(one), models["b"].tensor(one)), one
    assert not any(folded.checkpoint.computed(one) for one in folded.checkpoint.names())


@settings(max_examples=8, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(PATH), st.floats(0.3, 3.0), st.booleans()), min_size=1, max_size=5))
def test_any_path_folds(path: list[tuple[tuple[str, int], float, bool]]) -> None:
    scales = [scale * (-1 if negative else 1) for _, scale, negative in path]
    scaled = [Hop(model, layer, scale) for ((model, layer), _, _), scale in zip(path, scales, strict=True)]
    plain = [Hop(hop.model, hop.layer) for hop in scaled]
    expected = logits(fold(plain, MODELS, "a").checkpoint, scales)
    torch.testing.assert_close(logits(fold(scaled, MODELS, "a").checkpoint), expected, rtol=2e-3, atol=2e-3)


def test_what_a_folded_checkpoint_consists_of() -> None:
    folded = fold(hops([1.0, 2.0, -0.5, 1.0, 1.0, 1.0]), MODELS, "b").checkpoint
    a, b = MODELS["a"], MODELS["b"]
    assert folded.config["num_hidden_layers"] == 6
    assert torch.equal(folded.tensor("lm_head.weight"), b.tensor("lm_head.weight"))
    assert torch.equal(folded.tensor("model.embed_tokens.weight"), b.tensor("model.embed_tokens.weight"))
    assert torch.equal(folded.tensor("model.norm.weight"), -b.tensor("model.norm.weight"))
    layer = "model.layers.{}.mlp.down_proj.weight"
    assert torch.equal(folded.tensor(layer.format(0)), a.tensor(layer.format(0)))
    assert torch.equal(folded.tensor(layer.format(1)), a.tensor(layer.format(1)) * 0.5)
    assert torch.equal(folded.tensor(layer.format(2)), -b.tensor(layer.format(1)))
    assert torch.equal(folded.tensor("model.layers.2.input_layernorm.weight"), -b.tensor("model.layers.1.input_layernorm.weight"))
    assert torch.equal(folded.tensor("model.layers.2.mlp.up_proj.weight"), b.tensor("model.layers.1.mlp.up_proj.weight"))
    assert folded.describe()["hops"][1] == {"model": "LlamaForCausalLM-1", "layer": 1, "scale": 2.0}


def test_per_layer_settings_follow_the_layers() -> None:
    types = ["full_attention", "sliding_attention", "full_attention"]
    models = {"a": made("Qwen2ForCausalLM", 1), "b": made("Qwen2ForCausalLM", 2, layer_types=types)}
    folded = fold([Hop("a", 0), Hop("b", 1), Hop("b", 2), Hop("b", 1)], models, "a").checkpoint
    assert folded.config["layer_types"] == ["full_attention", "sliding_attention", "full_attention", "sliding_attention"]
    assert folded.config["num_hidden_layers"] == 4


def test_other_depths_may_meet(tmp_path: Path) -> None:
    models: dict[str, Checkpoint] = {"a": MODELS["a"], "deep": made("LlamaForCausalLM", 3, num_hidden_layers=5)}
    assert depth(models["deep"]) == 5
    folded = fold([Hop("a", 0), Hop("deep", 4, 0.5)], models, "a").checkpoint
    save(folded, tmp_path / "out", workers=1)
    back = open_checkpoint(str(tmp_path / "out"))
    assert back.config["num_hidden_layers"] == 2
    torch.testing.assert_close(logits(back), logits(folded))


def test_paths_that_cannot_be_built_are_refused() -> None:
    with pytest.raises(UserError, match="uses no layer"):
        fold([], MODELS, "a")
    with pytest.raises(UserError, match="uses 6 layers, allowed are 4"):
        fold(hops([1.0] * 6), MODELS, "a", max_layers=4)
    with pytest.raises(UserError, match="'c' is not among the models"):
        fold([Hop("c", 0)], MODELS, "a")
    with pytest.raises(UserError, match="hop 1: layer 3 of 'b'; allowed are 0 to 2"):
        fold([Hop("a", 0), Hop("b", 3)], MODELS, "a")
    with pytest.raises(UserError, match=r"hop 1: the scales up to here multiply to 0\.0"):
        fold([Hop("a", 0), Hop("a", 1, 0.0)], MODELS, "a")
    with pytest.raises(UserError, match="multiply to nan"):
        fold([Hop("a", 0, float("nan"))], MODELS, "a")
    wide = made("LlamaForCausalLM", 4, intermediate_size=30)
    with pytest.raises(CheckpointError, match=r"wide: layer 0 does not fit into 'a': mlp\.down_proj\.weight \[16, 30\] against \[16, 24\]"):
        fold([Hop("wide", 0)], {"a": MODELS["a"], "wide": wide}, "a")


def test_blocks_that_are_not_pre_norm_take_no_scale() -> None:
    olmo = made("Olmo2ForCausalLM", 1, model_type="olmo2", **LLAMA)
    assert len(fold([Hop("o", 1), Hop("o", 0)], {"o": olmo}, "o").checkpoint.names()) > 10
    with pytest.raises(CheckpointError, match=r"o, layer 0: is not known to be a pre-norm block .*post_feedforward_layernorm"):
        fold([Hop("o", 1), Hop("o", 0, 0.5)], {"o": olmo}, "o")
    names = ["self_attn_layer_norm.weight", "final_layer_norm.weight", "self_attn.out_proj.weight"]
    assert fold_factors(names, 2.0, {}, "x") == {"self_attn.out_proj.weight": 0.5}
    with pytest.raises(CheckpointError, match="is not known to be a pre-norm block"):
        fold_factors(names, 2.0, {"do_layer_norm_before": False}, "x")


def test_names_of_what_writes_into_the_stream() -> None:
    names = [
        "input_layernorm.weight", "post_attention_layernorm.weight", "self_attn.q_norm.weight", "self_attn.o_proj.bias",
        "mlp.experts.down_proj", "mlp.experts.down_proj_bias", "mlp.shared_expert.down_proj.weight", "mlp.gate.weight",
    ]  # fmt: skip
    assert fold_factors(names, -4.0, {"model_type": "any"}, "x") == {
        "input_layernorm.weight": -1.0, "post_attention_layernorm.weight": -1.0, "self_attn.o_proj.bias": -0.25,
        "mlp.experts.down_proj": -0.25, "mlp.experts.down_proj_bias": -0.25, "mlp.shared_expert.down_proj.weight": -0.25,
    }  # fmt: skip
    assert fold_factors(["anything"], 1.0, {}, "x") == {}


# -- the space -------------------------------------------------------------------------------------------------------------------


def test_slots_repeat_the_layers_of_all_models_in_order() -> None:
    space = FlowSpace({"a": 2, "b": 3}, repeats=2)
    assert space.layers == (("a", 0), ("a", 1), ("b", 0), ("b", 1), ("b", 2))
    assert (space.slots, space.most_layers) == (10, 4)
    assert space.decode(space.start()) == (Hop("a", 0), Hop("a", 1))
    indicators = np.full(10, -0.5)
    indicators[[0, 4, 5, 6]] = 0.1
    assert space.decode(indicators) == (Hop("a", 0), Hop("b", 2), Hop("a", 0), Hop("a", 1))
    assert space.decode(np.zeros(10)) == ()
    assert [hop.scale for hop in space.decode(indicators, np.arange(10) / 10)] == [0.0, 0.4, 0.5, 0.6]


def test_scales_between_pairs_of_layers() -> None:
    space = FlowSpace({"a": 2, "b": 1}, repeats=2)
    W = np.arange(9).reshape(3, 3) + 1.0
    indicators = [1, -1, 1, 1, 1, -1]  # a0, b0, a0, a1
    assert [hop.scale for hop in space.decode(indicators, W)] == [1.0, W[0, 2], W[2, 0], W[0, 1]]


def test_shapes_of_a_path_are_checked() -> None:
    with pytest.raises(UserError, match=r"allowed are \[6\], and \[6\] or \[3, 3\]"):
        FlowSpace({"a": 3}, repeats=2).decode(np.ones(5))


# -- recipes -----------------------------------------------------------------------------------------------------------------------


def path_recipe(**more: Any) -> dict[str, Any]:
    path = [
        {"model": model, "layer": layer, "scale": scale} for (model, layer), scale in zip(PATH, (1.0, 0.6, 1.5, 2.0, 0.7, 0.9), strict=True)
    ]
    return {"format": "modelglue/1", "method": "data_flow", "base": "b", "hops": path, **more}


def test_a_recipe_of_hops_is_the_path_and_a_path_describes_itself_by_its_recipe() -> None:
    built = build(read_recipe(path_recipe()), resolve=MODELS.__getitem__)
    expected = fold(hops([1.0, 0.6, 1.5, 2.0, 0.7, 0.9]), MODELS, "b").checkpoint
    again = build(read_recipe(built.describe()), resolve=lambda name: MODELS[{"LlamaForCausalLM-1": "a", "LlamaForCausalLM-2": "b"}[name]])
    for found in (built, again):
        assert found.names() == expected.names()
        assert dict(found.config) == dict(expected.config)
        assert all(torch.equal(found.tensor(name), expected.tensor(name)) for name in expected.names())
    assert built.describe()["method"] == "data_flow"
    assert read_recipe(yaml.safe_load(dump(read_recipe(path_recipe())))) == read_recipe(path_recipe())


def test_hops_may_be_layers_of_a_merge_which_is_made_once() -> None:
    blend = {"method": "linear", "models": [{"model": "a", "weight": 0.5}, {"model": "b", "weight": 0.5}]}
    recipe = read_recipe({"method": "data_flow", "base": "a", "hops": [{"model": blend, "layer": n} for n in range(3)]})
    found = build(recipe, resolve=MODELS.__getitem__)
    name = "model.layers.1.mlp.up_proj.weight"
    torch.testing.assert_close(found.tensor(name), (MODELS["a"].tensor(name) + MODELS["b"].tensor(name)) / 2)
    assert torch.equal(found.tensor("lm_head.weight"), MODELS["a"].tensor("lm_head.weight"))
    assert read_recipe(found.describe()).hops[2].layer == 2
    halves = {
        name: TensorsCheckpoint({one: model.tensor(one).bfloat16() for one in model.names()}, model.config)
        for name, model in MODELS.items()
    }
    stored = build(recipe, resolve=halves.__getitem__)
    assert {stored.info(one).dtype for one in stored.names()} == {"BF16"}, "layers of a merge are rounded as if it had been written"


def test_what_a_path_is_stored_in() -> None:
    found = build(read_recipe(path_recipe(dtype={"store": "bfloat16"})), resolve=MODELS.__getitem__)
    wide = build(read_recipe(path_recipe()), resolve=MODELS.__getitem__)
    assert {found.info(name).dtype for name in found.names()} == {"BF16"}
    assert found.config["dtype"] == "bfloat16"
    assert all(torch.equal(found.tensor(name), wide.tensor(name).bfloat16()) for name in wide.names())


def test_a_path_without_a_base_begins_with_its_first_model() -> None:
    recipe = {key: value for key, value in path_recipe().items() if key != "base"}
    found = build(read_recipe(recipe), resolve=MODELS.__getitem__)
    assert torch.equal(found.tensor("lm_head.weight"), MODELS["a"].tensor("lm_head.weight"))


@pytest.mark.parametrize(
    ("recipe", "fault"),
    [
        (path_recipe(method="linear"), "method: is 'linear'; a path of hops has the method data_flow."),
        ({"method": "data_flow", "models": [{"model": "a"}]}, "hops: is required by data_flow and missing"),
        (path_recipe(models=[{"model": "a"}]), "hops: stands beside models; a recipe has one of models, slices, modules, hops."),
        (path_recipe(parameters={"normalize": True}), "parameters: has no effect on a path of hops."),
        (path_recipe(hops=[{"model": "a", "layer": 0, "part": "x"}]), "hops[0].part: has no place in a path of hops."),
        (path_recipe(hops=[{"model": "a", "layer": -1}]), "hops[0].layer: is -1, allowed is a number >= 0"),
        (path_recipe(hops=[{"model": "a", "layers": [0, 1]}]), "layer"),
        (path_recipe(hops=[]), "hops"),
    ],
)
def test_recipes_of_paths_that_say_too_much_or_too_little(recipe: dict[str, Any], fault: str) -> None:
    with pytest.raises(RecipeError) as error:
        read_recipe(recipe)
    assert fault in str(error.value)


def test_faults_of_a_path_stand_at_its_hops() -> None:
    for number, (layer, scale, fault) in enumerate([(7, 1.0, "layer 7 of 'b'; allowed are 0 to 2"), (1, 0.0, "multiply to 0.0")]):
        recipe = read_recipe(path_recipe(hops=[{"model": "a", "layer": 0}, {"model": "b", "layer": layer, "scale": scale}]))
        with pytest.raises(UserError, match=r"hops\[1\]: " + fault if number == 0 else r"hops\[1\]: .*" + fault):
            build(recipe, resolve=MODELS.__getitem__)
