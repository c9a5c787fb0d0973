"""From recipes to expressions: slices, modules, sub-models, tensors that only some models have, and what the output says."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

import modelglue
from modelglue.checkpoint import Checkpoint, TensorsCheckpoint, save
from modelglue.errors import MergeError, RecipeError, UserError
from modelglue.recipe import build, build_with_warnings, check, read_recipe
from tests.recipe.on_disk import WORDS, write_model, write_recipe
from tests.zoo.models import CONFIG, tensors

UP = "model.layers.{}.mlp.up_proj.weight"


def models(**weights: Mapping[str, torch.Tensor]) -> dict[str, Checkpoint]:
    """Checkpoints in memory, with a config that tells their layers."""
    found: dict[str, Checkpoint] = {}
    for label, value in weights.items():
        count = len({name.split(".")[2] for name in value if name.startswith("model.layers.")})
        config = {**CONFIG, "num_hidden_layers": count, "layer_types": [f"{label}{n}" for n in range(count)]}
        found[label] = TensorsCheckpoint(value, config, label=label)
    return found


def merged(value: Mapping[str, Any], opened: Mapping[str, Checkpoint]) -> Checkpoint:
    return build(read_recipe(value), resolve=opened.__getitem__)


def found_odd(value: Mapping[str, Any], opened: Mapping[str, Checkpoint]) -> tuple[str, ...]:
    return build_with_warnings(read_recipe(value), opened.__getitem__).warnings


def refused(value: Mapping[str, Any] | Path, opened: Mapping[str, Checkpoint]) -> list[str]:
    with pytest.raises((RecipeError, MergeError)) as caught:
        build(read_recipe(value), resolve=opened.__getitem__)
    return str(caught.value).split("\n")


def linear(*names: str, **more: Any) -> dict[str, Any]:
    return {"method": "linear", "models": [{"model": name, "weight": 1} for name in names], **more}


# -- slices -------------------------------------------------------------------------------------------------------------------------


def test_a_stack_of_layers() -> None:
    opened = models(a=tensors(1, layers=3), b=tensors(2, layers=4))
    part = [[{"model": "a", "layers": [0, 2]}], [{"model": "b", "layers": [1, 4]}], [{"model": "a", "layers": [1, 2]}]]
    found = merged({"method": "passthrough", "slices": [{"models": entries} for entries in part]}, opened)
    a, b = tensors(1, layers=3), tensors(2, layers=4)
    origin = [(a, 0), (a, 1), (b, 1), (b, 2), (b, 3), (a, 1)]
    for layer, (source, number) in enumerate(origin):
        for name in (name for name in a if name.startswith("model.layers.0.")):
            rest = name.removeprefix("model.layers.0.")
            assert torch.equal(found.tensor(f"model.layers.{layer}.{rest}"), source[f"model.layers.{number}.{rest}"])
    assert torch.equal(found.tensor("model.embed_tokens.weight"), a["model.embed_tokens.weight"])
    assert torch.equal(found.tensor("lm_head.weight"), a["lm_head.weight"])
    assert len(found.names()) == 6 * 6 + 2
    assert found.config["num_hidden_layers"] == 6
    assert found.config["layer_types"] == ["a0", "a1", "b1", "b2", "b3", "a1"]


def test_filters_see_the_name_in_the_model_for_its_own_parameters_and_the_outputs_name_for_global_ones() -> None:
    opened = models(a=tensors(1, layers=4))
    part = [
        {"models": [{"model": "a", "layers": [0, 2], "weight": 1}]},
        {"models": [{"model": "a", "layers": [1, 3], "weight": [{"filter": "layers.1.", "value": 10}, {"value": 1}]}]},
    ]
    shared = {"normalize": [{"filter": "layers.2.", "value": False}, {"value": True}]}
    found = merged({"method": "linear", "slices": part, "parameters": shared}, opened)
    a = tensors(1, layers=4)
    torch.testing.assert_close(found.tensor(UP.format(2)), 10 * a[UP.format(1)])  # input layer 1, output layer 2
    torch.testing.assert_close(found.tensor(UP.format(3)), a[UP.format(2)])
    assert torch.equal(found.tensor(UP.format(1)), a[UP.format(1)])


def test_gradients_start_anew_in_every_slice_and_an_only_layer_stands_at_the_end() -> None:
    opened = models(a={name: torch.ones_like(value) for name, value in tensors(1, layers=4).items()})
    part = [{"models": [{"model": "a", "layers": layers, "scale": [2.0, 4.0]}]} for layers in ([0, 3], [3, 4])]
    found = merged({"method": "passthrough", "slices": part}, opened)
    assert [found.tensor(UP.format(layer))[0, 0].item() for layer in range(4)] == [2.0, 3.0, 4.0, 4.0]
    assert found.tensor("lm_head.weight")[0, 0].item() == 2.0


def test_the_base_of_a_slice_gives_its_own_layers() -> None:
    opened = models(base=tensors(0, layers=4), a=tensors(1, layers=2))
    part = {"base": {"model": "base", "layers": [2, 4]}, "models": [{"model": "a", "layers": [0, 2], "weight": 0.5}]}
    found = merged({"method": "task_arithmetic", "base": "base", "slices": [part]}, opened)
    base, a = tensors(0, layers=4), tensors(1, layers=2)
    torch.testing.assert_close(found.tensor(UP.format(1)), base[UP.format(3)] + 0.5 * (a[UP.format(1)] - base[UP.format(3)]))
    assert found.config["num_hidden_layers"] == 2


def test_ranges_beyond_the_models_are_all_named_with_their_lines(tmp_path: Path) -> None:
    text = """\
