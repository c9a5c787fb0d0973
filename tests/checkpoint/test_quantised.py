"""Quantised models are described, inspected, and refused by name where a merge would compute with them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from modelglue.checkpoint import RenamedCheckpoint, open_checkpoint, quantisation_of
from modelglue.errors import MergeError
from tests.checkpoint.files import weight_file, write_single

I32, U8, F16 = torch.zeros(2, dtype=torch.int32), torch.zeros(2, dtype=torch.uint8), torch.zeros(2, dtype=torch.float16)
F8 = torch.zeros(2).to(torch.float8_e4m3fn)
L = "model.layers.0.mlp.down_proj"
PLAIN = {"model.embed_tokens.weight": F16, f"{L}.weight": F16, "model.norm.weight": F16}

#: tensors and config of a model -> words of what is said, the way out among them
QUANTISED: dict[str, tuple[dict[str, torch.Tensor], dict[str, Any], tuple[str, ...]]] = {
    "gptq": (
        {f"{L}.qweight": I32, f"{L}.qzeros": I32, f"{L}.scales": F16, f"{L}.g_idx": I32},
        {},
        ("GPTQ or AWQ", f"{L}.qweight", "Merge the release"),
    ),
    "gptq-config": (PLAIN, {"quantization_config": {"quant_method": "gptq", "bits": 4}}, ("GPTQ or AWQ, says quantization_config",)),
    "awq-config": (PLAIN, {"quantization_config": {"quant_method": "awq"}}, ("GPTQ or AWQ",)),
    "bitsandbytes-4": (
        {**PLAIN, f"{L}.weight": U8, f"{L}.weight.absmax": F16, f"{L}.weight.quant_state.bitsandbytes__nf4": U8},
        {},
        ("bitsandbytes", "bitsandbytes__nf4", "model.dequantize()"),
    ),
    "bitsandbytes-8": ({**PLAIN, f"{L}.SCB": F16}, {}, ("bitsandbytes", "model.dequantize()")),
    "bitsandbytes-config": (PLAIN, {"quantization_config": {"load_in_4bit": True}}, ("bitsandbytes, says quantization_config",)),
    "mxfp4": (
        {"mlp.experts.gate_up_proj_blocks": U8, "mlp.experts.gate_up_proj_scales": U8},
        {},
        ("MXFP4", "Mxfp4Config(dequantize=True)"),
    ),
    "mxfp4-config": (PLAIN, {"quantization_config": {"quant_method": "mxfp4"}}, ("MXFP4", "take that entry out of config.json")),
    "fp8-inverse-scales": (
        {**PLAIN, f"{L}.weight": F8, f"{L}.weight_scale_inv": F16},
        {},
        ("scaled fp8", "weight_scale_inv", "dequantize=True"),
    ),
    "fp8-scales": ({**PLAIN, f"{L}.weight": F8, f"{L}.weight_scale": F16}, {}, ("scaled fp8", "take a bfloat16 release")),
    "fp8-of-a-diffusion-model": ({**PLAIN, f"{L}.weight": F8, f"{L}.scale_weight": F16}, {}, ("scaled fp8",)),
    "nvfp4": ({**PLAIN, f"{L}.weight": U8, f"{L}.weight_scale": F8, f"{L}.weight_scale_2": F16}, {}, ("scaled fp8",)),
    "compressed-tensors": (
        {**PLAIN, f"{L}.weight_packed": I32, f"{L}.weight_scale": F16, f"{L}.weight_shape": I32},
        {},
        ("compressed-tensors",),
    ),
    "compressed-tensors-config": (PLAIN, {"compression_config": {"quant_method": "compressed-tensors"}}, ("says compression_config",)),
    "hqq": ({**PLAIN, f"{L}.W_q": U8, f"{L}.scale": F16}, {}, ("HQQ",)),
    "quanto": ({**PLAIN, f"{L}.weight._data": U8, f"{L}.weight._scale": F16}, {}, ("quanto",)),
    "aqlm": ({**PLAIN, f"{L}.codebooks": F16, f"{L}.codes": U8}, {}, ("AQLM",)),
    "torchao": ({**PLAIN, f"{L}.weight_qdata": U8, f"{L}.weight_scale": F16}, {}, ("torchao",)),
    "torchao-config": (PLAIN, {"quantization_config": {"quant_method": "torchao"}}, ("torchao",)),
    "unheard-of": (
        PLAIN,
        {"quantization_config": {"quant_method": "nf3"}},
        ("is quantised (nf3, says quantization_config of its config.json)",),
    ),
    "method-unsaid": (PLAIN, {"quantization_config": {"bits": 3}}, ("an unknown method",)),
    "a-part-of-a-larger-model": (
        PLAIN,
        {"text_config": {"quantization_config": {"quant_method": "gptq"}}},
        ("text_config.quantization_config",),
    ),
}


def apart(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The safetensors library does not write one tensor under two names."""
    return {name: tensor.clone() for name, tensor in tensors.items()}


