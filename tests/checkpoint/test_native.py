"""Sums in machine code: torch's bits, whatever the inputs, and torch itself where it cannot be done."""

from __future__ import annotations

import importlib.resources
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from modelglue.checkpoint import MergedCheckpoint, TensorsCheckpoint
from modelglue.checkpoint.engine import native
from modelglue.checkpoint.engine.arithmetic import Engine
from modelglue.errors import MergeError
from modelglue.methods import get
from modelglue.methods._task_vectors import add_scaled, weighted_sum

_COMPILER = any(shutil.which(name) for name in ("cc", "gcc", "clang"))
needs_compiler = pytest.mark.skipif(not _COMPILER, reason="there is no C compiler")


@pytest.fixture(scope="module", autouse=True)
def compiled_sums(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MODELGLUE_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setenv("MODELGLUE_COMPILE", "on")
        yield


def values(seed: int, length: int, dtype: torch.dtype, spread: float) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(length, generator=generator) * torch.exp(spread * torch.randn(length, generator=generator))).to(dtype)


def landed(models: list[torch.Tensor], scales: list[float], store: torch.dtype, base: torch.Tensor | None = None) -> torch.Tensor | None:
    """The sum as machine code stores it; None where it was not done, or where it is not finite."""
    out = torch.full((models[0].numel(),), -7.0, dtype=store)
    done = native.lands(lambda: weighted_sum(models, scales) if base is None else add_scaled(base, models, scales), out, store)
    return out if done else None


def test_the_source_is_part_of_the_package() -> None:
    assert b"modelglue_sum(" in importlib.resources.files("modelglue.checkpoint.engine").joinpath("sums.c").read_bytes()


DTYPES = [torch.bfloat16, torch.float16, torch.float32]


@needs_compiler
@settings(max_examples=30, deadline=None)
@given(
    length=st.sampled_from([0, 1, 7, 1024, 1025, 5000]),
    dtypes=st.lists(st.sampled_from(DTYPES), min_size=1, max_size=12) | st.sampled_from([[dtype] * 2 for dtype in DTYPES]),
    base=st.sampled_from([None, *DTYPES]),
    stored=st.sampled_from([(dtype, kind) for dtype in DTYPES for kind in {dtype, torch.float32}]),
    scales=st.lists(st.floats(-3, 3, allow_subnormal=False), min_size=12, max_size=12),
    spread=st.sampled_from([0.0, 3.0, 20.0]),
)
def test_the_bits_are_those_of_torch(
    length: int,
    dtypes: list[torch.dtype],
    base: torch.dtype | None,
    stored: tuple[torch.dtype, torch.dtype],
    scales: list[float],
    spread: float,
) -> None:
    models = [values(number, length, dtype, spread) for number, dtype in enumerate(dtypes)]
    below = None if base is None else values(99, length, base, spread)

    def merge() -> torch.Tensor:
        chosen = scales[: len(models)]
        return weighted_sum(models, chosen) if below is None else add_scaled(below, models, chosen)

    store, kind = stored
    out = torch.empty(length, dtype=kind)
    finite = bool(merge().to(store).isfinite().all())
    assert native.ready(length)
    assert native.lands(merge, out, store) == finite
    if finite:
        assert bits(out).equal(bits(merge().to(store).to(kind)))


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """Signed zeros differ."""
    return tensor.view(torch.int16 if tensor.element_size() == 2 else torch.int32)


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_number_of_two_bytes_is_read_and_every_boundary_between_two_is_rounded_right(dtype: torch.dtype) -> None:
    every = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(dtype)
    every = every[every.isfinite()]
    found = landed([every], [1.0], torch.float32)
    assert found is not None
    assert bits(found).equal(bits(every.float()))
    rising = every.float().sort().values
    middle = (rising[1:].double() + rising[:-1].double()).div(2).float()
    near = torch.cat([middle, middle.nextafter(torch.tensor(math.inf)), middle.nextafter(torch.tensor(-math.inf))])
    found = landed([near], [1.0], dtype)
    assert found is not None
    assert bits(found).equal(bits(near.to(dtype)))


@needs_compiler
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("with_base", [False, True])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_seen_wherever_it_stands(dtype: torch.dtype, with_base: bool, bad: float) -> None:
    for at in (0, 1023, 1024, 2047):
        for place in range(3 if with_base else 2):
            tensors = [torch.ones(2048, dtype=dtype) for _ in range(3)]
            tensors[place][at] = bad
            assert landed(tensors[:2], [0.5, 0.25], dtype, tensors[2] if with_base else None) is None


