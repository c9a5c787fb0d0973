"""Chunk functions: compiled code gives the bits of plain torch, and whatever cannot be compiled runs as plain torch."""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from modelglue.checkpoint import MergedCheckpoint, TensorsCheckpoint, save
from modelglue.checkpoint.engine import compiled, uniform
from modelglue.checkpoint.engine.compiled import ChunkFunction, chunk_function, find, using
from modelglue.errors import UserError
from modelglue.methods import _task_vectors, all_methods
from modelglue.testing.conformance import example_models, merged, parameter_sets
from tests.checkpoint.files import names_in, randn
from tests.checkpoint.merges import merge_of

#: together they call every chunk function that a method calls
MERGED = ("ties", "dare_ties")
CHUNK_FUNCTIONS = [value for module in (_task_vectors, uniform) for value in vars(module).values() if isinstance(value, ChunkFunction)]

compiler = pytest.mark.skipif(
    shutil.which(os.environ.get("CXX", "g++")) is None, reason="no C++ compiler (g++, or what CXX names), so nothing can be compiled here"
)


def expression(method: str, length: int = 1000, seed: int = 0, *, special: bool = False) -> MergedCheckpoint:
    """The models moved from the base partly together, so that no method returns one of its inputs."""
    zoo = []
    for number in range(3):
        values = randn(length, seed=seed)
        if number:
            values += 0.1 * randn(length, seed=seed + 50) + 0.1 * randn(length, seed=seed + number)
        if special:  # signed zeros, the smallest numbers, equal entries, large ones
            values[: length // 2] = torch.tensor([0.0, -0.0, 1e-45, -1e-45, 1.0, 1e30, -1e30, 0.5]).repeat(length)[: length // 2]
            values[length // 4 : length // 3] *= number
        zoo.append(TensorsCheckpoint({"w": values}, label=f"m{number}"))
    return merge_of(zoo, method, store="float32", seed=seed)


def bits(values: torch.Tensor) -> torch.Tensor:
    return values.clone().view(torch.int32)


@pytest.fixture(autouse=True)
def _automatic(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MODELGLUE_COMPILE", raising=False)


# -- without a compiler -------------------------------------------------------------------------------------------------------


def double(values: torch.Tensor, scale: float, flag: bool = True) -> torch.Tensor:
    return values * scale if flag else values


DOUBLE = chunk_function(double)


def garbage(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"\x7fELF and then nothing")
    return path


def key_of(function: ChunkFunction, arguments: tuple[Any, ...]) -> str:
    return f"{function.id} {json.dumps(compiled._shape_of(arguments, [], [], []))}"


@pytest.mark.parametrize("mode", ["1", "true", "ON", "", "eager"])
def test_unknown_mode_is_refused_before_anything_is_written(mode: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MODELGLUE_COMPILE", mode)
    with pytest.raises(UserError, match=f"MODELGLUE_COMPILE is '{mode}'; allowed are auto, on and off") as caught:
        save(expression("ties"), tmp_path / "out")
    assert caught.value.exit_code == 2
    assert names_in(tmp_path) == []


@pytest.mark.parametrize("mode", [None, "auto", "off"])
def test_small_merges_are_not_even_looked_up(mode: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    if mode is not None:
        monkeypatch.setenv("MODELGLUE_COMPILE", mode)
    calls: list[int] = []
    assert find(lambda: calls.append(1), compiled._WORTH_LOADING - 1) is None
    if mode == "off":
        assert find(lambda: calls.append(1), 10**12) is None
    assert calls == []


def test_automatic_mode_uses_what_is_there_and_compiles_only_for_giants(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(compiled, "_compile", asked.extend)
    values = torch.ones(10)
    assert find(lambda: DOUBLE(values, 2.0), compiled._WORTH_LOADING) is None
    assert asked == []
    assert find(lambda: DOUBLE(values, 2.0), compiled._WORTH_COMPILING) is None
    assert [(function, shape) for function, shape, _ in asked] == [(DOUBLE.id, ["torch.float32", "float"])]
    path = garbage(asked[0][2])
    assert find(lambda: DOUBLE(values, 2.0), compiled._WORTH_LOADING) == {key_of(DOUBLE, (values, 2.0)): str(path)}
    path.unlink()


def test_name_of_the_code_says_all_that_it_depends_on(monkeypatch: pytest.MonkeyPatch) -> None:
    values = torch.ones(4)
    arguments: list[tuple[Any, ...]] = [(values, 2.0), (values.double(), 2.0), (values, 2), (values, 2.0, True), (values, 2.0, False)]
    found = [compiled._path(key_of(DOUBLE, given_), DOUBLE.id) for given_ in arguments]
    assert compiled._path(key_of(DOUBLE, (torch.zeros(9), 3.0)), DOUBLE.id) == found[0], "numbers and lengths are arguments"
    monkeypatch.setattr(torch, "__version__", "0.0")
    found.append(compiled._path(key_of(DOUBLE, arguments[0]), DOUBLE.id))
    monkeypatch.undo()
    monkeypatch.setattr(compiled, "processor", lambda: "another")
    found.append(compiled._path(key_of(DOUBLE, arguments[0]), DOUBLE.id))
    assert len(set(found)) == len(found)


def test_broken_shared_object_falls_back_to_plain_torch(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    values = torch.arange(5.0)
    path = garbage(tmp_path / "broken.so")
    with caplog.at_level(logging.WARNING), using({key_of(DOUBLE, (values, 3.0)): str(path)}):
        for _ in range(3):
            assert torch.equal(DOUBLE(values, 3.0), values * 3)
    assert [str(path) in record.getMessage() for record in caplog.records] == [True], "once per process"


def test_compiler_that_fails_is_logged_and_the_merge_runs(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    monkeypatch.setattr(compiled.sys, "executable", str(tmp_path / "no-such-python"))
    monkeypatch.setenv("MODELGLUE_COMPILE", "on")
    monkeypatch.setenv("MODELGLUE_CACHE", str(tmp_path / "cache"))
    expected = expression("ties").read("w")
    merged = expression("ties")
    with caplog.at_level(logging.WARNING):
        merged.prepare()
    assert "could not be compiled, the merge runs eagerly" in caplog.text
    assert torch.equal(merged.read("w"), expected)


def test_one_element_and_uneven_tensors_run_as_plain_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """The compiled code trusts its caller, so it never gets what it was not made for."""

    def refuse(path: str) -> Any:
        raise AssertionError("loaded")

    monkeypatch.setattr(compiled, "_load", refuse)
    two = chunk_function(_two)
    cases = [
        (torch.ones(1), torch.ones(1)),
        (torch.ones(4), torch.ones(1)),
        (torch.ones(2, 3), torch.ones(2, 3)),
        (torch.ones(8)[::2], torch.ones(4)),
    ]
    for pair in cases:
        with using({key_of(two, pair): "x.so"}):
            assert torch.equal(two(*pair), pair[0] + pair[1])
    with using({key_of(two, cases[0]): "x.so"}), pytest.raises(AssertionError, match="loaded"):
        two(torch.ones(2), torch.ones(2))


def _two(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return a + b


def test_outside_of_using_everything_is_plain() -> None:
    values = torch.ones(3)
    with using({key_of(DOUBLE, (values, 2.0)): "/nowhere.so"}):
        pass
    assert torch.equal(DOUBLE(values, 2.0), values * 2)
    assert DOUBLE.__name__ == "double"


shapes = st.recursive(st.sampled_from([1.5, 2, True, None, "word", "tensor"]), lambda inner: st.lists(inner, max_size=3), max_leaves=8)


@given(st.lists(shapes, max_size=4))
@settings(max_examples=60, deadline=None)
def test_arguments_are_taken_apart_and_put_together_again(arguments: list[Any]) -> None:
    def filled(value: Any) -> Any:
        return [filled(item) for item in value] if isinstance(value, list) else torch.ones(2) if value == "tensor" else value

    given_ = filled(arguments)
    tensors: list[Any] = []
    floats: list[float] = []
    integers: list[int] = []
    shape = json.loads(json.dumps(compiled._shape_of(given_, tensors, floats, integers)))
    rebuilt = compiled._rebuilt(shape, iter(tensors), iter(floats), iter(integers))
    assert str(rebuilt) == str(given_)
    assert compiled._flat(shape) == (["float32"] * len(tensors), len(floats), len(integers))


def called_by(reads: Callable[[], Any]) -> set[str]:
    """Ids of the chunk functions that are called."""
    token = compiled._seen.set({})
    try:
        reads()
        return {key.split(" ")[0] for key in compiled._seen.get() or ()}
    finally:
        compiled._seen.reset(token)


def test_no_method_calls_a_chunk_function_that_the_merges_here_do_not() -> None:
    known = called_by(lambda: [expression(method).read("w") for method in MERGED])
    assert known == {function.id for function in CHUNK_FUNCTIONS}
    for method in all_methods():
        count = max(method.min_models, 1)
        base, models = example_models(count)
        for parameters in parameter_sets(method, count):
            merge = merged(method, base, models, parameters)
            assert called_by(lambda merge=merge: [merge.read(name) for name in merge.names()]) <= known, method.id


# -- with a compiler ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mapping[str, str]]:
    """All chunk functions that the merges call, compiled in one process, once for this module."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MODELGLUE_CACHE", str(tmp_path_factory.mktemp("compiled")))
        patch.setenv("MODELGLUE_COMPILE", "on")
        found = find(lambda: [expression(method).read("w") for method in MERGED], 1)
        assert found is not None, "nothing was compiled"
        yield found


@pytest.fixture
def only_compiled(table: Mapping[str, str], monkeypatch: pytest.MonkeyPatch) -> Mapping[str, str]:
    """The table, the cache that it is from, and no chunk function runs as plain torch any more, except on single elements."""
    monkeypatch.setenv("MODELGLUE_COMPILE", "on")
    monkeypatch.setenv("MODELGLUE_CACHE", str(Path(next(iter(table.values()))).parents[1]))
    monkeypatch.setattr(compiled, "_compile", lambda wanted: pytest.fail(f"compiles again: {wanted}"))
    for function in CHUNK_FUNCTIONS:

        def plain(*arguments: Any, of: Callable[..., Any] = function.plain) -> Any:
            tensors: list[torch.Tensor] = []
            compiled._shape_of(arguments, tensors, [], [])
            assert tensors[0].numel() == 1, "ran as plain torch"
            return of(*arguments)

        monkeypatch.setattr(function, "plain", plain)
    return table


@compiler
def test_every_chunk_function_is_compiled_once(table: Mapping[str, str]) -> None:
    assert {key.split(" ")[0] for key in table} == {function.id for function in CHUNK_FUNCTIONS}
    assert len(table) == len(CHUNK_FUNCTIONS) == 3
    assert all(Path(path).is_file() for path in table.values())
    assert names_in(Path(next(iter(table.values()))).parent) == sorted(Path(path).name for path in table.values()), "nothing else is left"


LENGTHS = (2, 3, 7, 8, 15, 16, 17, 31, 33, 63, 65, 1000, 70_001)
CASES = [(method, special) for method in MERGED for special in (False, True)]


@pytest.fixture(scope="module")
def plain() -> dict[tuple[str, bool, int], torch.Tensor]:
    """What plain torch gives, before it is forbidden."""
    return {(m, special, n): expression(m, n, n, special=special).read("w").clone() for m, special in CASES for n in LENGTHS}


@compiler
@pytest.mark.parametrize(("method", "special"), CASES, ids=[f"{method}-{'special' if special else 'random'}" for method, special in CASES])
def test_compiled_merge_has_the_bits_of_plain_torch(
    method: str, special: bool, plain: dict[tuple[str, bool, int], torch.Tensor], only_compiled: Mapping[str, str]
) -> None:
    """Lengths around the width of a vector of the processor, and a long one."""
    for length in LENGTHS:
        merged = expression(method, length, length, special=special)
        merged._engine._compiled = only_compiled
        assert torch.equal(bits(merged.read("w")), bits(plain[method, special, length])), f"{method} differs at length {length}"


@compiler
@pytest.mark.parametrize("method", MERGED)
def test_prepare_finds_the_code_in_the_cache(method: str, table: Mapping[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MODELGLUE_COMPILE", "on")
    monkeypatch.setenv("MODELGLUE_CACHE", str(Path(next(iter(table.values()))).parents[1]))
    monkeypatch.setattr(compiled, "_compile", lambda wanted: pytest.fail(f"compiles again: {wanted}"))
    before = {path: Path(path).stat().st_mtime_ns for path in table.values()}
    merged = expression(method, 999, 5)
    merged.prepare()
    assert merged._engine._compiled is not None
    assert merged._engine._compiled.items() <= table.items()
    assert {path: Path(path).stat().st_mtime_ns for path in table.values()} == before


@compiler
def test_saved_bytes_are_the_same_from_compiled_code(table: Mapping[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MODELGLUE_CACHE", str(Path(next(iter(table.values()))).parents[1]))
    monkeypatch.setattr("modelglue.checkpoint.output.plan.TASK_ELEMENTS", 1000)
    written = []
    for number, (mode, workers) in enumerate([("off", 1), ("on", 1), ("on", 2)]):
        monkeypatch.setenv("MODELGLUE_COMPILE", mode)
        out = tmp_path / str(number) / "out"
        save(expression("ties", 5000), out, workers=workers, chunk=1000)
        written.append((out / "model.safetensors").read_bytes())
    assert written[0] == written[1] == written[2]
