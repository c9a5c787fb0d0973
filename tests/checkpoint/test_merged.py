"""The engine: what it refuses, what it rounds, and how often it reads."""

from __future__ import annotations

import copy
import errno
import math
import os
import pickle
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from modelglue.checkpoint import (
    Checkpoint,
    JoinedCheckpoint,
    MergedCheckpoint,
    RenamedCheckpoint,
    TensorsCheckpoint,
    merged,
    open_checkpoint,
    save,
)
from modelglue.checkpoint.engine.arithmetic import SURVEY_ELEMENTS
from modelglue.errors import CheckpointError, MergeError, RunError
from modelglue.methods import get
from tests.checkpoint.files import names_in, randn
from tests.checkpoint.merges import merge_of

Tensors = Mapping[str, torch.Tensor]


class Counting(TensorsCheckpoint):
    """Counts the elements that are read of every tensor; equal weights for all readers."""

    def __init__(self, tensors: Tensors, label: str = "counted") -> None:
        super().__init__(tensors, label=label)
        self.read_elements: Counter[str] = Counter()

    def read(self, name: str, start: int = 0, stop: int | None = None, out: torch.Tensor | None = None) -> torch.Tensor:
        self.read_elements[name] += (self.info(name).numel if stop is None else stop) - start
        return super().read(name, start, stop, out)

    def times(self) -> dict[str, float]:
        """How often every tensor was read, on average over its elements."""
        return {name: count / self.info(name).numel for name, count in self.read_elements.items()}


def models_of(
    count: int = 3, *, dtype: torch.dtype = torch.float32, length: int = 50, kind: type[TensorsCheckpoint] = TensorsCheckpoint
) -> list[Any]:
    """A base and `count` models beside it: a matrix and a vector."""
    base = {"m": randn(6, length, seed=1), "v": randn(length, seed=2)}
    models = [
        {name: values + 0.1 * randn(*values.shape, seed=10 * n + len(name)) for name, values in base.items()} for n in range(1, count + 1)
    ]
    return [kind({k: v.to(dtype) for k, v in tensors.items()}, label=f"model{n}") for n, tensors in enumerate([base, *models])]


def linear(models: Sequence[Checkpoint], weight: Sequence[float] | None = None, **options: Any) -> MergedCheckpoint:
    weight = weight or [1.0] * len(models)
    return MergedCheckpoint(get("linear"), models, None, {"weight": weight, "normalize": True}, **options)


def weighted(tensors: Sequence[torch.Tensor], weight: Sequence[float], **options: Any) -> torch.Tensor:
    """The plain weighted sum of one tensor."""
    models = [TensorsCheckpoint({"w": tensor}, label=f"model{n}") for n, tensor in enumerate(tensors)]
    return MergedCheckpoint(get("linear"), models, None, {"weight": list(weight), "normalize": False}, **options).tensor("w")


def refused(action: Any, *words: str) -> str:
    with pytest.raises(MergeError) as caught:
        action()
    assert caught.value.exit_code == 2
    for word in words:
        assert word in str(caught.value)
    return str(caught.value)


# -- numbers that are none ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("place", [0, 1, 3])
def test_not_a_number_in_an_input_names_model_tensor_and_place(value: float, place: int) -> None:
    zoo = models_of()
    tensors = {name: zoo[place].tensor(name).clone() for name in zoo[place].names()}
    tensors["m"][4, 17] = value
    zoo[place] = TensorsCheckpoint(tensors, label=f"model{place}")
    merged_ = merge_of(zoo, "ties")
    refused(lambda: merged_.read("m"), f"model{place}: tensor 'm' holds NaN or infinity near element 217")
    assert torch.isfinite(merged_.read("v")).all(), "other tensors are not to blame"


def test_infinities_of_both_signs_do_not_cancel_out() -> None:
    values = torch.zeros(10)
    values[3], values[7] = float("inf"), -float("inf")
    refused(lambda: weighted([torch.ones(10), values], [0.5, 0.5]), "model1: tensor 'w'", "near element 3")