method: passthrough
slices:
  - models: [{model: a, layers: [0, 3]}]
  - models:
      - {model: b, layers: [1, 9]}
"""
    lines = refused(write_recipe(tmp_path / "r.yaml", text), models(a=tensors(1), b=tensors(2)))
    assert [line.removeprefix(f"{tmp_path}/") for line in lines] == [
        "r.yaml:3: slices[0].models[0].layers: is [0, 3], but a has the layers 0 to 1.",
        "r.yaml:5: slices[1].models[0].layers: is [1, 9], but b has the layers 0 to 1.",
    ]


def test_whole_models_of_different_depth_are_refused_with_the_way_out() -> None:
    [fault] = refused(linear("a", "b"), models(a=tensors(1, layers=2), b=tensors(2, layers=3)))
    assert "the models have different numbers of layers: a has 2, b has 3. Say under slices: which to merge." in fault


def test_a_number_of_layers_that_the_config_leaves_to_a_default_is_written() -> None:
    """Older vision-language configs list only what is not usual."""
    vlm = pictures(1)
    text = {key: value for key, value in vlm.config["text_config"].items() if key != "num_hidden_layers"}
    weights = {name: vlm.tensor(name) for name in vlm.names()}
    opened = {"vlm": TensorsCheckpoint(weights, {**vlm.config, "text_config": text}, label="vlm")}

    def stack(*ranges: list[int]) -> dict[str, Any]:
        slices = [{"models": [{"model": "vlm", "layers": layers}]} for layers in ranges]
        return {"method": "passthrough", "modules": {"text_decoder": {"slices": slices}}}

    assert merged(stack([0, 2], [1, 2]), opened).config["text_config"] == {**text, "num_hidden_layers": 3}
    said = (
        "the config does not say how many layers language_model has, and now there are 3 instead of 2; 'num_hidden_layers: 3' is written."
    )
    assert any(said in one for one in found_odd(stack([0, 2], [1, 2]), opened))
    assert merged(stack([0, 1], [1, 2]), opened).config["text_config"] == text


def test_layers_that_the_config_of_the_output_does_not_fit_are_said() -> None:
    wide = {name: value.repeat(2, 1) if "up_proj" in name else value for name, value in tensors(2).items()}
    opened = models(a=tensors(1), wide=wide)
    said = (
        "'model.layers.1.mlp.up_proj.weight' has shape [20, 6], in a it has [10, 6]; the config of a, which the output takes, does not fit."
    )
    part = [{"models": [{"model": name, "layers": [0, 1]}]} for name in ("a", "wide")]
    assert found_odd({"method": "passthrough", "slices": part}, opened) == (f"<recipe>: slices[1]: tensor {said}",)
    other = {"method": "passthrough", "base": "a", "slices": [{"models": [{"model": "wide", "layers": [0, 2]}]}]}
    [odd] = found_odd(other, opened)
    assert "(and 1 more tensors differ); the config of a, which the output takes, does not fit." in odd
    assert found_odd({"method": "passthrough", "slices": [part[0], part[0]]}, opened) == ()


def test_a_base_that_gives_only_its_config_is_one_of_the_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The recipe in the output names it by its path from there, and it is not written over."""
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate(("base", "a")):
        write_model(tmp_path / name, seed, note=name)
    value = {"method": "passthrough", "base": "base", "slices": [{"models": [{"model": "a", "layers": [0, 2]}]}]}
    save(modelglue.merge(value), tmp_path / "deep" / "out")
    again = modelglue.merge(tmp_path / "deep" / "out" / "modelglue_recipe.yaml")
    assert again.config == modelglue.open("base").config
    with pytest.raises(UserError, match="which is read here"):
        save(again, tmp_path / "base", overwrite=True)


