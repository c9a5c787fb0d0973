"""Memory: what a merge may hold decides workers and chunk, and nothing else."""

from __future__ import annotations

import json
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
import torch

from modelglue.checkpoint import Checkpoint, JoinedCheckpoint, MergedCheckpoint, RenamedCheckpoint, SafetensorsCheckpoint, save
from modelglue.checkpoint.engine.workers import run_tasks
from modelglue.checkpoint.formats.pages import MAPPED_BYTES
from modelglue.checkpoint.output.memory import DEFAULT_BYTES, PROCESS_BYTES, WORKER_BYTES, divide
from modelglue.checkpoint.protocol import TensorInfo
from modelglue.errors import UserError
from modelglue.methods import get
from tests.checkpoint.files import contents
from tests.checkpoint.merges import merge_of, write_zoo

GIB = 2**30


class Sized(Checkpoint):
    """Shapes without values, of any size."""

    def __init__(self, shapes: dict[str, tuple[int, ...]], dtype: str = "BF16") -> None:
        self._shapes, self._dtype = shapes, dtype

    def names(self) -> list[str]:
        return sorted(self._shapes)

    def info(self, name: str) -> TensorInfo:
        return TensorInfo(self._shapes[name], self._dtype)

    def read(self, name: str, start: int = 0, stop: int | None = None, out: torch.Tensor | None = None) -> torch.Tensor:
        raise AssertionError("nothing is read")

    config = files = MappingProxyType[str, Any]({})
    identity = stamp = "sized"

    def describe(self) -> dict[str, Any]:
        return {"model": "sized"}


class Whole:
    """A method that needs whole matrices."""

    id, needs_base, needs_uniform, takes_base = "whole", False, False, False

    def __getattr__(self, name: str) -> Any:
        return getattr(get("linear"), name)

    def unit(self, parameters: Any) -> str:
        return "matrix"


LAYERS = {f"layers.{n}.mlp": (11008, 4096) for n in range(8)} | {f"layers.{n}.norm": (4096,) for n in range(8)}


def linear(shapes: dict[str, tuple[int, ...]], models: int = 2, method: Any = None, dtype: str = "BF16") -> MergedCheckpoint:
    parameters = {"weight": [0.5] * models, "normalize": True}
    return MergedCheckpoint(method or get("linear"), [Sized(shapes, dtype)] * models, parameters=parameters)


@pytest.mark.parametrize("scale", [1, 100, 10_000])
def test_need_does_not_grow_with_the_model(scale: int) -> None:
    """Element methods: the same division for a thousand million elements and for a million million."""
    small, large = linear({"w": (2**20, 64)}), linear({"w": (2**20 * scale, 64), "x": (2**16, 64)})
    for options in ({"memory": None}, {"memory": GIB}):
        found = divide(large, workers=4, fixed_workers=False, **options)
        assert found == divide(small, workers=4, fixed_workers=False, **options)
        assert (found.workers, found.chunk) == (4, 2**18)


@pytest.mark.parametrize("models", [2, 5, 12])
@pytest.mark.parametrize("memory", [None, 400_000_000, GIB, 8 * GIB])
def test_workers_and_chunks_stay_within_the_limit(models: int, memory: int | None) -> None:
    merged = linear(LAYERS, models)
    found = divide(merged, memory=memory, workers=64, fixed_workers=False)
    worker = WORKER_BYTES + max(merged.working_bytes(name, found.chunk) for name in merged.names())
    limit = memory or DEFAULT_BYTES
    assert PROCESS_BYTES + found.workers * worker <= limit
    assert found.workers == 64 or PROCESS_BYTES + (found.workers + 1) * worker > limit, "no more would fit"
    assert 2**16 <= found.chunk <= 2**18


def test_estimate_counts_a_chunk_of_every_input_and_what_nested_merges_hold() -> None:
    """(3 inputs + 8) chunks in the dtype of the arithmetic; views add nothing."""
    merged = linear(LAYERS)
    assert merged.working_bytes("layers.0.mlp", 1000) == (3 * 2 + 8) * 4 * 1000
    assert linear(LAYERS, dtype="F64").working_bytes("layers.0.mlp", 1000) == (3 * 2 + 8) * 8 * 1000
    assert merged.working_bytes("layers.0.norm", 10**6) == (3 * 2 + 8) * 4 * 4096, "no more than the tensor"
    outer = MergedCheckpoint(get("linear"), [merged, Sized(LAYERS)], parameters={"weight": [0.5, 0.5], "normalize": True})
    assert outer.working_bytes("layers.0.mlp", 1000) == 2 * merged.working_bytes("layers.0.mlp", 1000)
    renamed = RenamedCheckpoint(merged, {"a": "layers.0.mlp"})
    joined = JoinedCheckpoint({"x.": renamed, "y.": Sized(LAYERS)})
    assert renamed.working_bytes("a", 1000) == joined.working_bytes("x.a", 1000) == merged.working_bytes("layers.0.mlp", 1000)
    assert joined.working_bytes("y.layers.0.mlp", 1000) == 0