def test_large_numbers_whose_sum_overflows_are_no_infinities() -> None:
    values = torch.full((8,), 3e38)
    assert torch.equal(weighted([values, values], [0.5, 0.5]), values)


def test_result_that_is_no_number_names_the_tensor() -> None:
    values = torch.full((4,), 3e38)
    refused(lambda: weighted([values, values], [1.0, 1.0]), "linear: tensor 'w' comes out with NaN or infinity")


@pytest.mark.parametrize(
    ("store", "value", "largest"), [("float16", 70000.0, "65504"), ("float16", -65520.0, "65504"), ("bfloat16", 3.4e38, "3.38953e+38")]
)
def test_result_that_does_not_fit_its_stored_dtype_is_refused(store: str, value: float, largest: str) -> None:
    values = torch.tensor([1.0, value, 2.0])
    refused(lambda: weighted([values], [1.0], store=store), f"tensor 'w' does not fit {store} (largest number {largest})", "wider dtype")


def test_float64_that_does_not_fit_float32_is_refused() -> None:
    values = torch.tensor([1e300], dtype=torch.float64)
    refused(lambda: weighted([values], [1.0], store="float32"), "tensor 'w' does not fit float32")
    assert weighted([values], [1.0]).item() == 1e300


@pytest.mark.parametrize("value", [65504.0, 65519.0])
def test_result_that_rounds_to_the_largest_float16_is_kept(value: float) -> None:
    result = weighted([torch.full((3000,), value)], [1.0], store="float16")
    assert result.dtype == torch.float16
    assert result.tolist() == [65504.0] * 3000


# -- dtypes -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8, torch.bool])
def test_equal_integers_are_copied_and_different_ones_refused(dtype: torch.dtype) -> None:
    ids = torch.tensor([0, 1, 1, 0]).to(dtype)
    other = ids.clone()
    other[2] = 0
    float_ = torch.ones(2)
    models = [TensorsCheckpoint({"ids": ids, "w": float_ * n}, label=f"model{n}") for n in range(1, 4)]
    result = linear(models).tensor("ids")
    assert (result.dtype, result.tolist()) == (dtype, ids.tolist())
    models[2] = TensorsCheckpoint({"ids": other, "w": float_}, label="model3")
    refused(lambda: linear(models).tensor("ids"), "linear: tensor 'ids'", "cannot be merged", "model3 differs from model1")


def test_stored_dtype_is_for_floats_only() -> None:
    model = TensorsCheckpoint({"ids": torch.arange(3), "w": torch.ones(2, dtype=torch.bfloat16)})
    found = linear([model], store="float32")
    assert (found.info("ids").dtype, found.info("w").dtype) == ("I64", "F32")


@pytest.mark.parametrize("kinds", [(torch.int32, torch.int64), (torch.uint8, torch.bool), (torch.float32, torch.int32)])
def test_other_dtypes_under_one_name_are_refused(kinds: tuple[torch.dtype, torch.dtype]) -> None:
    """Equal numbers in another width are other bytes."""
    models = [TensorsCheckpoint({"ids": torch.tensor([1, 0]).to(kind)}, label=f"model{n}") for n, kind in enumerate(kinds)]
    names = {torch.int32: "I32", torch.int64: "I64", torch.uint8: "U8", torch.bool: "BOOL", torch.float32: "F32"}
    refused(lambda: linear(models), f"tensor 'ids' is {names[kinds[1]]} in model1 and {names[kinds[0]]} in model0")


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_eight_bit_floats_are_refused_before_a_tensor_is_read(dtype: torch.dtype, tmp_path: Path) -> None:
    models = [Counting({"w": randn(8, seed=n).to(dtype), "v": randn(8)}, label=f"model{n}") for n in range(2)]
    words = ("linear: tensor 'w' of model0 is F8_E", "8-bit floats are not merged elementwise", "Dequantise")
    for model in models:
        model.__dict__["identity"] = "0" * 64
    refused(lambda: save(linear(models), tmp_path / "out"), *words)
    refused(lambda: linear(models).read("w"), *words)
    assert [model.read_elements for model in models] == [Counter(), Counter()]
    assert names_in(tmp_path) == []


