"""Sums in machine code: torch's bits, whatever the inputs, and torch itself where it cannot be done."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from modelglue.checkpoint import MergedCheckpoint, TensorsCheckpoint
from modelglue.checkpoint.engine import native
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


@needs_compiler
@settings(max_examples=30, deadline=None)
@given(
    length=st.sampled_from([1, 7, 1024, 1025, 5000]),
    dtypes=st.lists(st.sampled_from([torch.bfloat16, torch.float32]), min_size=1, max_size=5),
    base=st.sampled_from([None, torch.bfloat16, torch.float32]),
    stored=st.sampled_from([(torch.bfloat16, torch.float32), (torch.bfloat16, torch.bfloat16), (torch.float32, torch.float32)]),
    scales=st.lists(st.floats(-3, 3, allow_subnormal=False), min_size=5, max_size=5),
    spread=st.sampled_from([0.0, 20.0]),
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
    below = None if base is None else values(9, length, base, spread)

    def merge() -> torch.Tensor:
        chosen = scales[: len(models)]
        return weighted_sum(models, chosen) if below is None else add_scaled(below, models, chosen)

    store, kind = stored
    out = torch.empty(length, dtype=kind)
    finite = bool(merge().to(store).isfinite().all())
    assert native.ready(length)
    assert native.lands(merge, out, store) == finite
    if finite:
        assert torch.equal(out, merge().to(store).to(kind))


@needs_compiler
def test_what_it_does_not_know_is_left_to_torch() -> None:
    half = [torch.ones(4, dtype=torch.float16)] * 2
    out = torch.zeros(4)
    assert not native.lands(lambda: weighted_sum(half, [0.5, 0.5]), out, torch.bfloat16)
    assert not native.lands(lambda: weighted_sum([torch.ones(8)[::2]] * 2, [0.5, 0.5]), out, torch.bfloat16)
    assert not native.lands(lambda: weighted_sum([torch.ones(4)] * 2, [0.5, 0.5]) + 1, out, torch.float32)
    assert torch.equal(weighted_sum(half, [0.5, 0.25]), torch.full((4,), 0.75))  # and outside nothing is written anywhere


@needs_compiler
@pytest.mark.parametrize("method", ["linear", "task_arithmetic", "slerp"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_merge_reads_the_same_into_a_place_as_by_itself(method: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    models = [TensorsCheckpoint({"w": values(seed, 300_000, dtype, 0.0).view(600, 500)}) for seed in range(3)]
    if method == "linear":
        made = MergedCheckpoint(get(method), models, parameters={"weight": [0.5, 0.3, -0.1], "normalize": True})
    elif method == "slerp":
        made = MergedCheckpoint(get(method), models[:1], models[1], parameters=get(method).resolve({"t": 0.3}, [{}], ["a"])[0])
    else:
        values_of, _ = get(method).resolve({}, [{"weight": 0.5}, {"weight": 0.7}], ["a", "b"])
        made = MergedCheckpoint(get(method), models[:2], models[2], parameters=values_of)
    landed = torch.zeros(299_990)
    assert made.read("w", 5, 299_995, out=landed) is landed
    monkeypatch.setenv("MODELGLUE_COMPILE", "off")
    plain = torch.zeros(299_990)
    made.read("w", 5, 299_995, out=plain)
    assert torch.equal(landed, plain)
    assert torch.equal(landed, made.read("w", 5, 299_995).float())


@needs_compiler
def test_an_input_that_is_no_number_is_still_named() -> None:
    bad = torch.ones(10, dtype=torch.bfloat16)
    bad[3] = torch.nan
    models = [TensorsCheckpoint({"w": bad}, label="broken"), TensorsCheckpoint({"w": torch.ones(10, dtype=torch.bfloat16)}, label="sound")]
    made = MergedCheckpoint(get("linear"), models, parameters={"weight": [0.5, 0.5], "normalize": True}, labels=["broken", "sound"])
    with pytest.raises(MergeError, match="broken: tensor 'w' holds NaN or infinity near element 3"):
        made.read("w", out=torch.empty(10))


def test_without_a_compiler_torch_does_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MODELGLUE_CACHE", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    assert not native.ready(100)
    models = [TensorsCheckpoint({"w": torch.full((10,), value)}) for value in (1.0, 2.0)]
    made = MergedCheckpoint(get("linear"), models, parameters={"weight": [0.5, 0.5], "normalize": True})
    assert torch.equal(made.read("w", out=torch.empty(10)), torch.full((10,), 1.5))


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
