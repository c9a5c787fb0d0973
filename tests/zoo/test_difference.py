"""Where two models differ, against the definitions written down plainly."""

from __future__ import annotations

import json
import math
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import modelglue
from modelglue.checkpoint import TensorsCheckpoint, open_checkpoint
from modelglue.checkpoint.tensor_names import Layer
from modelglue.errors import UserError
from modelglue.settings import BLOCK_ELEMENTS
from modelglue.zoo import Difference, Sums, diff
from modelglue.zoo import difference as module
from tests.checkpoint.files import weight_file
from tests.checkpoint.merges import merge_of, write_zoo
from tests.zoo.models import model, tensors


def of(found: Difference, name: str) -> Sums:
    return next(one.sums for one in found.tensors if one.name == name)


def plainly(A: torch.Tensor, B: torch.Tensor) -> dict[str, float]:
    a, b = A.double().flatten(), B.double().flatten()
    return {
        "norm": float((b - a).norm()), "relative": float((b - a).norm() / a.norm()), "largest": float((b - a).abs().max()),
        "cosine": float(a @ b / a.norm() / b.norm()), "changed_share": float((A != B).double().mean()),
    }  # fmt: skip


@given(
    shape=st.sampled_from([(7,), (3, 5), (2, 3, 4), (300, 400), ()]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int32, torch.uint8]),
    share=st.sampled_from([0.0, 0.3, 1.0]),
    seed=st.integers(0, 1000),
)
@settings(max_examples=30, deadline=None)
def test_numbers_of_a_tensor(shape: tuple[int, ...], dtype: torch.dtype, share: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    A = (torch.rand(shape, generator=generator) * 100 + 1).to(dtype)
    B = torch.where(torch.rand(shape, generator=generator) < share, (torch.rand(shape, generator=generator) * 100 + 1).to(dtype), A)
    found = diff(TensorsCheckpoint({"w": A}), TensorsCheckpoint({"w": B}))
    sums, expected = of(found, "w"), plainly(A, B)
    assert {name: getattr(sums, name) for name in expected} == pytest.approx(expected, rel=1e-9, abs=1e-12)
    assert (sums.numel, sums.not_finite) == (A.numel(), 0)
    assert found.identical is torch.equal(A, B)


def test_the_same_result_whatever_the_workers_and_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    A = torch.randn(5 * BLOCK_ELEMENTS + 77, generator=torch.Generator().manual_seed(1)).bfloat16()
    B = (A * 1.01).bfloat16()
    ours, theirs = (TensorsCheckpoint({"h.0.attn.w": X, "h.1.w": X[:1000], "x": X[:3]}) for X in (A, B))
    once = diff(ours, theirs)
    monkeypatch.setattr(module, "_TASK", 1000)
    assert diff(ours, theirs, workers=2) == once
    monkeypatch.setattr(module, "_PIECE", BLOCK_ELEMENTS)
    assert diff(ours, theirs, workers=1).tensors == once.tensors


def test_bits_decide_what_has_changed() -> None:
    """Zero and minus zero are two things on the disk, and so are two NaNs; one NaN in both is one thing."""
    A = torch.tensor([0.0, 1.0, math.nan, 2.0])
    B = torch.tensor([-0.0, 1.0, math.nan, 2.0])
    found = diff(TensorsCheckpoint({"w": A}), TensorsCheckpoint({"w": B}))
    assert (of(found, "w").changed, of(found, "w").not_finite, of(found, "w").norm) == (1, 1, 0.0)
    assert found.warnings == ("tensor 'w' holds 1 values that are NaN or infinite; no norm counts them.",)
    same = diff(TensorsCheckpoint({"w": A}), TensorsCheckpoint({"w": A.clone()}))
    assert same.identical
    assert of(same, "w").norm == 0.0
    assert of(same, "w").a == pytest.approx(5.0)


def test_infinities_do_not_hide_the_rest() -> None:
    found = diff(
        TensorsCheckpoint({"w": torch.tensor([math.inf, 3.0, 1.0])}), TensorsCheckpoint({"w": torch.tensor([1.0, 3.0, -math.inf])})
    )
    sums = of(found, "w")
    assert (sums.changed, sums.not_finite, sums.norm, sums.a, sums.b, sums.largest) == (2, 2, 0.0, 9.0, 9.0, 0.0)


def test_what_cannot_be_compared_is_listed() -> None:
    a = TensorsCheckpoint({"both": torch.ones(3), "wide": torch.ones(2, 3), "mine": torch.ones(1), "half": torch.ones(4)})
    b = TensorsCheckpoint({"both": torch.ones(3), "wide": torch.ones(2, 4), "yours": torch.ones(1), "half": torch.ones(4).bfloat16()})
    found = diff(a, b, labels=("A", "B"))
    assert (found.only_a, found.only_b, found.shapes) == (("mine",), ("yours",), (("wide", (2, 3), (2, 4)),))
    assert [one.name for one in found.tensors] == ["both", "half"]
    assert not found.identical
    assert of(found, "half").changed == 0
    assert found.warnings == (
        "tensor 'wide' is 2 x 3 in A and 2 x 4 in B: not compared.",
        "1 tensors of A are not in B: 'mine'.",
        "1 tensors of B are not in A: 'yours'.",
        "1 tensors differ in dtype (F32 and BF16); there, values are compared: 'half'.",
    )


def test_dtypes_that_are_not_read_are_listed_and_complex_numbers_are_two(tmp_path: Path) -> None:
    header = {"packed": {"dtype": "F4", "shape": [4], "data_offsets": [0, 2]}, "z": {"dtype": "C64", "shape": [1], "data_offsets": [2, 10]}}
    found = []
    for number, name in enumerate("ab"):
        data = bytes(2) + struct.pack("<2f", 3.0, 4.0 + number)
        (tmp_path / f"{name}.safetensors").write_bytes(weight_file(header, data))
        found.append(open_checkpoint(tmp_path / f"{name}.safetensors"))
    difference = diff(*found)
    assert difference.packed == ("packed",)
    assert difference.warnings == ("1 tensors pack several numbers into a byte and are not compared: 'packed'.",)
    assert (of(difference, "z").norm, of(difference, "z").a, of(difference, "z").changed) == (1.0, 25.0, 1)


def test_nothing_in_common() -> None:
    with pytest.raises(UserError, match="A and B have no tensor name in common"):
        diff(TensorsCheckpoint({"a": torch.ones(1)}), TensorsCheckpoint({"b": torch.ones(1)}), labels=("A", "B"))


def test_layers_and_roles_are_sums_of_their_tensors() -> None:
    before, after = tensors(1), tensors(1)
    after["model.layers.1.mlp.up_proj.weight"] *= 1.5
    after["model.layers.1.self_attn.q_proj.bias"] += 1
    found = diff(model(before), model(after))
    assert list(found.layers) == [Layer("model.layers", 0), Layer("model.layers", 1), None]
    assert {layer: sorted(roles) for layer, roles in found.layers.items()} == {
        Layer("model.layers", 0): ["attention", "feed_forward", "norm"],
        Layer("model.layers", 1): ["attention", "feed_forward", "norm"],
        None: ["embedding", "head"],
    }
    assert {role: sums.changed for role, sums in found.roles.items()} == {
        "embedding": 0, "attention": 6, "feed_forward": 60, "norm": 0, "head": 0,
    }  # fmt: skip
    changed = [layer for layer, roles in found.layers.items() if any(sums.changed for sums in roles.values())]
    assert changed == [Layer("model.layers", 1)]
    both = torch.cat([before[f"model.layers.1.mlp.{name}_proj.weight"].flatten() for name in ("up", "down")])
    feed_forward = found.layers[Layer("model.layers", 1)]["feed_forward"]
    assert feed_forward.norm == pytest.approx(0.5 * float(before["model.layers.1.mlp.up_proj.weight"].norm()), rel=1e-6)
    assert feed_forward.relative == pytest.approx(feed_forward.norm / float(both.norm()), rel=1e-6)
    assert sum(sums.numel for sums in found.roles.values()) == found.total.numel == sum(value.numel() for value in before.values())


def test_zeros_have_no_direction() -> None:
    found = diff(
        TensorsCheckpoint({"w": torch.zeros(2), "v": torch.zeros(2)}), TensorsCheckpoint({"w": torch.zeros(2), "v": torch.ones(2)})
    )
    assert (of(found, "w").relative, of(found, "v").changed_share) == (0.0, 1.0)
    assert math.isnan(of(found, "w").cosine)
    assert math.isnan(of(found, "v").relative)


def test_merges_are_compared_without_writing_them(tmp_path: Any) -> None:
    zoo = write_zoo(tmp_path, 2)
    merged = merge_of(zoo, "ties")
    found = diff(zoo[0], merged)
    expected = plainly(zoo[0].tensor("embed.weight"), merged.tensor("embed.weight"))
    assert of(found, "embed.weight").norm == pytest.approx(expected["norm"], rel=1e-9)
    assert of(found, "embed.weight").cosine == pytest.approx(expected["cosine"], rel=1e-9)
    assert of(found, "position_ids").changed == 0
    assert of(found, "empty").numel == 0


def test_progress_counts_the_bytes_of_both() -> None:
    a, b = model(tensors(1)), model(tensors(2))
    seen: list[tuple[int, int]] = []
    diff(a, b, progress=lambda done, total: seen.append((done, total)))
    size = 2 * sum(a.info(name).nbytes for name in a.names())
    assert seen[-1] == (size, size)


def test_json() -> None:
    found = diff(model(tensors(1)), model(tensors(2)), labels=("A", "B")).to_json()
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert (found["a"], found["b"], found["identical"]) == ("A", "B", False)
    assert [row["layer"] for row in found["layers"]] == [0, 1, None]
    assert len(found["tensors"]) == 14
    assert found["total"]["elements"] == 480


def test_the_public_name() -> None:
    assert modelglue.diff is diff