def test_eight_bit_floats_beside_others_are_refused() -> None:
    models = [TensorsCheckpoint({"w": randn(8).to(kind)}, label=f"m{n}") for n, kind in enumerate((torch.bfloat16, torch.float8_e4m3fn))]
    refused(lambda: linear(models), "tensor 'w' is F8_E4M3 in m1 and BF16 in m0")


def test_mixed_precision_is_merged_in_float32_and_stored_as_the_donors() -> None:
    one, two = randn(40, seed=1, dtype=torch.bfloat16), randn(40, seed=2, dtype=torch.float16)
    expected = (one.float() * 0.5 + two.float() * 0.5).bfloat16()
    assert torch.equal(weighted([one, two], [0.5, 0.5]), expected)


def test_one_wide_input_makes_the_arithmetic_wide() -> None:
    one, two = randn(40, seed=1), randn(40, seed=2, dtype=torch.float64)
    assert torch.equal(weighted([one, two], [0.5, 0.5], store="float64"), one.double() * 0.5 + two * 0.5)


# -- tensors that do not match ------------------------------------------------------------------------------------------------


def test_all_differences_are_named_in_one_error() -> None:
    zoo = models_of()
    base, first, second = ({name: model.tensor(name) for name in model.names()} for model in zoo[:3])
    bad = TensorsCheckpoint({"m": first["m"].view(3, 100), "extra": torch.ones(1)}, label="bad")
    worse = TensorsCheckpoint({"m": second["m"], "v": torch.ones(49), "other": torch.ones(1)}, label="worse")
    message = refused(
        lambda: linear([TensorsCheckpoint(base, label="good"), bad, worse]),
        "linear: the models do not have the same tensors",
        "tensor 'v' is missing in bad",
        "tensor 'extra' is only in bad, not in good",
        "tensor 'm' has shape [3, 100] in bad and [6, 50] in good",
        "tensor 'v' has shape [49] in worse and [50] in good",
        "tensor 'other' is only in worse, not in good",
    )
    assert message.count("\n  ") == 5
    assert "more" not in message


def test_very_many_differences_are_counted() -> None:
    one = TensorsCheckpoint({f"t{n:02}": torch.ones(1) for n in range(40)}, label="one")
    message = refused(lambda: linear([one, TensorsCheckpoint({"t00": torch.ones(1)}, label="two")]), "... and 27 more")
    assert message.count("is missing in two") == 12


def test_base_and_donor_must_match_too() -> None:
    zoo = models_of()
    other = TensorsCheckpoint({"m": zoo[0].tensor("m")}, label="short")
    refused(lambda: merge_of([other, *zoo[1:]], "task_arithmetic"), "tensor 'v' is only in model1, not in short")
    refused(lambda: linear(zoo[1:], donor=other), "tensor 'v' is only in model1, not in short")


def test_no_models_and_no_base_are_refused() -> None:
    refused(lambda: linear([]), "linear: no models to merge")
    refused(lambda: MergedCheckpoint(get("ties"), models_of()[1:], None, {}), "ties: needs a base model and none was given")


# -- merges of merges ---------------------------------------------------------------------------------------------------------


def nested(zoo: list[Any], outer: str = "ties", store: str | None = "float32", **shared: Any) -> MergedCheckpoint:
    """(model 1 with model 2) with model 3, on the base."""
    return merge_of([zoo[0], merge_of([zoo[0], *zoo[1:3]], "task_arithmetic", store=store), zoo[3]], outer, **shared)