def test_layers_that_are_not_numbered_without_a_gap_are_none() -> None:
    """Said wherever the layers would count: of slices, and of gradients, which would take their first number everywhere."""
    pruned = {name: value for name, value in tensors(1, layers=3).items() if "layers.1." not in name}
    opened = {"a": TensorsCheckpoint(pruned, CONFIG, label="a")}
    why = "no tensors' names are numbered 0, 1, ... without a gap"
    [fault] = refused({"method": "passthrough", "slices": [{"models": [{"model": "a", "layers": [0, 2]}]}]}, opened)
    assert fault == f"<recipe>: slices[0].models[0].layers: is [0, 2], but a has no layers: {why}."
    weights = [{"model": "a", "weight": [1, 2]}]
    said = f"<recipe>: a gradient runs over the layers, and there are none: {why}. Its first number counts everywhere."
    assert found_odd({"method": "linear", "models": weights}, opened) == (said,)
    assert found_odd({"method": "linear", "models": [{"model": "a", "weight": [2, 2]}]}, opened) == ()


def test_slices_of_a_model_with_several_towers_belong_into_modules() -> None:
    [fault] = refused({"method": "passthrough", "slices": [{"models": [{"model": "t", "layers": [0, 1]}]}]}, {"t": t5()})
    assert "the model has several parts with layers of their own (decoder, encoder); give slices for each under modules:." in fault


# -- parameters that only headers can judge -------------------------------------------------------------------------------------------


def test_every_parameter_that_stays_open_is_named_with_model_tensor_and_line(tmp_path: Path) -> None:
    text = """\
method: linear
models:
  - model: a
    weight: [{filter: mlp, value: 1}]
  - model: b
    weight: {filter: self_attn, value: 1}
parameters:
  normalize: [0, 1]
"""
    lines = refused(write_recipe(tmp_path / "r.yaml", text), models(a=tensors(1, layers=3), b=tensors(2, layers=3)))
    assert [line.removeprefix(f"{tmp_path}/") for line in lines] == [
        "r.yaml:4: models[0].weight: model a: 'weight' is required by linear and missing (tensor 'lm_head.weight' and 13 more).",
        "r.yaml:6: models[1].weight: model b: 'weight' is required by linear and missing (tensor 'lm_head.weight' and 10 more).",
        "r.yaml:8: parameters.normalize: normalize is 0.5, allowed is true or false "
        "(tensor 'model.layers.1.input_layernorm.weight' and 5 more).",
    ]


def test_filters_that_match_nothing_are_said(tmp_path: Path) -> None:
    path = write_recipe(
        tmp_path / "r.yaml", "method: linear\nmodels:\n  - model: a\n    weight:\n      - {filter: mpl, value: 1}\n      - {value: 2}\n"
    )
    opened = models(a=tensors(1))
    odd = build_with_warnings(read_recipe(path), opened.__getitem__).warnings
    assert [text.removeprefix(f"{tmp_path}/") for text in odd] == ["r.yaml:4: models[0].weight: the filter 'mpl' matches no tensor."]
    with pytest.raises(RecipeError, match="the filter 'mpl' matches no tensor"):
        build_with_warnings(read_recipe(path), opened.__getitem__, strict=True)
    stacked = [{"models": [{"model": "a", "layers": [0, 2], "weight": 1}]}] * 2
    value = {"method": "linear", "slices": stacked, "parameters": {"normalize": [{"filter": "layers.3.", "value": False}, {"value": True}]}}
    assert found_odd(value, opened) == ()  # a name of the output


# -- modules ------------------------------------------------------------------------------------------------------------------------


