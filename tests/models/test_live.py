"""Loading into live models: equal to transformers' own loading, and nothing dropped, invented or run on the way."""

from __future__ import annotations

import importlib
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from modelglue.checkpoint import Checkpoint, TensorsCheckpoint, open_checkpoint, save
from modelglue.errors import CheckpointError, RunError
from modelglue.models import check_fit, load_into, load_live
from modelglue.recipe import merge
from tests.models.tiny import config, saved_model

_IDS = torch.tensor([[1, 7, 9, 33, 12, 5], [1, 60, 61, 62, 63, 4]])


def _logits(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        logits: torch.Tensor = model(input_ids=_IDS).logits
    return logits


def _theirs(folder: Path) -> torch.Tensor:
    model, report = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True, output_loading_info=True)
    assert not any(report.values())
    return _logits(model.eval())


def _tensors(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def _changed(folder: Path, **changes: torch.Tensor | None) -> TensorsCheckpoint:
    """The folder's tensors with some replaced or (None) left out; the config as it is."""
    tensors = {name: value for name, value in {**_tensors(folder), **changes}.items() if value is not None}
    return TensorsCheckpoint(tensors, json.loads((folder / "config.json").read_text()), label="changed")


@pytest.mark.parametrize("name", ["llama", "llama-tied", "gpt_neox", "mixtral", "qwen2", "gemma", "gpt2"])
def test_loads_as_transformers_does(name: str, tmp_path: Path) -> None:
    folder = saved_model(tmp_path / "model", name)
    model = load_live(open_checkpoint(folder))
    assert torch.equal(_logits(model), _theirs(folder))
    assert not model.training
    assert {value.dtype for value in model.state_dict().values()} == {torch.float32}


def test_experts_on_disk_are_fused_live_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    folder = saved_model(tmp_path / "model", "mixtral", num_local_experts=11, num_hidden_layers=1)
    disk = _tensors(folder)
    assert "model.layers.0.block_sparse_moe.experts.10.w1.weight" in disk
    live = load_live(open_checkpoint(folder)).state_dict()
    down = live["model.layers.0.mlp.experts.down_proj"]
    assert down.shape == (11, 16, 24)
    for expert in range(11):
        assert torch.equal(down[expert], disk[f"model.layers.0.block_sparse_moe.experts.{expert}.w2.weight"])


def test_names_without_the_class_prefix_find_their_place(tmp_path: Path) -> None:
    folder = saved_model(tmp_path / "model", "gpt2")
    bare = {name.removeprefix("transformer."): value for name, value in _tensors(folder).items()}
    assert "wte.weight" in bare
    assert torch.equal(_logits(load_live(TensorsCheckpoint(bare, config("gpt2")))), _theirs(folder))


def test_dtype_is_the_callers(tmp_path: Path) -> None:
    model = load_live(open_checkpoint(saved_model(tmp_path / "model", "llama")), dtype="bfloat16")
    assert {value.dtype for value in model.state_dict().values()} == {torch.bfloat16}


@pytest.mark.parametrize("name", ["llama-tied", "mixtral"])
def test_a_merge_loads_as_its_saved_form_does(name: str, tmp_path: Path) -> None:
    for number in range(2):
        saved_model(tmp_path / f"model{number}", name, seed=number)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("method: linear\nmodels:\n  - {model: model0, weight: 0.3}\n  - {model: model1, weight: 0.7}\n")
    merged = merge(recipe)
    direct = _logits(load_live(merged))
    save(merged, tmp_path / "merged")
    assert torch.equal(direct, _logits(load_live(open_checkpoint(tmp_path / "merged"))))
    assert torch.equal(direct, _theirs(tmp_path / "merged"))


@pytest.mark.parametrize("name", ["llama-tied", "mixtral", "gpt_neox"])
def test_one_model_after_the_other_in_one_place(name: str, tmp_path: Path) -> None:
    first, second = (open_checkpoint(saved_model(tmp_path / f"model{seed}", name, seed=seed)) for seed in (1, 2))
    model = load_live(first)
    before = {key: value.data_ptr() for key, value in model.state_dict().items()}
    load_into(second, model)
    assert torch.equal(_logits(model), _theirs(tmp_path / "model2"))
    load_into(first, model)
    assert torch.equal(_logits(model), _theirs(tmp_path / "model1"))
    assert {key: value.data_ptr() for key, value in model.state_dict().items()} == before


def test_a_model_of_another_shape_does_not_pass_for_the_last_one(tmp_path: Path) -> None:
    """What was worked out for one checkpoint must not be believed of another with the same names."""
    small = open_checkpoint(saved_model(tmp_path / "small", "llama"))
    wide = open_checkpoint(saved_model(tmp_path / "wide", "llama", intermediate_size=32))
    model = load_live(small)
    with pytest.raises(CheckpointError, match=r"wide.*mlp\.down_proj\.weight' has the shape \[16, 32\].*needs \[16, 24\]"):
        load_into(wide, model)
    assert torch.equal(_logits(model), _theirs(tmp_path / "small"))


def test_a_tensor_of_the_wrong_shape_is_named(tmp_path: Path) -> None:
    folder = saved_model(tmp_path / "model", "llama")
    wrong = _changed(folder, **{"model.norm.weight": torch.zeros(17)})
    expected = "TensorsCheckpoint('changed'): tensor 'model.norm.weight' has the shape [17], LlamaForCausalLM with this config needs [16]."
    for function in (load_live, check_fit):
        with pytest.raises(CheckpointError, match=re.escape(expected)):
            function(wrong)


def test_a_tensor_without_a_place_is_named(tmp_path: Path) -> None:
    folder = saved_model(tmp_path / "model", "llama")
    with pytest.raises(CheckpointError, match=r"'changed'\): LlamaForCausalLM has no place for 'model.layers.2.mlp.bias', 'stray'"):
        load_live(_changed(folder, **{"stray": torch.zeros(1), "model.layers.2.mlp.bias": torch.zeros(1)}))


@pytest.mark.parametrize("name", ["model.layers.1.mlp.up_proj.weight", "lm_head.weight", "model.embed_tokens.weight"])
def test_a_missing_tensor_is_named(name: str, tmp_path: Path) -> None:
    folder = saved_model(tmp_path / "model", "llama")
    with pytest.raises(CheckpointError, match=re.escape(f"'changed'): holds no values for '{name}' of LlamaForCausalLM")):
        load_live(_changed(folder, **{name: None}))


def test_errors_come_before_anything_is_written(tmp_path: Path) -> None:
    folder = saved_model(tmp_path / "model", "llama")
    model = load_live(open_checkpoint(folder))
    before = _logits(model)
    zeros = {name: torch.zeros_like(value) for name, value in _tensors(folder).items()}
    with pytest.raises(CheckpointError, match="holds no values"):
        load_into(_changed(folder, **{**zeros, "model.norm.weight": None}), model)
    assert torch.equal(_logits(model), before)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"2.w2.weight": None}, r"tensor 'model.layers.0.mlp.experts.down_proj' has the shape \[2, 16, 24\].*needs \[3, 16, 24\]"),
        (
            {"2.w2.weight": torch.zeros(5, 5)},
            r"'changed'\): 'model.layers.0.mlp.experts.down_proj' cannot be made of .*experts.0.w2.weight'",
        ),
        ({"3.w2.weight": torch.zeros(16, 24)}, r"'model.layers.0.mlp.experts.down_proj' has the shape \[4, 16, 24\]"),
    ],
)
def test_experts_that_do_not_add_up(changes: dict[str, torch.Tensor | None], message: str, tmp_path: Path) -> None:
    folder = saved_model(tmp_path / "model", "mixtral")
    wrong = _changed(folder, **{f"model.layers.0.block_sparse_moe.experts.{name}": value for name, value in changes.items()})
    with pytest.raises(CheckpointError, match=message):
        load_live(wrong)