def test_model_on_disk_costs_the_pages_that_it_maps(tmp_path: Path) -> None:
    zoo = write_zoo(tmp_path / "zoo")
    assert isinstance(zoo[0], SafetensorsCheckpoint)
    assert zoo[0].working_bytes("embed.weight", 10**9) == MAPPED_BYTES
    assert merge_of(zoo, "linear").working_bytes("scale", 10) == 3 * MAPPED_BYTES + (3 * 3 + 8) * 4


def test_what_is_left_keeps_pages_mapped(tmp_path: Path) -> None:
    """Up to 128 MiB a worker, and never beyond the limit."""
    zoo = write_zoo(tmp_path / "zoo")
    once, merged = merge_of(zoo, "linear"), merge_of(zoo, "ties")
    assert divide(once, memory=None, workers=2, fixed_workers=False).mapped == 0, "nothing is read again"
    for twice in (merged, JoinedCheckpoint({"x.": RenamedCheckpoint(merged, {name: name for name in merged.names()}), "y.": once})):
        assert divide(twice, memory=None, workers=2, fixed_workers=False).mapped == 2**27
    outer = MergedCheckpoint(get("linear"), [merged, once], parameters={"weight": [0.5, 0.5], "normalize": True})
    assert divide(outer, memory=None, workers=2, fixed_workers=False).mapped == 2**27
    tight = divide(merged, memory=PROCESS_BYTES + 2 * 100_000_000, workers=2, fixed_workers=False)
    need = 100_000_000 - tight.mapped
    assert tight.workers == 2
    assert need == WORKER_BYTES + max(merged.working_bytes(name, min(tight.chunk, merged.info(name).numel)) for name in merged.names())
    alone = divide(merged, memory=PROCESS_BYTES + need, workers=2, fixed_workers=False)
    assert (alone.workers, alone.mapped) == (1, 0)


def test_whole_matrices_are_held_one_at_a_time_where_there_is_room_for_one() -> None:
    """(inputs + 3) matrices of float32, whatever the chunk; small tensors go on beside each other."""
    merged = linear(LAYERS, method=Whole())
    largest = (2 + 3) * 11008 * 4096 * 4
    assert merged.working_bytes("layers.0.mlp", 1000) == largest
    found = divide(merged, memory=None, workers=8, fixed_workers=False)
    assert found.capacity == WORKER_BYTES + largest > DEFAULT_BYTES - PROCESS_BYTES
    assert divide(merged, memory=4 * GIB, workers=2, fixed_workers=False).capacity == 4 * GIB - PROCESS_BYTES


@pytest.mark.parametrize(("method", "memory", "least"), [(None, 10**8, 304), (Whole(), GIB, 1202)])
def test_memory_that_is_too_little_says_the_least(method: Any, memory: int, least: int, tmp_path: Path) -> None:
    merged = linear(LAYERS, method=method)
    message = f"a memory of {memory:,} bytes is too little: this merge needs at least {least:,} MB with one worker. Allow as much"
    with pytest.raises(UserError, match=message) as caught:
        save(merged, tmp_path / "out", memory=memory)
    assert caught.value.exit_code == 2
    assert list(tmp_path.iterdir()) == []
    divide(merged, memory=least * 10**6, workers=2, fixed_workers=False)


def test_workers_that_were_asked_for_are_kept_by_default() -> None:
    merged = linear(LAYERS)
    assert divide(merged, memory=None, workers=64, fixed_workers=True).workers == 64
    assert divide(merged, memory=None, workers=64, fixed_workers=False).workers < 64
    assert divide(merged, memory=GIB, workers=64, fixed_workers=True).workers < 64, "memory that was asked for is kept too"


def test_bytes_do_not_depend_on_memory(tmp_path: Path) -> None:
    zoo = write_zoo(tmp_path / "zoo")
    for number, memory in enumerate((None, 450_000_000, 8 * GIB)):
        save(merge_of(zoo, "ties"), tmp_path / str(number) / "out", memory=memory)
        assert contents(tmp_path / str(number) / "out") == contents(tmp_path / "0" / "out")


def busy(state: Path, task: tuple[int, int]) -> int:
    """Logs what was in work together with this task."""
    number, _ = task
    mark = state / str(number)
    mark.touch()
    for _ in range(200):
        found = sorted(int(path.name) for path in state.iterdir() if path.name.isdigit())
        (state / f"seen-{number}").open("a").write(f"{found}\n")
    mark.unlink()
    return number


def test_tasks_are_in_work_together_only_while_their_costs_fit(tmp_path: Path) -> None:
    """Costs 6, 6, 6, 3, 3, 3 with room for 7: no two of six, six never beside three, at most two of three."""
    costs = {number: 6 if number < 3 else 3 for number in range(6)}
    done: list[int] = []
    run_tasks(
        busy, tmp_path, list(costs.items()), workers=3, on_done=lambda task, _: done.append(task[0]), cost=lambda task: task[1], capacity=7
    )
    assert sorted(done) == list(costs)
    for path in tmp_path.glob("seen-*"):
        for line in path.read_text().splitlines():
            assert sum(costs[number] for number in json.loads(line)) <= 7


def test_a_task_dearer_than_all_there_is_runs_alone(tmp_path: Path) -> None:
    done: list[int] = []
    run_tasks(busy, tmp_path, [(0, 50), (1, 50)], workers=2, on_done=lambda task, _: done.append(task[0]), cost=lambda t: t[1], capacity=7)
    assert done == [0, 1]