def t5(seed: int = 0, depths: tuple[int, int] = (2, 3)) -> TensorsCheckpoint:
    generator = torch.Generator().manual_seed(seed)
    names = [
        f"{tower}.block.{n}.layer.0.SelfAttention.q.weight"
        for tower, count in zip(("encoder", "decoder"), depths, strict=True)
        for n in range(count)
    ]
    names += ["shared.weight", "encoder.final_layer_norm.weight", "decoder.final_layer_norm.weight", "lm_head.weight"]
    numbers = {"num_layers": depths[0], "num_decoder_layers": depths[1]}
    config = {"is_encoder_decoder": True, **numbers, "architectures": ["T5"], "dtype": "float32"}
    return TensorsCheckpoint({name: torch.randn(4, 2, generator=generator) for name in names}, config, label=f"t{seed}")


def test_modules_are_merged_each_and_what_is_not_mentioned_is_copied() -> None:
    opened = {f"t{seed}": t5(seed) for seed in range(2)}
    value = {
        "method": "linear",
        "modules": {"encoder": {"models": [{"model": "t0", "weight": [0.0, 1.0]}, {"model": "t1", "weight": 1.0}]}},
        "dtype": {"store": "bfloat16"},
    }
    found = merged(value, opened)
    name = "encoder.block.{}.layer.0.SelfAttention.q.weight"
    torch.testing.assert_close(found.tensor(name.format(0)).float(), opened["t1"].tensor(name.format(0)), rtol=1e-2, atol=1e-2)
    mean = (opened["t0"].tensor(name.format(1)) + opened["t1"].tensor(name.format(1))) / 2
    assert torch.equal(found.tensor(name.format(1)), mean.bfloat16())
    decoder = "decoder.block.2.layer.0.SelfAttention.q.weight"
    assert torch.equal(found.tensor(decoder), opened["t0"].tensor(decoder).bfloat16())
    assert found.names() == opened["t0"].names()
    assert found.config == {**opened["t0"].config, "dtype": "bfloat16"}
    assert found_odd(value, opened) == ("<recipe>: modules: does not say what becomes of 'decoder'; it is copied from t0.",)


def test_a_deeper_module_of_another_model_counts_its_layers() -> None:
    """The config is the first model's, the encoder is not: loaders would leave out what lies beyond the number that they read."""
    opened = {"t0": t5(0), "t1": t5(1, depths=(4, 3))}
    value = {
        "method": "linear",
        "modules": {
            "decoder": {"models": [{"model": "t0", "weight": 1}]},
            "encoder": {"models": [{"model": "t1", "weight": [0, 3]}], "parameters": {"normalize": False}},
        },
    }
    found = merged(value, opened)
    assert (found.config["num_layers"], found.config["num_decoder_layers"]) == (4, 3)
    name = "encoder.block.{}.layer.0.SelfAttention.q.weight"
    for number in range(4):  # a gradient over the layers that there are
        torch.testing.assert_close(found.tensor(name.format(number)), number * opened["t1"].tensor(name.format(number)))


def test_modules_may_be_cut_into_slices() -> None:
    opened = {"t0": t5(0)}
    layers = [[0, 3], [1, 3]]
    value = {
        "method": "passthrough",
        "modules": {
            "decoder": {"slices": [{"models": [{"model": "t0", "layers": one}]} for one in layers]},
            "encoder": {"models": [{"model": "t0"}]},
        },
    }
    found = merged(value, opened)
    assert (found.config["num_layers"], found.config["num_decoder_layers"]) == (2, 5)
    name = "decoder.block.{}.layer.0.SelfAttention.q.weight"
    for layer, number in enumerate((0, 1, 2, 1, 2)):
        assert torch.equal(found.tensor(name.format(layer)), opened["t0"].tensor(name.format(number)))
    assert len(found.names()) == len(opened["t0"].names()) + 2
    assert found_odd(value, opened) == ()


def test_modules_that_are_none_are_refused() -> None:
    value = {"method": "passthrough", "modules": {name: {"models": [{"model": "t"}]} for name in ("encoder", "vision_tower")}}
    [fault] = refused(value, {"t": t5()})
    assert fault == "<recipe>: modules.vision_tower: there is no such part of the model. Its parts: decoder, encoder."


# -- sub-models -----------------------------------------------------------------------------------------------------------------------


