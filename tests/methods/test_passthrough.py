from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from modelglue.checkpoint import MergedCheckpoint, ParameterSource, TensorsCheckpoint, save
from modelglue.errors import MergeError
from modelglue.methods import get
from tests.methods.merging import Tensor, merge, randn

ODD = {
    "float": torch.tensor([1.0, float("nan"), -0.0, float("inf")]),
    "half": torch.tensor([1.0, float("nan")]).bfloat16(),
    "eight": torch.tensor([1.5, float("nan")]).to(torch.float8_e4m3fn),
    "whole": torch.arange(7),
    "truth": torch.tensor([True, False]),
}


def passthrough(tensors: Mapping[str, Tensor], scale: float | None = None, **options: Any) -> MergedCheckpoint:
    return MergedCheckpoint(get("passthrough"), [TensorsCheckpoint(tensors)], None, {"scale": [scale]}, **options)


def same_bytes(one: Tensor, two: Tensor) -> bool:
    return one.dtype == two.dtype and one.shape == two.shape and torch.equal(one.view(torch.uint8), two.view(torch.uint8))


def test_the_written_file_holds_the_same_bytes(tmp_path: Path) -> None:
    save(passthrough(ODD), tmp_path / "out", workers=1)
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert sorted(found) == sorted(ODD)
    assert [name for name in ODD if not same_bytes(found[name], ODD[name])] == []


def test_dtypes_are_the_models_not_those_of_the_giver_of_the_config() -> None:
    model = {"t": randn(8)}
    copied = passthrough(model, donor=TensorsCheckpoint({"t": randn(8, seed=1).bfloat16()}))
    assert same_bytes(copied.tensor("t"), model["t"])


def test_another_dtype_is_rounded_to() -> None:
    assert same_bytes(passthrough({"t": randn(8)}, store="bfloat16").tensor("t"), randn(8).bfloat16())
    with pytest.raises(MergeError, match="'float' holds NaN"):
        passthrough(ODD, store="bfloat16").tensor("float")


def test_a_scale_multiplies() -> None:
    assert torch.equal(merge("passthrough", [randn(9)], each={"scale": [0.5]}), 0.5 * randn(9))
    assert torch.equal(merge("passthrough", [randn(9)], each={"scale": [0.0]}), torch.zeros(9))
    with pytest.raises(MergeError, match="8-bit floats are not merged"):
        passthrough(ODD, 0.5)


@dataclass(frozen=True)
class Silenced(ParameterSource):
    """Scale 0 for the tensors whose name says so, a copy for the rest."""

    part: str

    def for_tensor(self, name: str) -> Mapping[str, Any]:
        return {"scale": [0.0 if self.part in name else None]}

    def describe(self) -> Any:
        return {"silenced": self.part}


def test_some_tensors_may_be_scaled_and_the_others_copied() -> None:
    tensors = {"up.weight": ODD["float"], "down.weight": randn(4)}
    merged = MergedCheckpoint(get("passthrough"), [TensorsCheckpoint(tensors)], None, Silenced("down"))
    assert same_bytes(merged.tensor("up.weight"), ODD["float"])
    assert torch.equal(merged.tensor("down.weight"), torch.zeros(4))


def test_takes_exactly_one_model() -> None:
    values, faults = get("passthrough").resolve({}, [{}, {"scale": 2}], ["a", "b"])
    assert faults == ["passthrough takes exactly 1 model, the recipe has 2"]
    assert values == {"scale": [None, 2.0]}