@needs_compiler
@pytest.mark.parametrize(("dtype", "last"), [(torch.float16, 65519.99), (torch.bfloat16, 3.396e38), (torch.float32, 3.4028234e38)])
def test_what_overflows_as_it_is_rounded_is_seen(dtype: torch.dtype, last: float) -> None:
    fits = torch.tensor([0.0, last, -last])
    found = landed([fits], [1.0], dtype)
    assert found is not None
    assert found.equal(fits.to(dtype))
    assert found.isfinite().all()
    assert landed([fits * 1.0001], [1.0], dtype) is None


@needs_compiler
def test_what_it_does_not_know_is_left_to_torch() -> None:
    ones = [torch.ones(4)] * 2
    for models in (
        [torch.ones(4), torch.ones(4, dtype=torch.float64)],
        [torch.ones(8)[::2]] * 2,  # not contiguous
        [torch.ones(4), torch.ones(1)],  # not of one length
        [torch.ones(4), torch.ones(4, device="meta")],
    ):
        assert landed(models, [0.5, 0.5], torch.float32) is None
        assert landed(ones, [0.5, 0.5], torch.float32, base=models[1]) is None
    out = torch.zeros(4)
    assert not native.lands(lambda: weighted_sum(ones, [0.5, 0.5]), out, torch.float64)
    assert not native.lands(lambda: weighted_sum(ones, [0.5, 0.5]), torch.zeros(4, dtype=torch.float16), torch.bfloat16)
    assert not native.lands(lambda: weighted_sum(ones, [0.5, 0.5]), torch.zeros(8)[::2], torch.float32)
    assert not native.lands(lambda: weighted_sum(ones, [0.5]), out, torch.float32)  # a scale is missing
    assert not native.lands(lambda: weighted_sum(ones, [0.5, 0.5]) + 1, out, torch.float32)
    assert torch.equal(weighted_sum(ones, [0.5, 0.25]), torch.full((4,), 0.75))  # and outside nothing is written anywhere


#: method, how many models, whether on a base, parameters
RAW: list[tuple[str, int, bool, dict[str, Any]]] = [
    ("linear", 3, False, {}),
    ("task_arithmetic", 2, True, {}),
    ("slerp", 1, True, {"t": 0.3}),
    ("model_stock", 2, True, {}),
    ("karcher", 3, False, {}),
    ("multislerp", 3, False, {}),
    ("multislerp", 3, True, {}),
    ("nuslerp", 2, False, {}),
    ("nuslerp", 2, True, {}),
    ("nuslerp", 2, False, {"nuslerp_flatten": False, "nuslerp_row_wise": True}),
    ("nuslerp", 2, True, {"nuslerp_flatten": False, "nuslerp_row_wise": True}),
]


def merge_of(tensors: list[torch.Tensor], method_id: str, with_base: bool, shared: dict[str, Any]) -> MergedCheckpoint:
    base, *models = [TensorsCheckpoint({"w": tensor.view(600, 400)}) for tensor in tensors]
    method = get(method_id)
    own = {"weight": 0.5} if "weight" in {parameter.name for parameter in method.parameters} else {}
    parameters, faults = method.resolve(shared, [own] * len(models), [f"m{n}" for n in range(len(models))])
    assert faults == []
    return MergedCheckpoint(method, models, base if with_base else None, parameters)