def pictures(seed: int) -> TensorsCheckpoint:
    """A vision-language model whose language tower is that of `tensors(seed)`."""
    generator = torch.Generator().manual_seed(100 + seed)
    weights = {f"language_model.{name}": value for name, value in tensors(seed).items()}
    for name in ("vision_tower.layers.0.weight", "vision_tower.layers.1.weight", "multi_modal_projector.weight"):
        weights[name] = torch.randn(3, 2, generator=generator)
    text = {key: value for key, value in CONFIG.items() if key != "architectures"}
    config = {"architectures": ["Pictures"], "model_type": "pictures", "text_config": text, "vision_config": {"num_hidden_layers": 2}}
    return TensorsCheckpoint(weights, config, label="vlm")


def test_the_language_tower_is_merged_with_a_language_model() -> None:
    opened = {"vlm": pictures(1), **models(llm=tensors(2))}
    entries = [{"model": "vlm", "part": "language_model", "weight": 1}, {"model": "llm", "weight": 3}]
    found = merged({"method": "linear", "models": entries}, opened)
    assert found.names() == opened["llm"].names()
    torch.testing.assert_close(found.tensor(UP.format(0)), (tensors(1)[UP.format(0)] + 3 * tensors(2)[UP.format(0)]) / 4)
    assert found.config == opened["vlm"].config["text_config"]


def test_a_merge_goes_back_into_the_model_and_the_rest_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    vlm = pictures(1)
    write_model(tmp_path / "vlm", weights={name: vlm.tensor(name) for name in vlm.names()}, **vlm.config)
    write_model(tmp_path / "llm", 2)
    text = """\
method: linear
models:
  - {model: vlm, part: {language_model.model: model, language_model.lm_head: lm_head}, weight: 1}
  - {model: llm, weight: [0, 1]}
into: {model: vlm, part: language_model}
dtype: {store: bfloat16}
"""
    write_recipe(tmp_path / "r.yaml", text)
    save(modelglue.merge("r.yaml"), "out")
    save(modelglue.merge("out/modelglue_recipe.yaml"), "again")
    found, again = load_file("out/model.safetensors"), load_file("again/model.safetensors")
    assert sorted(found) == sorted(vlm.names())
    assert all(torch.equal(value, again[name]) and value.dtype == torch.bfloat16 for name, value in found.items())
    name = f"language_model.{UP.format(1)}"
    torch.testing.assert_close(found[name], ((tensors(1)[UP.format(1)] + tensors(2)[UP.format(1)]) / 2).bfloat16())
    for name in ("vision_tower.layers.1.weight", f"language_model.{UP.format(0)}"):
        assert torch.equal(found[name], vlm.tensor(name).bfloat16())
    config = json.loads(Path("out/config.json").read_text())
    assert (config["architectures"], config["model_type"]) == (["Pictures"], "pictures")
    assert config["text_config"]["num_hidden_layers"] == 2


@pytest.mark.parametrize(
    ("part", "said"),
    [
        ("langauge_model", "vlm: no tensor's name begins with 'langauge_model.', so there is no such part. Did you mean 'language_model'"),
        ({"language_model": "", "vision_towr": "v"}, "no tensor's name begins with 'vision_towr.'"),
        ({"vision_tower.layers.0": "x", "vision_tower.layers.1": "x"}, "gives two tensors one name. Map the prefixes to different ones."),
    ],
)
def test_parts_that_are_none_are_refused(part: Any, said: str) -> None:
    [fault] = refused({"method": "linear", "models": [{"model": "vlm", "part": part, "weight": 1}]}, {"vlm": pictures(1)})
    assert said in fault


def test_a_merge_that_is_not_the_part_is_refused() -> None:
    opened = {"vlm": pictures(1), **models(llm=tensors(2))}
    [fault] = refused({**linear("llm"), "into": {"model": "vlm", "part": "language_model.model"}}, opened)
    assert "into: the merge does not have the tensors of 'language_model.model' in vlm: " in fault
    assert "the part has no 'lm_head.weight'" in fault


