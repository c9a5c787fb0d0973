"""Exports load in transformers alone, with nothing missing and nothing left over, and compute what the mixture is defined to be."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from modelglue.checkpoint import TensorsCheckpoint, open_checkpoint, save
from modelglue.errors import CheckpointError, MergeError
from modelglue.mixture.encoder import slim_reader
from modelglue.mixture.exports import EXPORTS, Parts, check, choose, dense
from modelglue.mixture.levels.members import Member
from modelglue.models import load_live
from tests.mixture.exporting import LLAMA3, SPARSE, Sparse, by_hand, checkpoint_of, logits, opened, random_gates, some_ids
from tests.models.tiny import random_dense, random_model

EXPERTS = 3
#: loads every folder that is named, where modelglue cannot be imported
LOADER = """
import json, sys
sys.modules["modelglue"] = None
import torch
from pathlib import Path
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
home = Path(sys.argv[1])
ids = load_file(home / "ids.safetensors")["ids"]
found, said = {}, {}
for folder in sorted(path for path in home.iterdir() if path.is_dir()):
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    with torch.no_grad():
        found[folder.name] = model.eval()(ids).logits
        cached = model.generate(ids[:, :4], max_new_tokens=3, min_new_tokens=3, do_sample=False, pad_token_id=0)
    said[folder.name] = {"class": type(model).__name__, "info": {key: sorted(map(str, value)) for key, value in info.items()},
                         "written": list(cached.shape)}
assert not any(name.startswith("modelglue.") for name in sys.modules)
save_file(found, home / "logits.safetensors")
(home / "said.json").write_text(json.dumps(said))
"""


def models_of(row: Sparse) -> list[Any]:
    return [row.model(seed) for seed in range(EXPERTS + 1 + (row.always is not None))]


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Logits by row of the table, at top-1, and what loading said: from one process without modelglue."""
    home = tmp_path_factory.mktemp("exports")
    for name, row in SPARSE.items():
        parts = row.parts(models_of(row), 1)
        save(choose(parts, row.export()).build(parts, random_gates(parts), {"model": name}), home / name, workers=1)
    save_file({"ids": some_ids()}, home / "ids.safetensors")
    subprocess.run([sys.executable, "-c", LOADER, str(home)], check=True, cwd=home, capture_output=True, text=True)
    return load_file(home / "logits.safetensors"), json.loads((home / "said.json").read_text())