@pytest.mark.parametrize("outer", ["linear", "ties", "dare_ties", "model_stock"])
def test_nested_merge_is_the_merge_in_two_steps(outer: str, tmp_path: Path) -> None:
    """In float32, with the intermediate model on disk, to the last bit."""
    zoo = models_of(dtype=torch.bfloat16, length=700)
    save(merge_of([zoo[0], *zoo[1:3]], "task_arithmetic", store="float32"), tmp_path / "middle")
    middle = open_checkpoint(tmp_path / "middle")
    two_steps = merge_of([zoo[0], middle, zoo[3]], outer)
    one_step = nested(zoo, outer)
    for name in ("m", "v"):
        assert torch.equal(one_step.tensor(name), two_steps.tensor(name))
        if outer != "model_stock":  # which returns the base for models that have nothing in common
            rounded = nested(zoo, outer, store="bfloat16").tensor(name)
            assert not torch.equal(rounded, one_step.tensor(name)), "rounding in between would show"


def renamed(checkpoint: Checkpoint) -> Checkpoint:
    return RenamedCheckpoint(checkpoint, {name: name for name in checkpoint.names()})


def joined(checkpoint: Checkpoint) -> Checkpoint:
    return JoinedCheckpoint({"": checkpoint})


@pytest.mark.parametrize("view", [lambda checkpoint: checkpoint, renamed, joined], ids=["bare", "renamed", "joined"])
@pytest.mark.parametrize("scope", ["tensor", "model"])
def test_nested_input_of_a_surveying_method_is_evaluated_once(scope: str, view: Any, tmp_path: Path) -> None:
    """Four rounds and the merge read it; its own inputs are read once, directly and behind views."""
    zoo = models_of(4, kind=Counting, length=300)
    for model in zoo:
        model.__dict__["identity"] = "0" * 64
    inner = view(merge_of(zoo[:3], "task_arithmetic", store="float32"))
    save(merge_of([zoo[0], inner, zoo[3]], "ties", trim_scope=scope), tmp_path / "out", workers=1, chunk=128)
    for model in zoo[1:3]:
        assert model.times() == {"m": 1.0, "v": 1.0}
    assert all(times > 2 for times in zoo[3].times().values()), "a plain input is read again, which costs nothing"


def test_nesting_does_not_cost_exponentially(tmp_path: Path) -> None:
    zoo = models_of(1, kind=Counting)
    for model in zoo:
        model.__dict__["identity"] = "0" * 64
    expression: Checkpoint = zoo[1]
    for _ in range(5):
        expression = merge_of([zoo[0], expression], "ties", store="float32")
    save(expression, tmp_path / "out", workers=1)
    alone = models_of(1, kind=Counting)
    alone[0].__dict__["identity"] = alone[1].__dict__["identity"] = "0" * 64
    save(merge_of(alone, "ties", store="float32"), tmp_path / "alone", workers=1)
    assert zoo[1].times() == alone[1].times()


def test_scratch_space_that_runs_out_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int, offset: int, length: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full, raising=False)
    with pytest.raises(RunError, match=r"a nested merge needs 1,200 bytes of scratch space here .No space left") as caught:
        nested(models_of()).read("m")
    assert caught.value.exit_code == 1


def test_scratch_files_are_gone_with_their_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    expression = nested(models_of())
    expression.read("m")
    assert list(expression._engine._spilled) == ["m"]
    assert names_in(tmp_path) == []
    expression.read("v")
    assert list(expression._engine._spilled) == ["v"], "the last tensor's is let go"


# -- chunks -------------------------------------------------------------------------------------------------------------------


@st.composite
def ranges(draw: st.DrawFn) -> list[tuple[int, int]]:
    """Any pieces of [0, 300), overlapping, in any order."""
    edges = draw(st.lists(st.integers(0, 300), min_size=2, max_size=8))
    return [(min(a, b), max(a, b)) for a, b in zip(edges, draw(st.permutations(edges)), strict=True)]


def expressions(zoo: list[Any]) -> Iterator[MergedCheckpoint]:
    yield from (merge_of(zoo, method, seed=3) for method in ("linear", "task_arithmetic", "ties", "dare_ties", "model_stock"))
    yield merge_of(zoo, "model_stock", filter_wise=True)
    yield merge_of(zoo[:2], "slerp", t=0.3)
    yield nested(zoo)
    yield nested(zoo, trim_scope="model")