def test_another_class_name_may_count() -> None:
    opened = models(a=tensors(1))
    other = TensorsCheckpoint(tensors(2), {**CONFIG, "architectures": ["Other"]}, label="b")
    assert "is a Other" in refused(linear("a", "b"), {**opened, "b": other})[0]
    entries = [{"model": "b", "architecture": "LlamaForCausalLM", "weight": 1}, {"model": "a", "weight": 1}]
    assert merged({"method": "linear", "models": entries}, {**opened, "b": other}).config["architectures"] == ["LlamaForCausalLM"]
    assert merged({**linear("a", "b"), "allow_mixed": True}, {**opened, "b": other}).config["architectures"] == ["LlamaForCausalLM"]


# -- tensors that not all have -----------------------------------------------------------------------------------------------------------

EXTRA = "model.layers.0.self_attn.extra.weight"


def some() -> dict[str, Checkpoint]:
    """`a` and `b` have one more tensor than `c` and the base."""
    extra = {EXTRA: torch.full((2,), 6.0)}
    return models(base=tensors(0), a={**tensors(1), **extra}, b={**tensors(2), EXTRA: torch.full((2,), 2.0)}, c=tensors(3))


@pytest.mark.parametrize("order", ["abc", "cab"])
def test_a_tensor_that_only_some_have_needs_a_word(order: str) -> None:
    lines = refused(linear(*order), some())
    assert len(lines) == (3 if order == "abc" else 4)
    assert f"tensor '{EXTRA}' is {'missing in c' if order == 'abc' else 'only in a, not in c'}" in lines[1]
    assert "'missing: present' merges what each tensor has, 'missing: drop' leaves such tensors out." in lines[-1]


def test_present_merges_those_that_have_it() -> None:
    value = {**linear("c", "a", "b", missing="present")}
    value["models"][1]["weight"] = 3
    found = merged(value, some())
    assert torch.equal(found.tensor(EXTRA), torch.full((2,), 5.0))
    torch.testing.assert_close(found.tensor(UP.format(0)), sum(w * tensors(s)[UP.format(0)] for w, s in ((3, 1), (1, 2), (1, 3))) / 5)
    assert found_odd(value, some()) == (f"tensor '{EXTRA}' is only in a, b; the others take no part in it.",)


def test_drop_leaves_it_out_and_says_so() -> None:
    value = linear("c", "a", "b", missing="drop")
    assert EXTRA not in merged(value, some()).names()
    assert found_odd(value, some()) == (f"tensor '{EXTRA}' is only in a, b; the output is without it.",)


def test_present_with_a_base() -> None:
    opened = some()
    value = {**linear("a", "c", missing="present"), "method": "task_arithmetic", "base": "base", "dtype": {"store": "bfloat16"}}
    found = merged(value, opened)
    assert torch.equal(found.tensor(EXTRA), torch.full((2,), 6.0, dtype=torch.bfloat16))  # nothing to take a task vector from
    assert found_odd(value, opened) == (f"tensor '{EXTRA}' is only in a; it is copied from there.",)
    faults = refused({**value, "models": [{"model": name, "weight": 1} for name in "ab"]}, opened)
    assert f"tensor '{EXTRA}' is missing in the base base, and a, b have it" in faults[1]
    value = {**linear("c", missing="present"), "method": "task_arithmetic", "base": "a"}
    assert torch.equal(merged(value, opened).tensor(EXTRA), torch.full((2,), 6.0))


def test_a_shape_that_differs_may_be_skipped() -> None:
    odd = {**tensors(2), UP.format(0): torch.ones(11, 6)}
    opened = models(base=tensors(0), a=tensors(1), odd=odd)
    value = {**linear("a", "odd"), "method": "task_arithmetic", "base": "base"}
    assert f"tensor '{UP.format(0)}' has shape [11, 6] in odd and [10, 6] in base" in refused(value, opened)[1]
    found = merged({**value, "shape_mismatch": "skip"}, opened)
    torch.testing.assert_close(found.tensor(UP.format(0)), tensors(1)[UP.format(0)])
    torch.testing.assert_close(found.tensor(UP.format(1)), tensors(1)[UP.format(1)] + tensors(2)[UP.format(1)] - tensors(0)[UP.format(1)])
    [said] = found_odd({**value, "shape_mismatch": "skip"}, opened)
    assert said.startswith(f"tensor '{UP.format(0)}' has shape [11, 6] in odd and [10, 6] elsewhere; that model takes no part in it.")


# -- dtypes, donors, files ---------------------------------------------------------------------------------------------------------------


