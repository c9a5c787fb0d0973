"""The record of an output: hashes of what is on the disk, made while it is written, and the identity that follows from them."""

from __future__ import annotations

import hashlib
import json
import signal
from pathlib import Path

import pytest

from modelglue.checkpoint import RECIPE_FILE, RECORD_FILE, SafetensorsCheckpoint, TensorsCheckpoint, identity, save
from modelglue.checkpoint.output import journal, plan, writer
from modelglue.checkpoint.output.fill import Digest, Filling, fill
from tests.checkpoint.files import randn
from tests.checkpoint.killing import dying, forked, run_in_child
from tests.checkpoint.merges import merge_of, reopened, write_zoo


def expected_record(folder: Path) -> dict[str, object]:
    """What the record should say, by the words of its format and the bytes of the folder."""
    found: dict[str, object] = {}
    for file in folder.glob("*.safetensors"):
        data = file.read_bytes()
        length = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + length])
        for name, entry in header.items():
            if name != "__metadata__":
                begin, end = entry["data_offsets"]
                digest = hashlib.sha256(data[8 + length + begin : 8 + length + end]).hexdigest()
                found[name] = {"dtype": entry["dtype"], "shape": entry["shape"], "sha256": digest}
    recipe = hashlib.sha256((folder / RECIPE_FILE).read_bytes()).hexdigest()
    return {"format": "modelglue-record/1", "recipe": recipe, "tensors": found}


@pytest.mark.parametrize(("workers", "chunk", "task"), [(1, 2**18, 2**23), (1, 97, 50), (2, 200, 300)])
def test_record_has_the_hash_of_every_tensor(workers: int, chunk: int, task: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Written whole by one task, or in pieces by several: then it is hashed once the last piece is there."""
    monkeypatch.setattr(plan, "TASK_ELEMENTS", task)
    zoo = write_zoo(tmp_path / "zoo")
    merged = merge_of(zoo, "linear")
    pieces = [{name for name, _, _ in task.spans} for task in plan.plan_output(merged, shard_bytes=5000).tasks]
    assert (sum("embed.weight" in names for names in pieces) > 1) == (task < 1000)
    save(merged, tmp_path / "out", workers=workers, chunk=chunk, shard_bytes=5000)
    text = (tmp_path / "out" / RECORD_FILE).read_text(encoding="utf-8")
    record = json.loads(text)
    assert record == expected_record(tmp_path / "out")
    assert len(record["tensors"]) == 12
    assert text == json.dumps(record, indent=2, sort_keys=True, ensure_ascii=False) + "\n"


@forked
@pytest.mark.parametrize("kills", [1, 3, 9])
def test_record_of_a_killed_save_is_the_same(kills: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether a tensor was hashed before the kill, between its pieces, or after."""
    monkeypatch.setattr(plan, "TASK_ELEMENTS", 200)
    zoo = write_zoo(tmp_path / "zoo")
    add = journal.Flusher.add

    def add_and_flush(self: journal.Flusher, entry: journal.Entry) -> None:
        add(self, entry)
        self._flush(self._waiting)
        self._waiting = []

    monkeypatch.setattr(journal.Flusher, "add", add_and_flush)
    for kill in range(kills):
        with monkeypatch.context() as patch:
            patch.setattr(journal.Journal, "add", dying(journal.Journal.add, 4, before=kill % 2 == 1))
            child = run_in_child(lambda: save(merge_of(reopened(zoo), "linear"), tmp_path / "work" / "out", workers=1, chunk=300))
            assert child == -signal.SIGKILL
    report = save(merge_of(reopened(zoo), "linear"), tmp_path / "work" / "out", workers=1, chunk=300)
    assert report.resumed_bytes > 0
    assert json.loads((tmp_path / "work" / "out" / RECORD_FILE).read_text()) == expected_record(tmp_path / "work" / "out")


def test_identity_of_an_output_costs_no_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MODELGLUE_CACHE", str(tmp_path / "cache"))
    zoo = write_zoo(tmp_path / "zoo")
    save(merge_of(zoo), tmp_path / "out", shard_bytes=5000)
    with monkeypatch.context() as patch:
        patch.setattr(identity, "tensor_digest", lambda *_: pytest.fail("reads the tensors"))
        known = SafetensorsCheckpoint(tmp_path / "out").identity
    monkeypatch.setenv("MODELGLUE_CACHE", str(tmp_path / "another"))
    assert SafetensorsCheckpoint(tmp_path / "out").identity == known


@pytest.mark.parametrize("change", ["weights", "config", "tokenizer"])
def test_output_that_is_changed_has_another_identity(change: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MODELGLUE_CACHE", str(tmp_path / "cache"))
    save(merge_of(write_zoo(tmp_path / "zoo")), tmp_path / "out")
    known = SafetensorsCheckpoint(tmp_path / "out").identity
    path = tmp_path / "out" / {"weights": "model.safetensors", "config": "config.json", "tokenizer": "tokenizer.json"}[change]
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(bytes(data) if change != "config" else b'{"model_type": "other"}')
    assert SafetensorsCheckpoint(tmp_path / "out").identity != known


def test_shard_that_shrinks_while_it_is_hashed_is_an_error(tmp_path: Path) -> None:
    checkpoint = TensorsCheckpoint({"w": randn(1000)})
    planned = plan.plan_output(checkpoint)
    writer._lay_out(tmp_path, planned)
    with (tmp_path / "model.safetensors").open("r+b") as stream:
        stream.truncate(2000)
    with pytest.raises(OSError, match=r"^model\.safetensors has become shorter while it was written$"):
        fill(Filling(checkpoint, planned, tmp_path, 100), Digest("w"))