@pytest.mark.parametrize("name", QUANTISED)
def test_quantised_model_is_refused_by_name_in_a_merge(name: str, tmp_path: Path) -> None:
    from modelglue.recipe import merge

    tensors, config, words = QUANTISED[name]
    write_single(tmp_path / "model", apart(tensors), config=config)
    checkpoint = open_checkpoint(tmp_path / "model")
    found = quantisation_of(checkpoint)
    assert found is not None
    assert found.startswith("is quantised (")
    for word in words:
        assert word in found
    assert found == quantisation_of(RenamedCheckpoint(checkpoint, {name: name for name in checkpoint.names()}))
    models = [{"model": str(tmp_path / "model"), "weight": 1.0}, {"model": str(tmp_path / "model"), "weight": 1.0}]
    with pytest.raises(MergeError) as caught:
        merge({"method": "linear", "models": models})
    assert str(caught.value) == f"{tmp_path / 'model'} {found}"


@pytest.mark.parametrize("name", QUANTISED)
def test_quantised_model_can_be_looked_at(name: str, tmp_path: Path) -> None:
    tensors, config, _ = QUANTISED[name]
    checkpoint = open_checkpoint(write_single(tmp_path, apart(tensors), config=config))
    assert [checkpoint.info(tensor).shape for tensor in checkpoint.names()] == [(2,)] * len(tensors)
    assert all(checkpoint.tensor(tensor).shape == (2,) for tensor in checkpoint.names())


def test_packed_dtypes_are_quantised(tmp_path: Path) -> None:
    header = {"w": {"dtype": "F4", "shape": [4], "data_offsets": [0, 2]}}
    (tmp_path / "model.safetensors").write_bytes(weight_file(header, b"\0\0"))
    found = quantisation_of(open_checkpoint(tmp_path))
    assert found == (
        "is quantised (tensor 'w' is F4, several numbers to a byte). Merge the release that it was quantised from, and quantise the result."
    )


#: tensors that look a little like quantised ones
NOT_QUANTISED: dict[str, tuple[dict[str, torch.Tensor], Any]] = {
    "plain": (PLAIN, {}),
    "integers-and-truth": ({**PLAIN, "position_ids": I32, "mask": torch.tensor([True])}, {}),
    "unscaled-fp8": ({**PLAIN, f"{L}.weight": F8}, {}),
    "scales-of-a-layer": ({**PLAIN, "layer_scale.scale": F16, "attn.scales": F16, "x_scales": F16, "blocks.0.weight": F16}, {}),
    "codebook": ({**PLAIN, "quantizer.codebooks": F16}, {}),
    "empty-section": (PLAIN, {"quantization_config": {}}),
    "no-section": (PLAIN, {"quantization_config": None, "compression_config": "none"}),
}


@pytest.mark.parametrize("name", NOT_QUANTISED)
def test_plain_models_are_not_quantised(name: str, tmp_path: Path) -> None:
    tensors, config = NOT_QUANTISED[name]
    write_single(tmp_path, apart(tensors))
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert quantisation_of(open_checkpoint(tmp_path)) is None