def test_the_widest_dtype_of_the_inputs() -> None:
    opened = models(half=tensors(1, dtype=torch.bfloat16), other=tensors(2, dtype=torch.float16), full=tensors(3))
    for names, dtype in ((("half", "half"), "BF16"), (("half", "other"), "F32"), (("half", "full"), "F32")):
        assert {merged({**linear(*names), "dtype": {"store": "widest"}}, opened).info(UP.format(0)).dtype} == {dtype}
    assert merged(linear("half", "full"), opened).info(UP.format(0)).dtype == "BF16"


@pytest.mark.parametrize("form", ["whole", "slices"])
def test_the_config_names_the_dtype_to_which_inputs_were_widened(form: str) -> None:
    """A loader that believed the donor's would narrow the weights again."""
    opened = models(half=tensors(1, dtype=torch.bfloat16), full=tensors(3))
    for checkpoint in opened.values():
        checkpoint.config["dtype"] = "bfloat16"  # type: ignore[index]
    for names, dtype in ((("half", "half"), "bfloat16"), (("half", "full"), "float32")):
        value: dict[str, Any] = {**linear(*names), "dtype": {"store": "widest"}}
        if form == "slices":
            entries = value.pop("models")
            value["slices"] = [{"models": [{**entry, "layers": [0, 2]} for entry in entries]}]
        assert merged(value, opened).config["dtype"] == dtype


