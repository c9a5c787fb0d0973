"""Tensors times a number."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from modelglue.checkpoint import SafetensorsCheckpoint, TensorsCheckpoint, save
from modelglue.checkpoint.scaled import ScaledCheckpoint
from modelglue.errors import CheckpointError


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("factor", [-1.0, 0.37, 1 / 3, 4.0])
def test_values_are_multiplied_wide_and_rounded_once(dtype: torch.dtype, factor: float) -> None:
    value = torch.randn(3, 5, generator=torch.Generator().manual_seed(0)).to(dtype)
    other = torch.ones(2, dtype=dtype)
    scaled = ScaledCheckpoint(TensorsCheckpoint({"w": value, "b": other}), {"w": factor})
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    expected = (value.to(wide) * factor).to(dtype)
    assert torch.equal(scaled.tensor("w"), expected)
    assert torch.equal(scaled.tensor("b"), other)
    assert torch.equal(scaled.read("w", 4, 9), expected.view(-1)[4:9])
    out = torch.empty(5, dtype=dtype)
    assert scaled.read("w", 4, 9, out) is out
    assert torch.equal(out, expected.view(-1)[4:9])
    wider = torch.empty(5, dtype=torch.float64)  # which changes nothing of what is stored
    assert torch.equal(scaled.read("w", 4, 9, wider), expected.view(-1)[4:9].double())
    assert torch.equal(value, torch.randn(3, 5, generator=torch.Generator().manual_seed(0)).to(dtype))


def test_what_a_factor_of_one_costs() -> None:
    source = TensorsCheckpoint({"w": torch.ones(2), "v": torch.ones(2)})
    scaled = ScaledCheckpoint(source, {"w": 1.0, "v": 2.0})
    assert (scaled.computed("w"), scaled.computed("v")) == (False, True)
    assert scaled.working_bytes("v", 10) > scaled.working_bytes("w", 10)
    assert scaled.read("w").data_ptr() == source.read("w").data_ptr()


def test_factors_are_part_of_what_it_is(tmp_path: Path) -> None:
    source = TensorsCheckpoint({"w": torch.ones(2)}, label="x")
    two, three = ScaledCheckpoint(source, {"w": 2.0}), ScaledCheckpoint(source, {"w": 3.0})
    assert two.identity != three.identity != source.identity
    assert two.stamp != three.stamp
    assert two.describe() == {"scale": {"w": 2.0}, "of": {"model": "x"}}
    save(two, tmp_path / "out", workers=1)
    assert SafetensorsCheckpoint(tmp_path / "out").tensor("w").tolist() == [2.0, 2.0]


def test_what_cannot_be_scaled_is_refused() -> None:
    source = TensorsCheckpoint({"weight": torch.ones(2), "steps": torch.ones(2, dtype=torch.int64)})
    with pytest.raises(CheckpointError, match=r"'wieght' should be scaled.*Did you mean 'weight'"):
        ScaledCheckpoint(source, {"wieght": 2.0})
    with pytest.raises(CheckpointError, match="'steps' should be scaled, but is stored as I64"):
        ScaledCheckpoint(source, {"steps": 2.0})
    with pytest.raises(CheckpointError, match="multiplied by inf"):
        ScaledCheckpoint(source, {"weight": float("inf")})