ZOO = models_of(dtype=torch.bfloat16)
WHOLE = [expression.read("m").clone() for expression in expressions(ZOO)]


@given(ranges())
@settings(max_examples=15, deadline=None)
def test_any_pieces_in_any_order_have_the_bits_of_the_whole(pieces: list[tuple[int, int]]) -> None:
    for expression, whole in zip(expressions(ZOO), WHOLE, strict=True):
        for start, stop in pieces:
            assert torch.equal(expression.read("m", start, stop), whole[start:stop])


@given(st.sampled_from(["linear", "model_stock"]), st.integers(1, 400))
@settings(max_examples=20, deadline=None)
def test_pieces_cover_the_tensor_and_respect_rows(method: str, limit: int) -> None:
    expression = merge_of(ZOO, method, **({"filter_wise": True} if method == "model_stock" else {}))
    pieces = expression.pieces("m", limit)
    assert [start for start, _ in pieces] == [0, *(stop for _, stop in pieces[:-1])]
    assert pieces[-1][1] == 300
    assert all(stop - start <= max(limit, 50 if method == "model_stock" else 1) for start, stop in pieces)
    if method == "model_stock":
        assert all(start % 50 == 0 and stop % 50 == 0 for start, stop in pieces)


@pytest.mark.parametrize("method", ["ties", "dare_ties", "model_stock"])
def test_tensors_longer_than_a_survey_chunk(method: str) -> None:
    """Partial results of several chunks; pieces that straddle their edges."""
    length = SURVEY_ELEMENTS + 70_001
    zoo = [TensorsCheckpoint({"w": randn(length, seed=1) + (0.1 * randn(length, seed=n) if n else 0)}, label=f"m{n}") for n in range(3)]
    whole = merge_of(zoo, method).read("w").clone()
    other = merge_of(zoo, method)
    for start, stop in [(SURVEY_ELEMENTS - 5, SURVEY_ELEMENTS + 5), (0, 1), (length - 3, length), (65_535, 65_537)]:
        assert torch.equal(other.read("w", start, stop), whole[start:stop])


def test_empty_ranges_and_empty_tensors() -> None:
    models = [TensorsCheckpoint({"empty": torch.empty(0, 3, dtype=torch.bfloat16), "w": randn(5)}) for _ in range(3)]
    expression = merge_of(models, "ties")
    assert expression.tensor("empty").shape == (0, 3)
    assert expression.tensor("empty").dtype == torch.bfloat16
    assert expression.read("w", 3, 3).shape == (0,)


# -- randomness ---------------------------------------------------------------------------------------------------------------


def dare(zoo: list[Any], seed: int, **options: Any) -> MergedCheckpoint:
    count = len(zoo) - 1
    parameters = {
        "weight": [1.0] * count, "density": [0.5] * count, "lambda": 1.0, "normalize": False, "rescale": True, "rescale_by": "inverse",
    }  # fmt: skip
    return MergedCheckpoint(get("dare_ties"), zoo[1:], zoo[0], parameters, seed=seed, **options)


def test_seed_decides_and_nothing_else() -> None:
    one, again, other = (dare(ZOO, seed) for seed in (7, 7, 8))
    for name in ("m", "v"):
        assert torch.equal(one.tensor(name), again.tensor(name))
    assert not torch.equal(one.tensor("m"), other.tensor("m"))
    backwards = [dare(ZOO, 7).tensor(name) for name in ("v", "m")]
    assert torch.equal(backwards[1], one.tensor("m"))