def test_several_documents_are_rounded_each_to_its_dtype(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate("abc", 1):
        write_model(tmp_path / name, seed)
    text = """\
name: first
merge_method: linear
dtype: bfloat16
models:
  - {model: a, parameters: {weight: 0.3}}
  - {model: b, parameters: {weight: 0.7}}
---
merge_method: linear
dtype: float32
models:
  - {model: first, parameters: {weight: 0.5}}
  - {model: c, parameters: {weight: 0.5}}
"""
    write_recipe(tmp_path / "r.yaml", text)
    found = modelglue.merge("r.yaml").tensor(UP.format(0))
    first = (0.3 * tensors(1)[UP.format(0)] + 0.7 * tensors(2)[UP.format(0)]).bfloat16().float()
    torch.testing.assert_close(found, 0.5 * first + 0.5 * tensors(3)[UP.format(0)], rtol=0, atol=1e-7)


def test_a_nested_merge_may_have_other_layers_than_its_models() -> None:
    opened = models(a=tensors(1, dtype=torch.bfloat16), b=tensors(2, layers=3, dtype=torch.bfloat16))
    stack = {"method": "passthrough", "slices": [{"models": [{"model": "a", "layers": layers}]} for layers in ([0, 2], [1, 2])]}
    found = merged({"method": "linear", "models": [{"model": stack, "weight": 1}, {"model": "b", "weight": 1}]}, opened)
    assert found.config["num_hidden_layers"] == 3
    assert found.info(UP.format(2)).dtype == "BF16"
    torch.testing.assert_close(found.tensor(UP.format(2)), (opened["a"].tensor(UP.format(1)) + opened["b"].tensor(UP.format(2))) / 2)


def test_a_chat_template_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_model(tmp_path / "a", 1)
    (tmp_path / "a" / "tokenizer_config.json").write_text("{}")
    template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    found = modelglue.merge({**linear("a"), "chat_template": template})
    assert template in "".join(file.decode() for file in found.files.values() if isinstance(file, bytes))


def test_faults_that_only_tokenizers_show_have_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_model(tmp_path / "a", 1)
    text = "method: linear\nmodels:\n  - {model: a, weight: 1}\n"
    write_recipe(tmp_path / "chat.yaml", f"{text}chat_template: chatlm\n")
    [fault] = refused(Path("chat.yaml"), {"a": modelglue.open("a")})
    assert fault.startswith("chat.yaml:4: chat_template: 'chatlm' is neither auto, nor a built-in format")
    rules = "{x: {source: {model: a, token: nowhere}}, y: {source: {model: a, token_id: 99}}}"
    write_recipe(tmp_path / "tokens.yaml", f"{text}tokenizer:\n  source: base\n  tokens: {rules}\n")
    assert refused(Path("tokens.yaml"), {"a": modelglue.open("a")}) == [
        "tokens.yaml:4: tokenizer: tokens: 'x' takes the row of 'nowhere' in a, which has no such token.",
        "tokens.yaml:4: tokenizer: tokens: 'y' takes row 99 of a, which has rows 0 to 7.",
    ]


def test_single_files_of_weights_have_no_layers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bag of tensors, matched by name: gradients stand at their first point; the intersection or the union may be merged."""
    monkeypatch.chdir(tmp_path)
    save_file(tensors(1), "a.safetensors")
    save_file({**tensors(2), "more": torch.ones(2)}, "b.safetensors")
    text = "merge_method: linear\nmodels:\n  - model: a.safetensors\n    parameters: {weight: [3, 9]}\n  - model: b.safetensors\n"
    write_recipe(tmp_path / "r.yaml", f"{text}parameters: {{weight: 1}}\n")
    with pytest.raises(MergeError, match=r"tensor 'more' is only in b\.safetensors, not in a\.safetensors"):
        modelglue.merge("r.yaml")
    for missing, names in (("drop", set(tensors(1))), ("present", {*tensors(1), "more"})):
        write_recipe(tmp_path / "r.yaml", f"{text}parameters: {{weight: 1}}\nmissing: {missing}\n")
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            found = modelglue.merge("r.yaml")
        assert set(found.names()) == names
        assert len(caught) == 1
        torch.testing.assert_close(found.tensor(UP.format(1)), (3 * tensors(1)[UP.format(1)] + tensors(2)[UP.format(1)]) / 4)


def test_check_counts_what_slices_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate("ab", 1):
        write_model(tmp_path / name, weights=tensors(seed, layers=3), num_hidden_layers=3)
    part = [
        {"models": [{"model": "a", "layers": [0, 2]}]},
        {"models": [{"model": "b", "layers": [2, 3]}]},
        {"models": [{"model": "a", "layers": [1, 2]}]},
    ]
    report = check({"method": "passthrough", "slices": part})
    a, b = tensors(1, layers=3), tensors(2, layers=3)
    read = sum(value.nbytes for name, value in a.items() if "layers.2" not in name)
    read += sum(value.nbytes for name, value in b.items() if "layers.2" in name)
    assert report.read_bytes == read
    assert report.models == ("a", "b")
    assert report.output_bytes == sum(value.nbytes for value in tensors(1, layers=4).values())


def test_an_output_with_a_tokenizer_section_is_made_again_from_its_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Models that the section names are called by paths from the output's folder, keywords stay keywords."""
    monkeypatch.chdir(tmp_path)
    longer = {**tensors(2), "model.embed_tokens.weight": torch.ones(9, 6), "lm_head.weight": torch.ones(9, 6)}
    write_model(tmp_path / "base", 1)
    write_model(tmp_path / "long", weights=longer, words=(*WORDS, "g"), vocab_size=9)
    tokens = {"g": {"source": {"model": "base", "token": "a"}}, "new": {"source": {"model": "long", "token_id": 2}, "force": True}}
    for number, source in enumerate(("base", "union", {"model": "long"})):
        value = {**linear("base", "long"), "tokenizer": {"source": source, "tokens": tokens, "pad_to_multiple_of": 4}}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            save(modelglue.merge(value), tmp_path / "deep" / str(number))
            save(modelglue.merge(tmp_path / "deep" / str(number) / "modelglue_recipe.yaml"), tmp_path / f"again{number}")
        first, again = (
            load_file(folder / "model.safetensors") for folder in (tmp_path / "deep" / str(number), tmp_path / f"again{number}")
        )
        assert first["lm_head.weight"].shape == (12, 6)
        assert all(torch.equal(first[name], again[name]) for name in first)
        written = yaml.safe_load((tmp_path / "deep" / str(number) / "modelglue_recipe.yaml").read_text())["tokenizer"]
        assert written["source"] == ({"model": "../../long"} if isinstance(source, dict) else source)
        assert written["tokens"]["g"]["source"] == {"model": "../../base", "token": "a"}


def test_a_method_that_looks_at_the_whole_model_says_that_slices_are_looked_at_one_by_one() -> None:
    opened = models(base=tensors(0), a=tensors(1))
    part = [{"models": [{"model": "a", "layers": layers, "weight": 1, "density": 0.5}]} for layers in ([0, 1], [1, 2])]
    value = {"method": "ties", "base": "base", "slices": part, "parameters": {"trim_scope": "model"}}
    assert found_odd(value, opened) == ("<recipe>: ties looks at a whole model at once; here it looks at each slice or module by itself.",)
