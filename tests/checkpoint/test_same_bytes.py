"""Equal recipes give equal bytes, for every method of the registry: whatever the workers, the chunks, the device, and after a kill."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest

from modelglue.checkpoint import MergedCheckpoint, SafetensorsCheckpoint, save
from modelglue.checkpoint.engine.device import SIMULATED
from modelglue.checkpoint.output import journal, plan
from modelglue.methods import all_methods, get
from modelglue.methods.registry import REQUIRED
from tests.checkpoint.files import contents
from tests.checkpoint.killing import dying, forked, run_in_child
from tests.checkpoint.merges import reopened, write_zoo

METHODS = sorted(method.id for method in all_methods())
#: what a merge of its own would say; everything else is the default
GIVEN: dict[str, Any] = {"weight": 0.5, "density": 0.6, "t": 0.3}
Zoo = list[SafetensorsCheckpoint]


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Zoo:
    return write_zoo(tmp_path_factory.mktemp("zoo"))


def merged(method_id: str, zoo: Zoo) -> MergedCheckpoint:
    """The method over as many of the models as it takes, in files that this process has not opened before."""
    method = get(method_id)
    base, *models = reopened(zoo)
    models = models[: method.max_models]
    labels = [f"m{number}" for number in range(len(models))]
    known = [parameter for parameter in method.parameters if parameter.name in GIVEN]
    assert all(parameter.name in GIVEN for parameter in method.parameters if parameter.default is REQUIRED), "GIVEN lacks a parameter"
    shared = {parameter.name: GIVEN[parameter.name] for parameter in known}
    values, faults = method.resolve(shared, [{} for _ in models], labels)
    assert faults == []
    return MergedCheckpoint(method, models, base if method.takes_base else None, values, labels=labels, seed=3)


@pytest.mark.parametrize("method", METHODS)
def test_bytes_do_not_depend_on_workers_chunks_or_device(method: str, zoo: Zoo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "TASK_ELEMENTS", 400)
    settings: list[dict[str, Any]] = [{"workers": 1}, {"workers": 1, "chunk": 97}, {"workers": 2, "chunk": 512}]
    settings += [{"device": SIMULATED, "chunk": 300}, {"workers": 2, "memory": 700_000_000}]
    for number, options in enumerate(settings):
        save(merged(method, zoo), tmp_path / str(number) / "out", shard_bytes=5000, **options)
        assert contents(tmp_path / str(number) / "out") == contents(tmp_path / "0" / "out"), options
    assert len(list((tmp_path / "0" / "out").glob("*.safetensors"))) > 2


@forked
@pytest.mark.parametrize("method", METHODS)
def test_killed_at_any_entry_of_the_journal_it_goes_on_to_the_same_bytes(
    method: str, zoo: Zoo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With other chunks than before, and from a process that remembers nothing."""
    save(merged(method, zoo), tmp_path / "whole" / "out", workers=1, shard_bytes=5000)
    monkeypatch.setattr(plan, "TASK_ELEMENTS", 400)
    add = journal.Flusher.add

    def add_and_flush(self: journal.Flusher, entry: journal.Entry) -> None:
        add(self, entry)
        self._flush(self._waiting)
        self._waiting = []

    monkeypatch.setattr(journal.Flusher, "add", add_and_flush)
    out = tmp_path / "killed" / "out"
    place = METHODS.index(method) % 4 + 1  # another place for every method
    for chunk in (200, 111):
        with monkeypatch.context() as patch:
            patch.setattr(journal.Journal, "add", dying(journal.Journal.add, place, before=chunk == 111))
            child = run_in_child(lambda chunk=chunk: save(merged(method, zoo), out, workers=1, shard_bytes=5000, chunk=chunk))
            assert child == -signal.SIGKILL
    assert save(merged(method, zoo), out, workers=1, shard_bytes=5000).resumed_bytes > 0
    assert contents(out) == contents(tmp_path / "whole" / "out")
