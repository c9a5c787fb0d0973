"""The views that exports are made of: any range of a tensor is the same as that range of the whole."""

from __future__ import annotations

import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from modelglue.checkpoint import TensorInfo, TensorsCheckpoint
from modelglue.errors import CheckpointError
from modelglue.mixture.exports.finished import FinishedCheckpoint, MadeCheckpoint, normals
from modelglue.mixture.exports.pieced import Piece, PiecedCheckpoint, rows_of, whole

SOURCE = TensorsCheckpoint({"a": torch.arange(12.0).view(4, 3), "b": torch.arange(100.0, 106.0).view(2, 3), "n": torch.arange(3)})
TURNED = [rows_of(SOURCE, "a", row, row + 1) for row in (2, 0, 3, 1)]
PIECED = PiecedCheckpoint(
    {
        "stack": ((6, 3), [whole(SOURCE, "a"), whole(SOURCE, "b")]),
        "turned": ((4, 3), TURNED),
    }
)
WHOLE = {"stack": torch.cat([SOURCE.tensor("a"), SOURCE.tensor("b")]), "turned": SOURCE.tensor("a")[[2, 0, 3, 1]]}


@settings(max_examples=30, deadline=None)
@given(st.sampled_from(sorted(WHOLE)), st.data())
def test_a_range_of_pieces(name: str, data: st.DataObject) -> None:
    flat = WHOLE[name].flatten()
    start = data.draw(st.integers(0, len(flat)))
    stop = data.draw(st.integers(start, len(flat)))
    assert PIECED.read(name, start, stop).equal(flat[start:stop])
    out = torch.full((stop - start,), -1.0)
    assert PIECED.read(name, start, stop, out=out) is out
    assert out.equal(flat[start:stop])


def test_pieces_know_what_they_are_of() -> None:
    assert PIECED.tensor("stack").equal(WHOLE["stack"])
    assert [name for _, name in PIECED.origins("stack")] == ["a", "b"]
    assert PIECED.sources() == [SOURCE]
    assert pickle.loads(pickle.dumps(PIECED)).tensor("turned").equal(WHOLE["turned"])
    again = PiecedCheckpoint({"turned": ((4, 3), [rows_of(SOURCE, "a", row, row + 1) for row in (2, 3, 0, 1)])})
    assert again.identity != PIECED.identity
    assert again.stamp != PIECED.stamp


def test_pieces_that_do_not_fill_their_shape_are_refused() -> None:
    with pytest.raises(CheckpointError, match=r"'x' \[4, 3\] cannot be put together: its parts hold 11 values"):
        PiecedCheckpoint({"x": ((4, 3), [Piece(SOURCE, "a", 0, 11)])})
    with pytest.raises(CheckpointError, match=r"15 values of \['F32', 'I64'\]"):
        PiecedCheckpoint({"x": ((5, 3), [whole(SOURCE, "a"), whole(SOURCE, "n")])})
    with pytest.raises(CheckpointError, match="Did you mean 'stack'"):
        PIECED.info("stac")


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 12), st.integers(0, 12), st.sampled_from([None, "BF16"]))
def test_noise_depends_on_nothing_but_the_position(first: int, second: int, dtype: str | None) -> None:
    made = FinishedCheckpoint(SOURCE, dtype=dtype, noise=0.5, seed=3, stream=1, factors={"a": 2.0})
    start, stop = sorted((first, second))
    assert made.read("a", start, stop).equal(made.read("a")[start:stop])
    out = torch.empty(stop - start, dtype=made.read("a").dtype)
    assert made.read("a", start, stop, out=out).equal(made.read("a")[start:stop])


def test_noise_is_normal_and_differs_between_experts_and_tensors() -> None:
    values = normals(0, "x", 0, 0, 40_000)
    assert abs(float(values.mean())) < 0.02
    assert abs(float(values.std()) - 1) < 0.02
    assert abs(float((values.abs() < 1).float().mean()) - 0.6827) < 0.01
    assert not values.equal(normals(0, "x", 1, 0, 40_000))
    assert not values.equal(normals(1, "x", 0, 0, 40_000))


def test_what_is_finished_is_rounded_once() -> None:
    made = FinishedCheckpoint(SOURCE, dtype="BF16", factors={"b": 0.1})
    assert made.tensor("b").equal((SOURCE.tensor("b") * 0.1).to(torch.bfloat16))
    assert made.tensor("a").equal(SOURCE.tensor("a").to(torch.bfloat16))
    assert made.info("n").dtype == "I64"
    assert made.tensor("n").equal(SOURCE.tensor("n"))
    plain = FinishedCheckpoint(SOURCE)
    assert plain.read("a").data_ptr() == SOURCE.read("a").data_ptr()
    assert not plain.computed("a")
    assert made.computed("a")


def test_zeros_take_no_memory_and_have_an_identity() -> None:
    made = MadeCheckpoint({"gate": torch.ones(2)}, {"zero": TensorInfo((2**20, 2**20), "BF16")})
    assert list(made.names()) == ["gate", "zero"]
    assert made.read("zero", 5, 9).tolist() == [0.0] * 4
    assert made.read("zero", 0, 3, out=torch.ones(3, dtype=torch.bfloat16)).tolist() == [0.0] * 3
    assert made.sources() == ()
    assert made.identity != MadeCheckpoint({"gate": torch.ones(2)}).identity
    assert made.stamp != MadeCheckpoint({"gate": torch.zeros(2)}, {"zero": TensorInfo((2**20, 2**20), "BF16")}).stamp
