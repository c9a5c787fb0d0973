"""Devices: the same code path on buffers of its own, tried with the processor as the device, where it gives equal bits."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

from modelglue.checkpoint import MergedCheckpoint, SafetensorsCheckpoint, TensorsCheckpoint, open_checkpoint, save
from modelglue.checkpoint.engine import device
from modelglue.checkpoint.engine.device import SIMULATED, Lane, devices_of, lanes_of, pipelined
from modelglue.checkpoint.output import plan
from modelglue.errors import MergeError, RunError, UserError
from modelglue.methods import get
from tests.checkpoint.files import contents, randn
from tests.checkpoint.merges import merge_of, write_zoo

Zoo = list[SafetensorsCheckpoint]


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Zoo:
    return write_zoo(tmp_path_factory.mktemp("zoo"))


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks and surveys are far smaller than a tensor, so that the lanes take turns."""
    monkeypatch.setattr(plan, "TASK_ELEMENTS", 1000)


@pytest.mark.parametrize("method", ["linear", "slerp", "ties", "dare_ties", "model_stock"])
def test_simulated_device_gives_equal_bytes(method: str, zoo: Zoo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given: Any = {"t": 0.3} if method == "slerp" else {}
    models = zoo[:2] if method == "slerp" else zoo
    save(merge_of(models, method, **given), tmp_path / "plain", workers=1)
    used: set[int] = set()
    upload = Lane.upload

    def counted(self: Lane, slot: Any, values: torch.Tensor) -> torch.Tensor:
        used.add(id(self))
        return upload(self, slot, values)

    monkeypatch.setattr(Lane, "upload", counted)
    save(merge_of(models, method, **given), tmp_path / "device", device=SIMULATED, chunk=300)
    assert contents(tmp_path / "device") == contents(tmp_path / "plain")
    assert len(used) == 2, "both lanes have work"


def test_two_devices_share_the_tensors(zoo: Zoo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two workers that are started afresh, as an accelerator wants it."""
    monkeypatch.setattr("modelglue.checkpoint.output.execution.devices_of", lambda text: (SIMULATED, SIMULATED))
    save(merge_of(zoo, "ties"), tmp_path / "plain", workers=1)
    save(merge_of(zoo, "ties"), tmp_path / "device", device="two", chunk=300)
    assert contents(tmp_path / "device") == contents(tmp_path / "plain")


def test_nested_and_whole_matrix_merges_on_a_device(zoo: Zoo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An inner merge and a remembered matrix lend the buffers of a lane; nothing that is still needed may be written over."""

    def nested() -> MergedCheckpoint:
        inner = merge_of(zoo, "ties")
        return merge_of([zoo[0], inner, merge_of(zoo, "linear")], "model_stock")

    class Whole:
        id, needs_base, needs_uniform, takes_base = "whole", False, False, False

        def __getattr__(self, name: str) -> Any:
            return getattr(get("linear"), name)

        def unit(self, parameters: Any) -> str:
            return "matrix"

    whole = MergedCheckpoint(Whole(), zoo[1:], parameters={"weight": [0.2, 0.3, 0.5], "normalize": True})  # type: ignore[arg-type]
    for number, make in enumerate((nested, lambda: whole)):
        expected = {name: make().read(name).clone() for name in zoo[0].names()}
        lane = Lane(SIMULATED)
        merged = make()
        with lane.active():
            for name in zoo[0].names():
                pieces = [merged.read(name, start, stop).clone() for start, stop in merged.pieces(name, 111)]
                assert torch.equal(torch.cat(pieces), expected[name]), (number, name)


def test_results_are_handed_over_in_order_and_are_good_until_the_next() -> None:
    lanes = lanes_of(SIMULATED)
    assert lanes_of(SIMULATED) is lanes
    values = torch.arange(1000.0)

    def read(piece: tuple[int, int]) -> torch.Tensor:
        lane = device.current()
        assert lane is not None
        return lane.download(lane.upload("x", values[slice(*piece)]))

    pieces = [(start, start + 37) for start in range(0, 900, 37)]
    found = [(piece, result.clone()) for piece, result in pipelined(pieces, read, lanes)]
    assert [piece for piece, _ in found] == pieces
    assert all(torch.equal(result, values[slice(*piece)]) for piece, result in found)
    assert device.current() is None


def test_error_in_a_lane_names_the_tensor_and_leaves_nothing(tmp_path: Path) -> None:
    bad = randn(5000)
    bad[4321] = float("nan")
    merged = MergedCheckpoint(
        get("linear"), [TensorsCheckpoint({"w": randn(5000, seed=1)}), TensorsCheckpoint({"w": bad}, label="two")],
        parameters={"weight": [0.5, 0.5], "normalize": True},
    )  # fmt: skip
    with pytest.raises(MergeError, match="tensor 'w' holds NaN or infinity near element 4,321"):
        save(merged, tmp_path / "out", device=SIMULATED, chunk=100)
    assert list(tmp_path.iterdir()) == []


def test_memory_of_a_device_that_runs_out_is_named() -> None:
    with (
        pytest.raises(RunError, match=r"^device cpu: has too little memory for this merge\. Free some, or leave --device out\.$"),
        Lane(SIMULATED).active(),
    ):
        raise torch.OutOfMemoryError("out of memory")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("cuda", r"device 'cuda': torch [^ ]+ sees no such device here\. Choose another, or leave --device out\."),
        ("cuda:0,cuda:1", r"device 'cuda:0': torch [^ ]+ sees no such device here\."),
        ("gpu", r"device 'gpu': is none to merge on\. Allowed are cpu, cuda, cuda:0,cuda:1 \(several\), mps, xpu\."),
        ("meta", r"device 'meta': is none to merge on\."),
        (f"{SIMULATED},cpu", r"device 'cpu' beside others: is none to merge on\."),
        (f"{SIMULATED},{SIMULATED}", r"device 'cpu:sim,cpu:sim': names a device twice\. Name each once\."),
    ],
)
def test_device_that_is_not_here_is_a_user_error(text: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match=message):
        devices_of(text)


def test_devices_that_are_here(monkeypatch: pytest.MonkeyPatch) -> None:
    assert devices_of(None) == devices_of("cpu") == ()
    assert devices_of(SIMULATED) == (SIMULATED,)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert devices_of("cuda:0, cuda:1") == ("cuda:0", "cuda:1")
    with pytest.raises(UserError, match=r"device 'cuda:2': torch [^ ]+ sees 2 of this kind here"):
        devices_of("cuda:2")


def test_what_needs_wide_numbers_runs_on_the_processor_where_the_device_has_none() -> None:
    lane = Lane(SIMULATED)
    with lane.active():
        with device.wide():
            assert device.current() is lane
        lane.device = torch.device("mps")
        with device.wide():
            assert device.current() is None
        assert device.current() is lane


def test_engine_travels_without_its_lock(zoo: Zoo) -> None:
    merged = merge_of([open_checkpoint(checkpoint.path) for checkpoint in zoo], "ties")
    assert torch.equal(pickle.loads(pickle.dumps(merged)).read("embed.weight"), merged.read("embed.weight"))