def test_two_tensors_for_one_place_must_say_the_same(tmp_path: Path) -> None:
    folder = saved_model(tmp_path / "model", "llama-tied")
    embedding = _tensors(folder)["model.embed_tokens.weight"]
    assert torch.equal(_logits(load_live(_changed(folder, **{"lm_head.weight": embedding.clone()}))), _theirs(folder))
    with pytest.raises(CheckpointError, match=r"ties 'model.embed_tokens.weight' to 'lm_head.weight', but their values differ"):
        load_live(_changed(folder, **{"lm_head.weight": embedding + 1}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": None}, "has no model_type"),
        ({"model_type": "no-such-model"}, "cannot build model_type 'no-such-model'"),
        ({"model_type": ["llama"]}, r"cannot build model_type \['llama'\]"),
        ({"model_type": "t5"}, "cannot build model_type 't5'"),
        ({"num_attention_heads": 0}, "cannot build model_type 'llama'"),
        ({"hidden_size": -16}, "cannot build model_type 'llama'"),
        ({"hidden_act": "no-such-activation"}, "cannot build model_type 'llama'"),
        ({"num_hidden_layers": "two"}, "cannot build model_type 'llama'"),
        ({"text_config": {"n_layer": 10**9}}, "claims 1,000,000,000 layers, but it has only 21 tensors"),
        ({"experts": [{}] * 22}, "claims 22 experts, but it has only 21 tensors"),
        ({"num_hidden_layers": 10**9}, "claims 1,000,000,000 layers, but it has only 21 tensors"),
        ({"vocab_size": 10**15}, "cannot build model_type 'llama' from its config: .*allocate"),
        ({"num_hidden_layers": 1}, "has no place for 'model.layers.1."),
        ({"num_hidden_layers": 3}, "holds no values for 'model.layers.2."),
    ],
)
def test_hostile_and_mistaken_configs(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    folder = saved_model(tmp_path / "model", "llama")
    values = {name: value for name, value in {**config("llama"), **changes}.items() if value is not None}
    with pytest.raises(CheckpointError, match=message):
        load_live(TensorsCheckpoint(_tensors(folder), values, label="hostile"))


@pytest.mark.parametrize(("content", "expected"), [('{"eos_token_id": [2, 40]}', [2, 40]), ('{"eos_token_id": 7}', 7), ("{}", 2)])
def test_ids_that_end_a_text_are_those_of_the_generation_config(content: str, expected: Any, tmp_path: Path) -> None:
    folder = saved_model(tmp_path / "model", "llama")
    (folder / "generation_config.json").write_text(content)
    assert load_live(open_checkpoint(folder)).generation_config.eos_token_id == expected


@pytest.mark.parametrize("content", ["", "[]", "\0", '{"eos_token_id": "</s>"}', '{"eos_token_id": [2, null]}'])
def test_a_damaged_generation_config_is_an_error(content: str, tmp_path: Path) -> None:
    folder = saved_model(tmp_path / "model", "llama")
    (folder / "generation_config.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"generation_config.json: (is not a JSON object|eos_token_id is)"):
        load_live(open_checkpoint(folder))


def test_a_folder_without_a_config_is_an_error(tmp_path: Path) -> None:
    folder = saved_model(tmp_path / "model", "llama")
    (folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match="has no model_type"):
        load_live(open_checkpoint(folder))


@pytest.mark.parametrize("kind", ["llama", "no-such-model"])
def test_code_that_comes_with_a_model_is_not_run(kind: str, tmp_path: Path) -> None:
    folder = saved_model(tmp_path / "model", "llama")
    trap = tmp_path / "sprung"
    (folder / "modeling_trap.py").write_text(f"open({str(trap)!r}, 'w').close()\nclass Trap: pass\nclass TrapConfig: pass\n")
    values = json.loads((folder / "config.json").read_text())
    values |= {"model_type": kind, "auto_map": {"AutoConfig": "modeling_trap.TrapConfig", "AutoModelForCausalLM": "modeling_trap.Trap"}}
    (folder / "config.json").write_text(json.dumps(values))
    if kind == "llama":
        assert type(load_live(open_checkpoint(folder))).__module__ == "transformers.models.llama.modeling_llama"
    else:
        with pytest.raises(CheckpointError, match="cannot build model_type 'no-such-model'"):
            load_live(open_checkpoint(folder))
    assert not trap.exists()


def test_check_fit_reads_no_tensor(tmp_path: Path) -> None:
    class HeadersOnly(TensorsCheckpoint):
        def read(self, *_arguments: Any, **_options: Any) -> torch.Tensor:
            raise AssertionError("a tensor was read")

    for name in ("llama", "llama-tied", "mixtral", "gpt2"):
        folder = saved_model(tmp_path / name, name)
        fitting: Checkpoint = HeadersOnly(_tensors(folder), config(name))
        check_fit(fitting)


def test_a_transformers_that_has_moved_its_table_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    folder = saved_model(tmp_path / "model", "llama")
    monkeypatch.delattr(importlib.import_module("transformers.core_model_loading"), "rename_source_key")
    with pytest.raises(RunError, match=rf"transformers {re.escape(transformers.__version__)} keeps its table of tensor names where"):
        load_live(open_checkpoint(folder))


def test_without_the_shortcut_around_initialisation_weights_are_the_same(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    folder = saved_model(tmp_path / "model", "gpt_neox")
    monkeypatch.delattr(importlib.import_module("transformers.initialization"), "no_init_weights")
    assert torch.equal(_logits(load_live(open_checkpoint(folder))), _theirs(folder))