@pytest.mark.parametrize("name", SPARSE)
def test_an_export_runs_without_modelglue(name: str, elsewhere: tuple[dict[str, torch.Tensor], dict[str, Any]]) -> None:
    row, found, said = SPARSE[name], elsewhere[0][name], elsewhere[1][name]
    assert said["class"] == row.expected
    assert {key: value for key, value in said["info"].items() if value} == {}
    assert said["written"] == [2, 7]
    torch.testing.assert_close(found, mixture_by_hand(row, 1), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", SPARSE)
def test_an_export_with_all_experts_at_work(name: str) -> None:
    row = SPARSE[name]
    parts = row.parts(models_of(row), EXPERTS)
    live = load_live(choose(parts, row.export()).build(parts, random_gates(parts), {}))
    torch.testing.assert_close(logits(live, some_ids()), mixture_by_hand(row, EXPERTS), rtol=1e-4, atol=1e-4)


def mixture_by_hand(row: Sparse, top_k: int) -> torch.Tensor:
    models = models_of(row)
    return logits(by_hand(row, models, random_gates(row.parts(models, top_k)), top_k), some_ids())


@pytest.mark.parametrize("name", [name for name, row in SPARSE.items() if row.always is None])
def test_equal_experts_are_the_dense_model(name: str) -> None:
    row = SPARSE[name]
    model = row.model(4)
    parts = row.parts([model] * (EXPERTS + 1), 2)
    live = load_live(choose(parts, row.export()).build(parts, random_gates(parts), {}))
    assert type(live).__name__ == row.expected
    torch.testing.assert_close(logits(live, some_ids()), logits(model, some_ids()), rtol=1e-4, atol=1e-4)


def test_experts_are_written_one_by_one() -> None:
    """Under the names that releases of transformers before 5 and inference engines read, never the fused ones."""
    row = SPARSE["mixtral"]
    models = models_of(row)
    parts = row.parts(models, 2)
    gates = random_gates(parts)
    made = choose(parts).build(parts, gates, {})
    inside = {name.removeprefix("model.layers.1.") for name in made.names() if name.startswith("model.layers.1.")}
    experts = {f"block_sparse_moe.experts.{e}.{w}.weight" for e in range(EXPERTS) for w in ("w1", "w2", "w3")}
    attention = {f"self_attn.{part}_proj.weight" for part in "qkvo"}
    norms = {"input_layernorm.weight", "post_attention_layernorm.weight"}
    assert inside == experts | attention | norms | {"block_sparse_moe.gate.weight"}
    mlp = models[3].model.layers[1].mlp
    for word, value in (("w1", mlp.gate_proj), ("w2", mlp.down_proj), ("w3", mlp.up_proj)):
        assert made.tensor(f"model.layers.1.block_sparse_moe.experts.2.{word}.weight").equal(value.weight)
    assert made.tensor("model.layers.1.block_sparse_moe.gate.weight").equal(gates.routed[1])


def test_the_config_says_what_every_release_reads() -> None:
    row = SPARSE["qwen2-llama3"]
    parts = row.parts(models_of(row), 2, dtype="BF16")
    config = choose(parts).config(parts)
    assert config["rope_theta"] == 5e5
    assert config["rope_scaling"] == LLAMA3["rope_scaling"]
    assert (config["num_experts"], config["num_experts_per_tok"], config["norm_topk_prob"]) == (EXPERTS, 2, True)
    assert (config["torch_dtype"], config["mlp_only_layers"]) == ("bfloat16", [])
    assert "rope_parameters" not in config
    assert "transformers_version" not in config
    wide = SPARSE["mixtral-wide-heads"]
    parts = wide.parts(models_of(wide), 1)
    assert choose(parts).config(parts)["transformers_version"] == "5.0.0"


def test_a_window_that_not_all_have_is_left_out() -> None:
    models = [random_dense("mistral", seed, sliding_window=window) for seed, window in ((0, 6), (1, 6), (2, 8))]
    parts = Sparse("").parts(models, 1)
    assert choose(parts).config(parts)["sliding_window"] is None
    parts = Sparse("").parts(models[:2], 1)
    assert choose(parts).config(parts)["sliding_window"] == 6


# -- what does not fit --------------------------------------------------------------------------------------------------------------


def refused(models: Sequence[Any], *, wanted: str | None = None, always: str | None = None, top_k: int = 1, dense_layers: int = 0) -> str:
    row = Sparse("", wanted=wanted, always=always, dense_layers=dense_layers)
    parts = row.parts(models, top_k)
    with pytest.raises(MergeError) as caught:
        checked(parts, row)
    return str(caught.value)


def checked(parts: Parts, row: Sparse) -> None:
    check(parts)
    choose(parts, row.export())


def test_shapes_that_differ_are_refused_together() -> None:
    base = random_dense("llama")
    others = [
        random_dense("llama", hidden_size=32),
        random_dense("llama", num_hidden_layers=3),
        random_dense("llama", intermediate_size=40),
    ]
    text = refused([base, base, *others], top_k=5)
    assert "experts_per_token is 5; allowed is 1 to 4" in text
    assert "model2: its width is 32, that of model0 is 16" in text
    assert "model3: its layers is 3, that of model0 is 2" in text
    assert "model4: its width of the feed-forward networks is 40, that of model1 is 24" in text
    assert "level model" in text


def test_families_do_not_mix() -> None:
    assert "model1: its family of model types is qwen2, that of model0 is llama" in refused([random_dense("llama"), random_dense("qwen2")])


def test_the_class_that_would_do_is_named() -> None:
    llama = random_dense("llama")
    assert "Qwen2MoeForCausalLM and Ernie4_5_MoeForCausalLM" in refused([llama, llama], wanted="mixtral", dense_layers=1)
    text = refused([llama, llama, llama], wanted="MixtralForCausalLM", always="gated")
    assert "Qwen2MoeForCausalLM would do" in text
    assert "MixtralForCausalLM: it has no expert that is always on" in text


def test_every_class_says_why_none_fits() -> None:
    text = refused([random_dense("olmo2")] * 3, always="plain")
    assert all(f"{export.name}: " in text for export in EXPORTS)
    assert "FlexOlmoForCausalLM: it has no expert that is always on" in text
    assert "level model" in text


def test_models_of_other_classes_are_refused_with_what_takes_them() -> None:
    with pytest.raises(CheckpointError, match=r"zoo: is of model_type 'gemma'.*Allowed are llama, mistral.*level model"):
        dense(checkpoint_of(random_model("gemma")), "zoo")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"num_hidden_layers": 10**9}, r"zoo: its config claims 1,000,000,000 layers, but it has only \d+ tensors"),
        ({"model_type": ["llama"]}, r"zoo: is of model_type \['llama'\]"),
    ],
)
def test_hostile_configs(changes: dict[str, Any], said: str) -> None:
    good = checkpoint_of(random_dense("llama", 0))
    hostile = TensorsCheckpoint({name: good.tensor(name) for name in good.names()}, {**good.config, **changes})
    with pytest.raises(CheckpointError, match=said):
        dense(hostile, "zoo")
    with pytest.raises(CheckpointError, match=r"claims 1,000,000,000 layers|cannot build model_type"):
        Member("zoo", hostile).model  # noqa: B018
    with pytest.raises(CheckpointError, match=r"claims 1,000,000,000 layers|cannot build model_type"):
        slim_reader(hostile, 0)


def test_details_without_a_place_are_refused_together() -> None:
    model = random_dense("llama", attention_bias=True, mlp_bias=True, hidden_act="gelu")
    with pytest.raises(CheckpointError) as caught:
        opened(model, "zoo")
    text = str(caught.value)
    assert "zoo: has biases (mlp.down_proj.bias, mlp.gate_proj.bias, mlp.up_proj.bias, self_attn.o_proj.bias)" in text
    assert "zoo: its activation is 'gelu'" in text
    assert "own modelling code" in text


def test_a_model_that_lacks_a_tensor_is_refused(tmp_path: Path) -> None:
    random_dense("llama").save_pretrained(tmp_path / "a")
    weights = load_file(tmp_path / "a" / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights | {"model.layers.0.adapter.weight": torch.ones(2)}, tmp_path / "a" / "model.safetensors")
    with pytest.raises(CheckpointError) as caught:
        dense(open_checkpoint(tmp_path / "a"), "broken")
    assert "broken: lacks model.layers.1.mlp.up_proj.weight." in str(caught.value)
    assert "broken: has tensors that Llama's layout does not know (adapter.weight)." in str(caught.value)
