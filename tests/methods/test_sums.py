"""Inner products of chunks: quick ones and exact ones."""

from __future__ import annotations

import shutil
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from modelglue.checkpoint.engine import native
from modelglue.methods._sums import block_grams, pairs, total
from modelglue.settings import BLOCK_ELEMENTS

needs_compiler = pytest.mark.skipif(not any(map(shutil.which, ("cc", "gcc", "clang"))), reason="there is no C compiler")


@pytest.fixture(scope="module", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MODELGLUE_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def grams(models: list[torch.Tensor], base: torch.Tensor | None, mode: str) -> torch.Tensor:
    """Quick inner products [pairs, blocks], with (on) and without (off) machine code."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MODELGLUE_COMPILE", mode)
        return torch.tensor(block_grams(models, base, quick=True), dtype=torch.float64)


@needs_compiler
@given(
    length=st.sampled_from([4096, 5000, BLOCK_ELEMENTS, BLOCK_ELEMENTS + 1, 2 * BLOCK_ELEMENTS + 4097]),
    dtypes=st.lists(st.sampled_from([torch.bfloat16, torch.float16, torch.float32]), min_size=1, max_size=6),
    base=st.sampled_from([None, torch.bfloat16, torch.float16, torch.float32]),
    scale=st.sampled_from([1e-30, 1e-8, 1.0, 1e4, 1e25]),
    moved=st.booleans(),
)
@settings(max_examples=25, deadline=None)
def test_machine_code_gives_the_bits_of_torch(
    length: int, dtypes: list[torch.dtype], base: torch.dtype | None, scale: float, moved: bool
) -> None:
    generator = torch.Generator().manual_seed(length)
    tensors = [(torch.randn(length, generator=generator) * scale).to(dtype) for dtype in [*dtypes, base or torch.float32]]
    if moved:  # the first block of the first model is the base's
        tensors[0][:BLOCK_ELEMENTS] = tensors[-1][:BLOCK_ELEMENTS].to(tensors[0].dtype)
    models, below = tensors[:-1], tensors[-1] if base is not None else None
    expected = grams(models, below, "off")
    found = grams(models, below, "on")
    assert torch.equal(found.view(torch.int64)[~found.isnan()], expected.view(torch.int64)[~found.isnan()])
    assert torch.equal(found.isnan(), expected.isnan())


@needs_compiler
def test_order_of_additions(monkeypatch: pytest.MonkeyPatch) -> None:
    """The runs of a block halved in float32, their sums in float64, written down once more: with numbers that tell every order apart."""
    a, b = (torch.randn(BLOCK_ELEMENTS, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2))
    sums = (a * b).view(64, 16, 64).transpose(0, 1)
    while len(sums) > 1:
        sums = sums[: len(sums) // 2] + sums[len(sums) // 2 :]
    lanes = sums.flatten().double()
    while len(lanes) > 1:
        lanes = lanes[: len(lanes) // 2] + lanes[len(lanes) // 2 :]
    assert grams([a, b], None, "on")[1].item() == grams([a, b], None, "off")[1].item() == lanes.item()
    monkeypatch.setenv("MODELGLUE_COMPILE", "on")
    made = native.grams([a, b], None)
    assert made is not None
    assert made[0, 1].item() == lanes.item()
    assert native.grams([a, b.double()], None) is None
    assert native.grams([a, torch.empty(BLOCK_ELEMENTS, device="meta")], None) is None
    assert native.grams([a[::2], b[::2]], None) is None


def inner(models: list[torch.Tensor], base: torch.Tensor | None) -> list[float]:
    """The same in float64, whole tensors at once."""
    vectors = [model.double() - (0.0 if base is None else base.double()) for model in models]
    return [float(vectors[i].dot(vectors[j])) for i, j in pairs(len(vectors))]


def lengths(models: list[torch.Tensor], base: torch.Tensor | None) -> list[float]:
    vectors = [model.double() - (0.0 if base is None else base.double()) for model in models]
    return [float(vectors[i].norm() * vectors[j].norm()) for i, j in pairs(len(vectors))]


@given(
    length=st.sampled_from([1, 4095, 4096, 5000, BLOCK_ELEMENTS, BLOCK_ELEMENTS + 1, 2 * BLOCK_ELEMENTS + 4097]),
    scale=st.sampled_from([1e-30, 1e-18, 1e-6, 1.0, 1e16, 1e25]),
    dtype=st.sampled_from([torch.bfloat16, torch.float16, torch.float32, torch.float64]),
    with_base=st.booleans(),
    quick=st.booleans(),
)
@settings(max_examples=30, deadline=None)
def test_grams_are_those_of_float64(length: int, scale: float, dtype: torch.dtype, with_base: bool, quick: bool) -> None:
    scale = 1.0 if dtype == torch.float16 else scale
    generator = torch.Generator().manual_seed(length)
    tensors = [(torch.randn(length, generator=generator, dtype=torch.float64) * scale).to(dtype) for _ in range(4)]
    models, base = tensors[:3], tensors[3] if with_base else None
    found = [total([blocks]) for blocks in block_grams(models, base, quick=quick)]
    bound = 1e-6 if quick and dtype != torch.float64 else 1e-12
    for value, expected, length_ in zip(found, inner(models, base), lengths(models, base), strict=True):
        assert abs(value - expected) <= bound * length_


def test_quick_grams_of_equal_and_of_opposite_vectors() -> None:
    vector = torch.randn(BLOCK_ELEMENTS + 7, generator=torch.Generator().manual_seed(0))
    same, opposite, _ = (total([blocks]) for blocks in block_grams([vector, -vector], None, quick=True))
    assert opposite == -same
    assert block_grams([vector, vector], vector, quick=True) == [[0.0, 0.0]] * 3


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("at", [0, BLOCK_ELEMENTS + 4500])
@pytest.mark.parametrize("mode", ["off", pytest.param("on", marks=needs_compiler)])
def test_what_is_no_number_shows(bad: float, at: int, mode: str) -> None:
    good = torch.ones(BLOCK_ELEMENTS + 5000, dtype=torch.bfloat16)
    spoilt = good.clone()
    spoilt[at] = bad
    block = at // BLOCK_ELEMENTS
    for models, base, row in (([good, spoilt], None, 2), ([spoilt, good], None, 0), ([good, good], spoilt, 0), ([spoilt, good], spoilt, 0)):
        diagonal = grams(models, base, mode)[row]
        assert not torch.isfinite(diagonal[block])
        assert torch.isfinite(diagonal[1 - block])