def test_names_and_streams_have_numbers_of_their_own() -> None:
    base, model = torch.zeros(400), torch.ones(400)
    zoo = [TensorsCheckpoint({"a": values, "b": values}, label=str(n)) for n, values in enumerate((base, model))]
    plain = dare(zoo, 1)
    assert not torch.equal(plain.tensor("a"), plain.tensor("b"))
    assert not torch.equal(plain.tensor("a"), dare(zoo, 1, streams=[1]).tensor("a"))
    assert torch.equal(dare(zoo, 1, streams=[0]).tensor("a"), plain.tensor("a"))


# -- what it is ---------------------------------------------------------------------------------------------------------------


def test_identity_is_of_recipe_and_inputs() -> None:
    def identity(zoo: list[Any] = ZOO, method: str = "dare_ties", **options: Any) -> str:
        return merge_of(zoo, method, **options).identity

    changed = copy.copy(ZOO)
    changed[2] = TensorsCheckpoint({"m": ZOO[2].tensor("m") * 2, "v": ZOO[2].tensor("v")}, label="model2")
    found = [
        identity(), identity(method="ties"), identity(seed=1), identity(store="float32"), identity(each={"weight": 0.4}),
        identity(zoo=changed), identity(zoo=[ZOO[0], ZOO[2], ZOO[1], ZOO[3]]), identity(zoo=ZOO[:3]), identity(**{"lambda": 0.5}),
    ]  # fmt: skip
    assert len(set(found)) == len(found)
    assert identity() == found[0]
    assert all(len(value) == 64 for value in found)


def test_pickled_expression_computes_the_same(tmp_path: Path) -> None:
    expression = nested(ZOO)
    expected = expression.tensor("m")
    data = pickle.dumps(expression)
    again = pickle.loads(data)
    assert again._engine._spilled == {}
    assert torch.equal(again.tensor("m"), expected)


def test_model_wide_survey_is_made_once_and_travels() -> None:
    zoo = models_of(2, kind=Counting)
    expression = merge_of(zoo, "ties", trim_scope="model")
    expression.prepare()
    before = zoo[1].times()
    expression.prepare()
    travelled = pickle.loads(pickle.dumps(expression))
    travelled.prepare()
    assert zoo[1].times() == before
    assert torch.equal(travelled.tensor("m"), expression.tensor("m"))


def test_threads_of_torch_are_given_back() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        linear(ZOO).read("m")
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_near_names_are_suggested() -> None:
    with pytest.raises(CheckpointError, match="no tensor 'mm'"):
        linear(ZOO).read("mm")


def test_description_of_a_seeded_merge() -> None:
    assert merged._root(nested(ZOO)) is ZOO[0]
    value = dare(ZOO, 5).describe()
    assert value["seed"] == 5
    assert value["base"] == "model0"
    assert [model["density"] for model in value["models"]] == [0.5] * 3
    assert value["parameters"] == {"lambda": 1.0, "normalize": False, "rescale": True, "rescale_by": "inverse"}


@pytest.mark.parametrize("method", ["linear", "slerp", "slerp-0", "slerp-1", "task_arithmetic", "task_arithmetic-0", "model_stock", "ties"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", [0, 1])
def test_what_is_no_number_names_its_model_whatever_the_method_does_with_it(method: str, value: float, where: int) -> None:
    """Also where a method takes inputs as they are stored and only its result is looked at, and where the result is one of the inputs."""
    method, _, end = method.partition("-")
    zoo = [TensorsCheckpoint({"w": randn(300, seed=n).bfloat16()}, label=f"in{n}") for n in range(2 if method == "slerp" else 3)]
    bad = zoo[where].read("w").clone()
    bad[123] = value
    zoo[where] = TensorsCheckpoint({"w": bad}, label=f"in{where}")
    given_: dict[str, Any] = {"t": float(end or 0.4)} if method == "slerp" else {"lambda": float(end)} if end else {}
    merged = merge_of(zoo, method, **given_)
    if method == "linear" and where == 0:
        return  # it takes no base
    name = "in0" if where == 0 else "model1"
    with pytest.raises(MergeError, match=rf"{name}.*: tensor 'w' holds NaN or infinity near element 123\."):
        merged.read("w")
