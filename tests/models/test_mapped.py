"""Mapped models compute what transformers computes in the stored dtype, and their weights are the files' pages."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from modelglue.checkpoint import open_checkpoint
from modelglue.errors import CheckpointError
from modelglue.models.live import load_live
from modelglue.models.mapped import load_mapped, stored_dtype
from tests.models.tiny import CONFIGS, random_model, saved_model

IDS = torch.tensor([[1, 5, 9, 30, 7, 7, 12]])


def _saved(folder: Path, name: str, dtype: torch.dtype) -> Path:
    random_model(name, seed=2).to(dtype).save_pretrained(folder)
    return folder


def _file_pages(value: torch.Tensor) -> bool:
    """Whether a tensor lies in a mapping of a file (Linux)."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        fields = line.split(maxsplit=5)
        begin, end = (int(part, 16) for part in fields[0].split("-"))
        if begin <= value.data_ptr() < end:
            return len(fields) > 5 and fields[5].endswith(".safetensors")
    return False


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_equals_transformers_in_the_stored_dtype(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    folder = _saved(tmp_path / "model", name, dtype)
    checkpoint = open_checkpoint(folder)
    assert stored_dtype(checkpoint) == str(dtype).removeprefix("torch.")
    model = load_mapped(checkpoint)
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    with torch.inference_mode():
        expected = reference(input_ids=IDS).logits
        assert torch.equal(model(input_ids=IDS).logits, expected)
        assert torch.equal(load_live(checkpoint, dtype=stored_dtype(checkpoint))(input_ids=IDS).logits, expected)


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="the system does not say what is mapped")
@pytest.mark.parametrize("name", ["llama", "llama-tied", "gpt2"])
def test_weights_are_the_files_pages(name: str, tmp_path: Path) -> None:
    model = load_mapped(open_checkpoint(_saved(tmp_path / "model", name, torch.bfloat16)))
    assert all(_file_pages(parameter) for parameter in model.parameters())
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert tied == (name != "llama")


def test_only_what_is_wanted_is_filled(tmp_path: Path) -> None:
    seen: list[str] = []

    def wanted(live: str) -> bool:
        seen.append(live)
        return "embed" in live

    checkpoint = open_checkpoint(saved_model(tmp_path / "model", "llama"))
    model = load_mapped(checkpoint, wanted=wanted)
    assert torch.equal(model.model.embed_tokens.weight, checkpoint.tensor("model.embed_tokens.weight"))
    assert sorted(seen) == sorted(model.state_dict())
    if Path("/proc/self/maps").exists():
        assert not _file_pages(model.lm_head.weight)


def test_mixed_dtypes_and_those_that_nothing_computes_in(tmp_path: Path) -> None:
    model = random_model("llama").to(torch.bfloat16)
    model.model.norm.to(torch.float32)
    model.save_pretrained(tmp_path / "model")
    loaded = load_mapped(open_checkpoint(tmp_path / "model"))
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.bfloat16}
    assert stored_dtype(_Says("F8_E4M3")) == "float32"


class _Says:
    """A checkpoint of one tensor of some dtype."""

    def __init__(self, dtype: str) -> None:
        self.dtype, self.numel = dtype, 4

    def names(self) -> list[str]:
        return ["x"]

    def info(self, name: str) -> Any:
        return self


def test_two_tensors_for_one_place_must_agree(tmp_path: Path) -> None:
    folder = saved_model(tmp_path / "model", "llama-tied")
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    assert torch.equal(load_mapped(open_checkpoint(folder)).lm_head.weight, tensors["lm_head.weight"])
    tensors["lm_head.weight"][0, 0] += 1
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"ties 'model.embed_tokens.weight' to 'lm_head.weight', but their values differ"):
        load_mapped(open_checkpoint(folder))


def test_what_does_not_fit_is_an_error(tmp_path: Path) -> None:
    folder = saved_model(tmp_path / "model", "llama")
    config = (folder / "config.json").read_text().replace('"intermediate_size": 24', '"intermediate_size": 32')
    (folder / "config.json").write_text(config)
    with pytest.raises(CheckpointError, match="has the shape"):
        load_mapped(open_checkpoint(folder))