@needs_compiler
@pytest.mark.parametrize(
    ("method", "count", "with_base", "shared"), RAW, ids=lambda value: "columns" if "nuslerp_row_wise" in str(value) else None
)
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_a_merge_has_the_same_bits_by_torch_into_a_place_and_from_wider_inputs(
    method: str, count: int, with_base: bool, shared: dict[str, Any], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = [(values(0, 240_000, torch.float32, 0.0) + 0.4 * values(seed, 240_000, dtype, 0.0)).to(dtype) for seed in range(count + 1)]
    made = merge_of(tensors, method, with_base, shared)
    done: list[bool] = []  # whether each chunk was summed in machine code
    by_itself = native.lands
    monkeypatch.setattr(native, "lands", lambda *given: done.append(by_itself(*given)) or done[-1])
    place = torch.zeros(239_990)
    assert made.read("w", 5, 239_995, out=place) is place
    assert set(done) == {dtype != torch.float64 and "nuslerp_row_wise" not in shared}
    monkeypatch.setenv("MODELGLUE_COMPILE", "off")
    plain = torch.zeros(239_990)
    made.read("w", 5, 239_995, out=plain)
    assert torch.equal(place, plain)
    assert torch.equal(place, made.read("w", 5, 239_995).float())
    if dtype != torch.float64:
        wide = merge_of([tensor.float() for tensor in tensors], method, with_base, shared)
        assert torch.equal(plain, wide.read("w", 5, 239_995).to(dtype).float())


@needs_compiler
def test_what_a_merge_surveys_does_not_depend_on_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sums of a survey are taken in one thread on the way into a place too: several would add in another order."""
    made = merge_of([values(seed, 240_000, torch.float32, 0.0) for seed in range(4)], "karcher", False, {})
    threads: list[int] = []
    reduced = Engine._reduce
    monkeypatch.setattr(Engine, "_reduce", lambda *given: threads.append(torch.get_num_threads()) or reduced(*given))
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        made.read("w", out=torch.zeros(240_000))
    finally:
        torch.set_num_threads(before)
    assert threads == [1]


@needs_compiler
def test_an_input_that_is_no_number_is_still_named() -> None:
    bad = torch.ones(10, dtype=torch.bfloat16)
    bad[3] = torch.nan
    models = [TensorsCheckpoint({"w": bad}, label="broken"), TensorsCheckpoint({"w": torch.ones(10, dtype=torch.bfloat16)}, label="sound")]
    made = MergedCheckpoint(get("linear"), models, parameters={"weight": [0.5, 0.5], "normalize": True}, labels=["broken", "sound"])
    with pytest.raises(MergeError, match="broken: tensor 'w' holds NaN or infinity near element 3"):
        made.read("w", out=torch.empty(10))


def plain_torch_merges() -> bool:
    """Whether no sum is done in machine code, and a merge comes out right all the same."""
    models = [TensorsCheckpoint({"w": torch.full((10,), value)}) for value in (1.0, 2.0)]
    made = MergedCheckpoint(get("linear"), models, parameters={"weight": [0.5, 0.5], "normalize": True})
    right = torch.equal(made.read("w", out=torch.empty(10)), torch.full((10,), 1.5)) and torch.equal(made.read("w"), torch.full((10,), 1.5))
    return right and not native.ready(100)


def test_without_a_compiler_torch_does_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MODELGLUE_CACHE", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    assert plain_torch_merges()


def test_a_compiler_that_fails_leaves_it_to_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MODELGLUE_CACHE", str(tmp_path))
    monkeypatch.setenv("CC", "false")
    assert plain_torch_merges()
    assert list((tmp_path / "compiled").iterdir()) == []


def test_a_cache_that_cannot_be_written_leaves_it_to_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MODELGLUE_CACHE", str(tmp_path / "file"))
    assert plain_torch_merges()
    assert (tmp_path / "file").read_text() == ""


def test_a_broken_library_in_the_cache_leaves_it_to_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MODELGLUE_CACHE", str(tmp_path))
    broken = native._path(tmp_path)
    broken.parent.mkdir()
    broken.write_bytes(b"\x7fELF and then nothing")
    assert plain_torch_merges()


@needs_compiler
def test_two_processes_may_compile_at_once(tmp_path: Path) -> None:
    code = "from modelglue.checkpoint.engine import native; assert native.ready(1)"
    environment = {**os.environ, "MODELGLUE_CACHE": str(tmp_path), "MODELGLUE_COMPILE": "on"}
    both = [subprocess.Popen([sys.executable, "-c", code], env=environment) for _ in range(2)]
    assert [process.wait() for process in both] == [0, 0]
    assert [path.suffix for path in (tmp_path / "compiled").iterdir()] == [".so"]


@needs_compiler
def test_it_is_compiled_beside_the_work_once_that_is_much(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MODELGLUE_CACHE", str(tmp_path))
    monkeypatch.setenv("MODELGLUE_COMPILE", "auto")
    monkeypatch.setattr(native, "_summed", 0)
    assert not native.ready(1000)
    assert not list(tmp_path.iterdir())
    assert not native.ready(2**26)  # it has begun
    (compiler,) = [process for path, (_, process) in native._compilers.items() if tmp_path in path.parents and process is not None]
    compiler.wait()
    assert native.ready(1)
    assert [path.suffix for path in (tmp_path / "compiled").iterdir()] == [".so"]
