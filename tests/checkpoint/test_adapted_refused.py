"""Adapters that are no additive update of their base, or are damaged: refused, with the place and the way out, all faults at once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from modelglue.checkpoint import SafetensorsCheckpoint, TensorsCheckpoint
from modelglue.checkpoint.adapted import open_adapted
from modelglue.checkpoint.adapter import open_adapter
from modelglue.errors import CheckpointError
from tests.adapters.on_disk import PREFIX, linear, write_adapter
from tests.checkpoint.files import randn, write_single

BASE = TensorsCheckpoint({"m.weight": randn(6, 5), "m.bias": randn(6), "n.weight": randn(6, 5).to(torch.int8), "e.weight": randn(9, 5)})


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"peft_type": "IA3"}, r"peft_type is 'IA3'; allowed is 'LORA'"),
        ({"peft_type": None}, r"peft_type is None; allowed is 'LORA'"),
        ({"layer_replication": [[0, 2], [1, 3]]}, "layer_replication is set, .* whose layers were repeated"),
        ({"alora_invocation_tokens": [5]}, "alora_invocation_tokens is set"),
        ({"use_qalora": True}, "use_qalora is set"),
        ({"use_bdlora": {"x": 1}}, "use_bdlora is set"),
        ({"arrow_config": {"top_k": 3}}, "arrow_config is set"),
        ({"kasa_config": {"x": 1}}, "kasa_config is set"),
        ({"monteclora_config": {"x": 1}}, "monteclora_config is set"),
        ({"megatron_config": {"x": 1}}, "megatron_config is set"),
        *[({"init_lora_weights": start}, f"init_lora_weights is '{start}', which changes the base weights") for start in
          ("pissa", "pissa_niter_16", "PiSSA", "olora", "corda", "lora_ga", "loftq")],
        ({"r": 0}, "r is 0, allowed is a whole number from 1"),
        ({"r": "4"}, "r is '4', allowed is a whole number from 1"),
        ({"lora_alpha": float("inf")}, "lora_alpha is inf, allowed is a finite number"),
        ({"lora_alpha": 10**400}, "lora_alpha is 10+.*, allowed is a finite number"),
        ({"rank_pattern": {"q": 0}}, "rank_pattern is .*, allowed is module patterns with whole numbers from 1"),
        ({"rank_pattern": {"(": 4}}, r"rank_pattern holds '\(', which is no regular expression"),
        ({"alpha_pattern": [1]}, "alpha_pattern is"),
        ({"use_rslora": "yes"}, "use_rslora is 'yes', allowed is true or false"),
        ({"modules_to_save": "head"}, "modules_to_save is 'head', allowed is a list of module names"),
        ({"trainable_token_indices": {"e": [-1]}}, "trainable_token_indices is"),
        ({"target_parameters": [1]}, "target_parameters is"),
        ({"modelglue_expert_layout": "x"}, "modelglue_expert_layout is 'x', allowed is out_in or in_out"),
    ],
)  # fmt: skip
def test_configs(tmp_path: Path, config: dict[str, Any], reason: str) -> None:
    with pytest.raises(CheckpointError, match=reason) as caught:
        open_adapter(write_adapter(tmp_path / "a", linear("m", 6, 5), **config))
    assert str(caught.value).startswith(f"{tmp_path}/a/adapter_config.json: ")


@pytest.mark.parametrize("start", [True, False, "gaussian", "eva", "orthogonal", "mica"])
def test_harmless_starts_and_empty_settings(tmp_path: Path, start: Any) -> None:
    config = {
        "init_lora_weights": start,
        "layer_replication": None,
        "use_qalora": False,
        "loftq_config": {},
        "megatron_core": "megatron.core",
    }
    adapter = open_adapter(write_adapter(tmp_path / "a", linear("m", 6, 5), **config))
    assert list(adapter.updates) == ["m"]
    assert adapter.config.unknown == ()


def test_unknown_settings_are_told(tmp_path: Path) -> None:
    adapted = open_adapted(BASE, [write_adapter(tmp_path / "a", linear("m", 6, 5), use_next_lora=True, other=None)], "base+a")
    assert adapted.warnings == (f"{tmp_path}/a: has settings that are not known here and are not obeyed: 'use_next_lora'.",)


def test_several_faults_of_a_config_are_told_together(tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "a", linear("m", 6, 5), use_qalora=True, init_lora_weights="pissa")
    with pytest.raises(CheckpointError) as caught:
        open_adapter(folder)
    assert [line.split(": ")[1].split(" ")[0] for line in str(caught.value).splitlines()] == ["use_qalora", "init_lora_weights"]


@pytest.mark.parametrize(
    ("tensors", "reason"),
    [
        ({"m.lora_A.weight": randn(4, 5)}, r"'m' has 'base_model\.model\.m\.lora_A\.weight' without lora_B"),
        ({"m.lora_B.bias": randn(6)}, "without lora_A and lora_B"),
        ({"e.lora_embedding_B": randn(5, 4)}, "without lora_embedding_A"),
        ({**linear("m", 6, 5), "m.lora_embedding_A": randn(4, 9)}, "without lora_embedding_B"),
        ({"m.lora_A.weight": randn(4, 5), "m.lora_B.weight": randn(6, 3)}, r"whose ranks \(4 and 3\) differ"),
        ({"m.lora_A.weight": randn(0, 5), "m.lora_B.weight": randn(6, 0)}, r"has shape \[0, 5\], allowed are two or more sizes from 1"),
        ({"m.lora_A.weight": randn(4), "m.lora_B.weight": randn(6, 4)}, r"has shape \[4\]"),
        ({"m.lora_A.weight": randn(4, 5).to(torch.int8), "m.lora_B.weight": randn(6, 4)}, "is I8; allowed are BF16, F16, F32, F64"),
        ({**linear("m", 6, 5), "m.lora_E": randn(4)}, r"not known from LoRA adapters: 'base_model\.model\.m\.lora_E'"),
        ({"m.ia3_l": randn(4)}, r"not known from LoRA adapters: 'base_model\.model\.m\.ia3_l'"),
        ({"m.weight": randn(6, 5), "m.base_layer.weight": randn(6, 5)}, "both replace 'm.weight'"),
    ],
)
def test_files(tmp_path: Path, tensors: dict[str, torch.Tensor], reason: str) -> None:
    with pytest.raises(CheckpointError, match=reason) as caught:
        open_adapter(write_adapter(tmp_path / "a", tensors))
    assert str(caught.value).startswith(f"{tmp_path}/a: ")


def test_unknown_tensors_are_listed_up_to_a_dozen(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"'lora_unet_0', .*'lora_unet_19' and 8 more\. Allowed are PEFT's names"):
        open_adapter(write_adapter(tmp_path / "a", {f"lora_unet_{n}": randn(2) for n in range(20)}, prefix=""))


@pytest.mark.parametrize(
    ("tensors", "config", "reason"),
    [
        (linear("x.y", 6, 5), {}, "adapts 'x.y', which the base does not have, with no other prefix either"),
        (linear("m", 6, 4), {}, r"factors of shapes \[4, 4\] and \[6, 4\], which do not fit 'm\.weight' of shape \[6, 5\]"),
        (linear("m", 6, 5), {"r": 8}, r"has rank 4, the config gives 'm' 8"),
        (linear("m", 6, 5), {"rank_pattern": {"m": 2}}, r"has rank 4, the config gives 'm' 2"),
        (linear("n", 6, 5), {}, r"changes 'n\.weight', which is I8 in the base; .* Dequantise the base first"),
        ({**linear("n", 6, 5), "n.lora_B.bias": randn(6)}, {"lora_bias": True}, r"moves 'n\.bias', which the base does not have"),
        ({**linear("m", 6, 5), "m.lora_B.bias": randn(5)}, {"lora_bias": True}, r"should hold 6 numbers for 'm\.bias'"),
        ({**linear("m", 6, 5), "m.lora_magnitude_vector": randn(5)}, {"use_dora": True}, r"should hold 6 numbers for 'm\.weight'"),
        ({"m.base_layer.weight": randn(6, 4)}, {}, r"of shape \[6, 4\] replaces 'm\.weight' of shape \[6, 5\]"),
        ({"n.weight": randn(6, 5)}, {}, r"is F32 and replaces 'n\.weight', which is I8"),
        ({"e.token_adapter.trainable_tokens_delta": randn(2, 5)}, {}, "does not say which of 'e'"),
        ({"e.token_adapter.trainable_tokens_delta": randn(2, 5)}, {"trainable_token_indices": [1, 9]}, "should replace 2 .* up to row 9"),
        ({"e.token_adapter.trainable_tokens_delta": randn(2, 5)}, {"trainable_token_indices": [1, 1]}, "2 different rows"),
        ({"e.token_adapter.trainable_tokens_delta": randn(2, 5)}, {"trainable_token_indices": [1, 2, 3]}, "3 different rows"),
        ({"e.lora_embedding_A": randn(4, 8), "e.lora_embedding_B": randn(5, 4)}, {}, r"do not fit 'e\.weight' of shape \[9, 5\]"),
    ],
)
def test_what_does_not_fit_the_base(tmp_path: Path, tensors: dict[str, torch.Tensor], config: dict[str, Any], reason: str) -> None:
    with pytest.raises(CheckpointError, match=reason) as caught:
        open_adapted(BASE, [write_adapter(tmp_path / "a", tensors, **config)], "base+a")
    assert str(caught.value).startswith(f"{tmp_path}/a: ")


def test_all_that_does_not_fit_is_told_together(tmp_path: Path) -> None:
    first = write_adapter(tmp_path / "a", {**linear("m", 6, 4), **linear("n", 6, 5)})
    second = write_adapter(tmp_path / "b", linear("gone", 6, 5))
    with pytest.raises(CheckpointError) as caught:
        open_adapted(BASE, [first, second], "base+a+b")
    assert [line.split(": ")[0] for line in str(caught.value).splitlines()] == [str(first), str(first), str(second)]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("key", ["m.lora_A.weight", "m.lora_B.weight", "m.lora_B.bias", "m.lora_magnitude_vector", "e.weight"])
def test_nan_and_infinity_are_named_by_key(tmp_path: Path, key: str, bad: float) -> None:
    tensors = {**linear("m", 6, 5), "m.lora_B.bias": randn(6), "m.lora_magnitude_vector": torch.ones(6), "e.weight": randn(9, 5)}
    tensors[key].view(-1)[-1] = bad
    adapted = open_adapted(BASE, [write_adapter(tmp_path / "a", tensors, use_dora=True, lora_bias=True)], "base+a")
    name = {"m.lora_B.bias": "m.bias", "e.weight": "e.weight"}.get(key, "m.weight")
    with pytest.raises(CheckpointError, match=rf"a: tensor '{PREFIX}{key}' holds NaN or infinity"):
        adapted.tensor(name)


def test_sums_that_do_not_fit_the_dtype_are_told(tmp_path: Path) -> None:
    base = TensorsCheckpoint({"m.weight": torch.full((6, 5), 65000, dtype=torch.float16)})
    tensors = {"m.lora_A.weight": torch.full((4, 5), 100.0), "m.lora_B.weight": torch.full((6, 4), 100.0)}
    adapted = open_adapted(base, [write_adapter(tmp_path / "a", tensors)], "base+a")
    with pytest.raises(CheckpointError, match=r"base\+a: tensor 'm\.weight' comes out with NaN or infinity .* does not fit float16"):
        adapted.tensor("m.weight")
    saved = {"m.weight": torch.full((6, 5), 1e6)}
    zero = {
        **saved,
        "n.lora_A.weight": torch.ones(4, 5),
        "n.lora_B.weight": torch.zeros(6, 4),
        "n.base_layer.weight": torch.full((6, 5), 1e6),
    }
    base = TensorsCheckpoint({"m.weight": base.tensor("m.weight"), "n.weight": base.tensor("m.weight")})
    replaced = open_adapted(base, [write_adapter(tmp_path / "b", zero, modules_to_save=["m"])], "base+b")
    for name in base.names():
        with pytest.raises(CheckpointError, match="comes out with NaN or infinity near element 7:"):
            replaced.read(name, 7, 9)


def test_folders_that_are_no_adapters(tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "a", linear("m", 6, 5))
    (folder / "adapter_model.safetensors").rename(tmp_path / "weights")
    with pytest.raises(CheckpointError, match=r"a: holds adapter_config\.json, but no adapter_model\.safetensors"):
        open_adapter(folder)
    (folder / "adapter_config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"adapter_config\.json: is not valid"):
        open_adapter(folder)
    (folder / "adapter_config.json").unlink()
    with pytest.raises(CheckpointError, match=r"a: holds no adapter_config\.json, so it is no adapter"):
        open_adapter(folder)
    with pytest.raises(CheckpointError, match="weights: is no folder"):
        open_adapter(tmp_path / "weights")
    with pytest.raises(CheckpointError, match="names no adapter"):
        open_adapted(BASE, [], "base+")


def test_an_empty_adapter_is_told(tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "a", {"m.original_module.weight": randn(6, 5)})
    with pytest.raises(CheckpointError, match=r"a: holds no tensors"):
        open_adapter(folder)


def test_another_base_is_told(tmp_path: Path) -> None:
    home = tmp_path / "models--Org--name" / "snapshots" / "1"
    write_single(home, {"m.weight": randn(6, 5)})
    base = SafetensorsCheckpoint(home)
    for trained_on, warned in (("org/name", False), ("Org/other", True), ("/local/path", False), (None, False)):
        folder = write_adapter(tmp_path / "a", linear("m", 6, 5), base_model_name_or_path=trained_on)
        warnings = [f"{folder}: was trained on Org/other and is laid on Org/name."] if warned else []
        assert list(open_adapted(base, [folder], "base+a").warnings) == warnings


def test_a_shard_index_does_not_lead_out_of_the_folder(tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "a", linear("m", 6, 5))
    (folder / "adapter_model.safetensors").rename(tmp_path / "adapter_model-00001-of-00001.safetensors")
    index = {"weight_map": {f"{PREFIX}m.lora_A.weight": "../adapter_model-00001-of-00001.safetensors"}}
    (folder / "adapter_model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "adapter_model-00002-of-00002.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"which is not a \.safetensors file of this folder"):
        open_adapter(folder)
