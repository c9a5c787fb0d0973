"""A save that was killed goes on; one that is finished is recognised; one that failed leaves nothing."""

from __future__ import annotations

import errno
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from modelglue.checkpoint import RECIPE_FILE, Checkpoint, SafetensorsCheckpoint, TensorsCheckpoint, save
from modelglue.checkpoint.output import journal, plan, staging, writer
from modelglue.checkpoint.output.staging import JOURNAL, LOCK, staged
from modelglue.errors import MergeError, ModelGlueError, RunError, UserError, WorkerDiedError
from tests.checkpoint.files import contents, names_in, write_single
from tests.checkpoint.killing import dying, forked, run_in_child
from tests.checkpoint.merges import merge_of, reopened, write_zoo

Zoo = list[SafetensorsCheckpoint]


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Zoo:
    """Nobody changes it."""
    return write_zoo(tmp_path_factory.mktemp("zoo"))


@pytest.fixture(scope="module")
def expected(zoo: Zoo, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What every save of the merge ends with, however often it was killed."""
    out = tmp_path_factory.mktemp("reference") / "out"
    save_merge(zoo, out)
    return contents(out)


@pytest.fixture(autouse=True)
def _no_patience(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """Only where workers were killed is there something to wait for."""
    if "workers" not in request.fixturenames:
        monkeypatch.setattr(staging, "_PATIENCE", 0)


@pytest.fixture
def small_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small models behave like large ones: many tasks, each journaled when it is done."""
    monkeypatch.setattr(plan, "TASK_ELEMENTS", 200)
    monkeypatch.setattr(journal, "JOURNAL_BYTES", 1)
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # a killed process loses nothing that it wrote; a disk does
    add = journal.Flusher.add

    def add_and_wait(self: journal.Flusher, entry: journal.Entry) -> None:
        add(self, entry)
        assert self._thread is not None
        self._thread.join()

    monkeypatch.setattr(journal.Flusher, "add", add_and_wait)


def save_merge(zoo: Zoo, out: Path, **options: Any) -> writer.SaveReport:
    options = {"workers": 1, "chunk": 200, "shard_bytes": 5000, **options}
    return save(merge_of(reopened(zoo)), out, **options)


def siblings(folder: Path) -> list[Path]:
    return sorted(folder.glob(".*"))


# -- killed -------------------------------------------------------------------------------------------------------------------

#: name -> (where the process dies, how often that is reached before, whether on entry, what of the work is found again)
KILLS: dict[str, tuple[Any, str, int, bool, str]] = {
    "before-the-folder-is-laid-out": (writer, "_lay_out", 1, True, "nothing"),
    "after-it-is-laid-out": (writer, "_lay_out", 1, False, "nothing"),
    "before-anything-is-journaled": (journal.Journal, "add", 1, True, "nothing"),
    "after-one-task": (journal.Journal, "add", 1, False, "some"),
    "between-writing-and-journaling": (journal.Journal, "add", 4, True, "some"),
    "after-six-tasks": (journal.Journal, "add", 6, False, "some"),
    "after-all-tasks": (writer, "_write_side_files", 1, True, "all"),
    "before-it-is-flushed": (staging, "_flush_tree", 1, True, "all"),
    "after-it-is-flushed": (staging, "_flush_tree", 1, False, "all"),
    "before-the-name": (staging, "_move", 1, True, "nothing"),
    "after-the-name": (staging, "_move", 1, False, "complete"),
}


@forked
@pytest.mark.parametrize("kill", KILLS)
@pytest.mark.parametrize("workers", [1, 2])
def test_killed_save_goes_on_and_gives_the_same_bytes(
    kill: str, workers: int, zoo: Zoo, expected: dict[str, bytes], tmp_path: Path, small_tasks: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "work" / "out"
    place, function, calls, before, found = KILLS[kill]
    with monkeypatch.context() as patch:
        patch.setattr(place, function, dying(getattr(place, function), calls, before=before))
        assert run_in_child(lambda: save_merge(zoo, out, workers=workers)) == -signal.SIGKILL
    if found == "complete":
        assert contents(out) == expected
        assert save_merge(zoo, out).already_complete
        return
    assert not out.exists(), "no final name before the end"
    assert len(siblings(out.parent)) == 1
    report = save_merge(zoo, out, workers=workers)
    assert contents(out) == expected
    assert siblings(out.parent) == []
    assert not report.already_complete
    if found == "nothing":
        assert report.resumed_bytes == 0
    elif found == "all":
        assert report.resumed_bytes == report.bytes
    else:
        assert 0 < report.resumed_bytes < report.bytes


@forked
def test_killed_again_and_again(
    zoo: Zoo, expected: dict[str, bytes], tmp_path: Path, small_tasks: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every process does two tasks more; what was done is not done again."""
    out = tmp_path / "work" / "out"
    kills = 0
    with monkeypatch.context() as patch:
        patch.setattr(journal.Journal, "add", dying(journal.Journal.add, 2))
        while run_in_child(lambda: save_merge(zoo, out, workers=1)) == -signal.SIGKILL:
            kills += 1
            assert not out.exists()
    tasks = len(plan.plan_output(merge_of(zoo), shard_bytes=5000).tasks)
    assert kills == tasks // 2
    assert tasks > 8
    assert contents(out) == expected


def torn(text: str) -> str:
    """The last line without its end, as after a crash of the machine."""
    return text[:-1]


def torn_short(text: str) -> str:
    """An entry of which only the beginning reached the disk."""
    return text + "[1"


def unreadable(text: str) -> str:
    return text + '\udcff\n-3\nx\n[99999999, {}]\n[true, {}]\n[7, 7]\n[7, {"w": "short"}]\n\n'


@forked
@pytest.mark.parametrize("damage", [torn, torn_short, unreadable])
def test_damaged_journal_costs_time_and_no_bytes(
    damage: Callable[[str], str], zoo: Zoo, expected: dict[str, bytes], tmp_path: Path, small_tasks: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "work" / "out"
    with monkeypatch.context() as patch:
        patch.setattr(journal.Journal, "add", dying(journal.Journal.add, 3))
        assert run_in_child(lambda: save_merge(zoo, out)) == -signal.SIGKILL
    [sibling] = siblings(out.parent)
    path = sibling / JOURNAL
    text = path.read_text()
    path.write_text(damage(text), errors="surrogateescape")
    # whatever the journal does not claim is wiped, so that a task that is wrongly believed to be done shows
    tasks = [json.loads(line)[0] for line in text.split("\n")[1:-1]]
    done = set(tasks[:-1] if damage is torn else tasks)
    wipe_all_but(sibling, merge_of(zoo), done)
    report = save_merge(zoo, out)
    assert contents(out) == expected
    assert 0 < report.resumed_bytes < report.bytes


def wipe_all_but(folder: Path, checkpoint: Checkpoint, done: set[int]) -> None:
    planned = plan.plan_output(checkpoint, shard_bytes=5000)
    for task in planned.tasks:
        for name, start, stop in task.spans if task.number not in done else ():
            shard = planned.home[name]
            item = checkpoint.info(name).nbytes // max(checkpoint.info(name).numel, 1)
            with (folder / shard.file).open("r+b") as stream:
                stream.seek(shard.offsets[name] + start * item)
                stream.write(b"\xee" * ((stop - start) * item))


@forked
@pytest.mark.parametrize("change", ["model", "config", "recipe", "shards"])
def test_changed_input_starts_afresh_and_sweeps_what_was_left(
    change: str, tmp_path: Path, small_tasks: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    zoo = write_zoo(tmp_path / "zoo")
    out = tmp_path / "work" / "out"
    with monkeypatch.context() as patch:
        patch.setattr(journal.Journal, "add", dying(journal.Journal.add, 5))
        assert run_in_child(lambda: save_merge(zoo, out)) == -signal.SIGKILL
    [left] = siblings(out.parent)
    options: dict[str, Any] = {}
    if change == "model":
        path = zoo[1].path / "model.safetensors"
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(bytes(data))
    elif change == "config":
        (zoo[0].path / "config.json").write_text('{"model_type": "other"}')
    elif change == "recipe":
        options["recipe_text"] = "method: ties # another text\n"
    else:
        options["shard_bytes"] = 7000
    report = save_merge(zoo, out, **options)
    assert report.resumed_bytes == 0
    save_merge(zoo, tmp_path / "reference" / "out", **options)
    assert contents(out) == contents(tmp_path / "reference" / "out")
    assert not left.exists()
    assert siblings(out.parent) == []


@forked
def test_shard_that_was_taken_away_starts_afresh(
    zoo: Zoo, expected: dict[str, bytes], tmp_path: Path, small_tasks: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "work" / "out"
    with monkeypatch.context() as patch:
        patch.setattr(journal.Journal, "add", dying(journal.Journal.add, 5))
        assert run_in_child(lambda: save_merge(zoo, out)) == -signal.SIGKILL
    next(siblings(out.parent)[0].glob("*.safetensors")).unlink()
    assert save_merge(zoo, out).resumed_bytes == 0
    assert contents(out) == expected


def test_ctrl_c_leaves_the_work_for_the_next_run(zoo: Zoo, expected: dict[str, bytes], tmp_path: Path, small_tasks: None) -> None:
    out = tmp_path / "work" / "out"

    def interrupt(done: int, total: int) -> None:
        assert not out.exists()
        if done > total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        save_merge(zoo, out, progress=interrupt)
    assert not out.exists()
    report = save_merge(zoo, out)
    assert report.bytes // 2 < report.resumed_bytes < report.bytes
    assert contents(out) == expected


def test_progress_counts_bytes_and_goes_on_where_it_was(zoo: Zoo, tmp_path: Path, small_tasks: None) -> None:
    steps: list[tuple[int, int]] = []
    report = save_merge(zoo, tmp_path / "out", progress=lambda *step: steps.append(step))
    assert steps[0] == (0, report.bytes)
    assert steps[-1] == (report.bytes, report.bytes)
    assert [done for done, _ in steps] == sorted({done for done, _ in steps})
    assert len(steps) > 8


# -- finished, or somebody else's ---------------------------------------------------------------------------------------------


def test_finished_output_is_recognised_and_left_alone(zoo: Zoo, tmp_path: Path) -> None:
    out = tmp_path / "work" / "out"
    first = save_merge(zoo, out)
    stamps = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    again = save_merge(zoo, out, workers=2)
    assert again == writer.SaveReport(out, first.tensors, first.bytes, first.shards, 0, True)
    assert {path: path.stat().st_mtime_ns for path in out.iterdir()} == stamps
    assert save_merge(zoo, out, overwrite=True).already_complete


def test_finished_output_that_lost_a_shard_is_not_complete(zoo: Zoo, expected: dict[str, bytes], tmp_path: Path) -> None:
    out = tmp_path / "work" / "out"
    save_merge(zoo, out)
    expected = contents(out)
    next(out.glob("*.safetensors")).unlink()
    with pytest.raises(UserError, match="exists already"):
        save_merge(zoo, out)
    assert not save_merge(zoo, out, overwrite=True).already_complete
    assert contents(out) == expected


def test_finished_output_of_other_inputs_is_not_complete(tmp_path: Path) -> None:
    zoo = write_zoo(tmp_path / "zoo")
    out = tmp_path / "work" / "out"
    save_merge(zoo, out)
    os.utime(zoo[2].path / "model.safetensors", ns=(1, 1))
    with pytest.raises(UserError, match="exists already"):
        save_merge(zoo, out)


@pytest.mark.parametrize("kind", ["folder", "empty", "file"])
def test_what_else_has_the_name_is_refused_and_untouched(kind: str, zoo: Zoo, tmp_path: Path) -> None:
    out = tmp_path / "work" / "out"
    out.parent.mkdir()
    if kind == "file":
        out.write_text("mine")
    else:
        out.mkdir()
    if kind == "folder":
        (out / "mine.txt").write_text("mine")
    before = names_in(out.parent), contents(out.parent)
    with pytest.raises(UserError, match="exists already") as caught:
        save_merge(zoo, out)
    assert (caught.value.exit_code, str(caught.value).startswith(f"{out}: ")) == (2, True)
    assert (names_in(out.parent), contents(out.parent)) == before


@pytest.mark.parametrize("exchange", [True, False], ids=["exchange", "two-renames"])
def test_overwrite_replaces_the_whole_folder(
    exchange: bool, zoo: Zoo, expected: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "work" / "out"
    (out / "deep").mkdir(parents=True)
    (out / "deep" / "old.txt").write_text("old")
    (out / "model.safetensors").write_bytes(b"old")
    if not exchange:
        monkeypatch.setattr(staging, "_exchange", lambda source, target: False)
    seen = []
    report = save_merge(zoo, out, overwrite=True, progress=lambda *_: seen.append(contents(out)))
    assert not report.already_complete
    assert all(at == {"deep/old.txt": b"old", "model.safetensors": b"old"} for at in seen)
    assert seen
    assert contents(out) == expected
    assert siblings(out.parent) == []


@pytest.mark.parametrize("kind", ["file", "dangling", "folder"])
def test_overwrite_destroys_nothing_that_is_no_output(kind: str, zoo: Zoo, tmp_path: Path) -> None:
    out = tmp_path / "work" / "out"
    out.parent.mkdir()
    if kind == "file":
        out.write_text("mine")
        expected = r"out: exists already and is a file, not a folder\. Choose another path, or remove it\.$"
    elif kind == "dangling":
        out.symlink_to(tmp_path / "gone")
        expected = rf"out: is a link to {tmp_path}/gone, which does not exist\."
    else:
        out.mkdir()
        (out / "thesis.tex").write_text("years of work")
        expected = r"out: holds 'thesis\.tex' and is neither a model nor a mixture nor an adapter, .* remove the folder by hand\.$"
    before = names_in(out.parent), contents(out.parent)
    steps: list[int] = []
    with pytest.raises(UserError, match=expected) as caught:
        save_merge(zoo, out, overwrite=True, progress=lambda done, _: steps.append(done))
    assert (caught.value.exit_code, steps) == (2, [])
    assert (names_in(out.parent), contents(out.parent)) == before
    assert out.is_symlink() == (kind == "dangling")
    assert not (tmp_path / "gone").exists()


@pytest.mark.parametrize("inside", [*staging._OUTPUTS, None])
def test_overwrite_replaces_outputs_and_empty_folders(inside: str | None, zoo: Zoo, expected: dict[str, bytes], tmp_path: Path) -> None:
    out = tmp_path / "work" / "out"
    out.mkdir(parents=True)
    if inside is not None:
        (out / inside).write_text("{}")
    save_merge(zoo, out, overwrite=True)
    assert contents(out) == expected


def test_overwrite_follows_a_link_and_keeps_it(zoo: Zoo, expected: dict[str, bytes], tmp_path: Path) -> None:
    disk, work = tmp_path / "disk", tmp_path / "work"
    (disk / "real").mkdir(parents=True)
    (disk / "real" / "config.json").write_text("{}")
    work.mkdir()
    (work / "out").symlink_to("../disk/real")
    beside: list[list[str]] = []
    with pytest.raises(UserError, match="exists already"):
        save_merge(zoo, work / "out")
    report = save_merge(zoo, work / "out", overwrite=True, progress=lambda *_: beside.append(names_in(disk)))
    assert beside[0][0].startswith(".real."), "the sibling is on the disk of the folder, not of the link"
    assert not report.already_complete
    assert (work / "out").readlink() == Path("../disk/real")
    assert contents(disk / "real") == expected
    assert (names_in(disk), names_in(work)) == (["real"], ["out"])
    assert save_merge(zoo, work / "out").already_complete


@pytest.mark.parametrize(("target", "relation"), [("m1", "is"), ("", "holds"), ("m1/out", "lies in"), ("link", "is")])
@pytest.mark.parametrize("overwrite", [True, False])
def test_inputs_are_never_written_to(target: str, relation: str, overwrite: bool, tmp_path: Path) -> None:
    zoo = write_zoo(tmp_path / "zoo")
    (tmp_path / "zoo" / "config.json").write_text("{}")
    (tmp_path / "zoo" / "link").symlink_to("m1")
    model = zoo[0 if relation == "holds" else 1].path
    before = contents(tmp_path)
    with pytest.raises(UserError) as caught:
        save_merge(zoo, tmp_path / "zoo" / target, overwrite=overwrite)
    place = tmp_path / "zoo" / target
    assert str(caught.value) == f"{place}: {relation} the model '{model}' ({model}), which is read here. Choose another path."
    assert contents(tmp_path) == before


def test_a_folder_beside_a_weight_file_is_not_in_it(tmp_path: Path) -> None:
    file = write_single(tmp_path / "files", {"w": torch.ones(3)}) / "model.safetensors"
    save(SafetensorsCheckpoint(file), tmp_path / "files" / "out")
    assert torch.equal(SafetensorsCheckpoint(tmp_path / "files" / "out").tensor("w"), torch.ones(3))
    with pytest.raises(UserError, match="files: holds the model"):
        save(SafetensorsCheckpoint(file), tmp_path / "files", overwrite=True)


def test_another_engine_takes_nothing_over(
    zoo: Zoo, expected: dict[str, bytes], tmp_path: Path, small_tasks: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "work" / "out"

    def interrupt(done: int, total: int) -> None:
        if done > total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        save_merge(zoo, out, progress=interrupt)
    monkeypatch.setattr(writer, "ENGINE_VERSION", writer.ENGINE_VERSION + 1)
    assert save_merge(zoo, out).resumed_bytes == 0
    assert save_merge(zoo, out).already_complete
    monkeypatch.setattr(writer, "ENGINE_VERSION", writer.ENGINE_VERSION + 1)
    with pytest.raises(UserError, match="exists already"):
        save_merge(zoo, out)
    assert contents(out) == expected


@forked
def test_killed_between_exchange_and_removal_mixes_nothing(zoo: Zoo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The half-done folder then holds the old model under the new one's working name: same names, same sizes, other bytes."""
    out = tmp_path / "work" / "out"
    save_merge(zoo, out)
    old = contents(out)
    (out / "mine.txt").write_text("mine")
    for name in old:
        (out / name).write_bytes(b"\xee" * len(old[name]))
    with monkeypatch.context() as patch:
        patch.setattr(staging, "_exchange", dying(staging._exchange, 1))
        assert run_in_child(lambda: save_merge(zoo, out, overwrite=True)) == -signal.SIGKILL
    assert contents(out) == old, "the new one has the name"
    [left] = siblings(out.parent)
    assert (left / "mine.txt").exists()
    (out / RECIPE_FILE).touch()  # so that it does not count as finished
    assert save_merge(zoo, out, overwrite=True).resumed_bytes == 0
    assert contents(out) == old
    assert siblings(out.parent) == []


@forked
def test_everything_is_on_the_disk_before_it_has_its_name(zoo: Zoo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "work" / "out"
    events: list[str] = []
    flush, move = os.fsync, staging._move

    def fsync(descriptor: int) -> None:
        events.append(Path(f"/proc/self/fd/{descriptor}").readlink().name)
        flush(descriptor)

    def renamed(source: Path, target: Path) -> None:
        events.append(f"rename of {len(names_in(source))} files")
        move(source, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(staging, "_move", renamed)
    save_merge(zoo, out)
    files = names_in(out)
    place = events.index(f"rename of {len(files)} files")
    assert set(files) <= set(events[:place])
    assert events[place - 1].startswith(".out."), "the folder itself after its files"
    assert events[place + 1 :] == ["work"], "the new name after the rename"


# -- two writers --------------------------------------------------------------------------------------------------------------


def test_second_writer_of_the_same_is_refused(zoo: Zoo, expected: dict[str, bytes], tmp_path: Path) -> None:
    out = tmp_path / "work" / "out"
    refusals: list[ModelGlueError] = []

    def second(*_: int) -> None:
        with pytest.raises(UserError, match="another process is writing it") as caught:
            save_merge(zoo, out)
        refusals.append(caught.value)

    save_merge(zoo, out, progress=second)
    assert refusals
    assert all(error.exit_code == 2 and str(error).startswith(f"{out}: ") for error in refusals)
    assert contents(out) == expected


def test_second_writer_of_something_else_does_not_replace_the_first(zoo: Zoo, expected: dict[str, bytes], tmp_path: Path) -> None:
    """Two recipes, one name: whoever is ready first has it."""
    out = tmp_path / "work" / "out"

    def first(*_: int) -> None:
        if not out.exists():
            save_merge(zoo, out)

    with pytest.raises(UserError, match="exists already"):
        save(merge_of(zoo, "linear"), out, progress=first)
    assert contents(out) == expected
    assert siblings(out.parent) == []


def test_lock_of_a_folder_that_was_taken_away_is_no_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other writer finished between our opening of its lock and our locking of it."""
    real = staging.fcntl.flock

    def flock(stream: Any, how: int) -> None:
        (tmp_path / ".out.0123456789abcdef.partial" / LOCK).unlink()
        real(stream, how)

    monkeypatch.setattr(staging.fcntl, "flock", flock)
    with pytest.raises(UserError, match="another process"), staged(tmp_path / "out", key="0123456789abcdef"):
        raise AssertionError("not reached")


# -- failures leave nothing ---------------------------------------------------------------------------------------------------


def assert_fails(
    zoo: Zoo, out: Path, kind: type[ModelGlueError], *words: str, checkpoint: Checkpoint | None = None, **options: Any
) -> None:
    with pytest.raises(kind) as caught:
        save(checkpoint or merge_of(zoo), out, **{"workers": 1, "chunk": 200, "shard_bytes": 5000, **options})
    assert caught.value.exit_code == (1 if kind is RunError else 2)
    for word in words:
        assert word in str(caught.value)
    assert not out.exists()
    assert not out.parent.exists() or names_in(out.parent) == []


@pytest.mark.parametrize("workers", [1, 2])
def test_disk_that_fills_up_is_a_run_error(zoo: Zoo, tmp_path: Path, workers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    real, left = os.pwrite, 3

    def pwrite(descriptor: int, data: Any, offset: int) -> int:
        nonlocal left
        left -= 1
        if left < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(descriptor, data, offset)

    monkeypatch.setattr(os, "pwrite", pwrite)
    monkeypatch.setattr(plan, "TASK_ELEMENTS", 200)
    out = tmp_path / "work" / "out"
    assert_fails(zoo, out, RunError, f"{out}: the disk is full", "nothing was left behind", workers=workers)


def test_disk_without_room_is_refused_before_anything_is_computed(zoo: Zoo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Full:
        f_bavail, f_frsize = 1, 100

    monkeypatch.setattr(os, "statvfs", lambda path: Full)
    out = tmp_path / "work" / "out"
    steps: list[int] = []
    progress = lambda done, _: steps.append(done)  # noqa: E731
    assert_fails(zoo, out, RunError, f"{out.parent}: the disk is full", "bytes and 100 are free", progress=progress)
    assert steps == []


@pytest.mark.parametrize("batches", ["in-the-thread", "at-the-end"])
def test_disk_that_fails_while_flushing_is_a_run_error(batches: str, zoo: Zoo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fsync(descriptor: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(plan, "TASK_ELEMENTS", 200)
    if batches == "in-the-thread":
        monkeypatch.setattr(journal, "JOURNAL_BYTES", 1)
    out = tmp_path / "work" / "out"
    assert_fails(zoo, out, RunError, str(out), "Input/output error")


@pytest.mark.parametrize("code", [errno.EACCES, errno.EROFS, errno.EPERM])
def test_folder_without_permission_is_a_user_error(code: int, zoo: Zoo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Path.mkdir
    out = tmp_path / "work" / "out"

    def mkdir(path: Path, *args: Any, **kwargs: Any) -> None:
        if path.name.startswith(".out."):
            raise OSError(code, os.strerror(code), str(path))
        real(path, *args, **kwargs)

    monkeypatch.setattr(Path, "mkdir", mkdir)
    assert_fails(zoo, out, UserError, f"{out}: cannot be written", os.strerror(code))


def test_lock_that_cannot_be_made_leaves_no_folder(zoo: Zoo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Path.open

    def opened(path: Path, *args: Any, **kwargs: Any) -> Any:
        if path.name == LOCK:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(path, *args, **kwargs)

    monkeypatch.setattr(Path, "open", opened)
    out = tmp_path / "work" / "out"
    assert_fails(zoo, out, RunError, f"{out}: the disk is full")


def test_path_below_a_file_is_a_user_error(zoo: Zoo, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match="cannot be written") as caught:
        save_merge(zoo, tmp_path / "file" / "out")
    assert str(tmp_path / "file" / "out") in str(caught.value)
    assert names_in(tmp_path) == ["file"]


def test_name_that_no_disk_takes_is_a_user_error(zoo: Zoo, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="File name too long"):
        save_merge(zoo, tmp_path / ("x" * 250))
    assert names_in(tmp_path) == []


@pytest.mark.parametrize("workers", [1, 2])
def test_error_in_the_merge_leaves_nothing(zoo: Zoo, tmp_path: Path, workers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "TASK_ELEMENTS", 200)
    tensors = {name: zoo[2].tensor(name).clone() for name in zoo[2].names()}
    tensors["layers.1.proj.weight"][20, 5] = float("nan")
    broken = [*zoo[:2], SafetensorsCheckpoint(write_single(tmp_path / "broken", tensors)), zoo[3]]
    out = tmp_path / "work" / "out"
    words = ("model2", "tensor 'layers.1.proj.weight'", "element 745")
    assert_fails(zoo, out, MergeError, *words, checkpoint=merge_of(broken), workers=workers)


class _Odd(TensorsCheckpoint):
    """Does something of its own when the tensor 'bad' is read."""

    def __init__(self, act: Callable[[], None]) -> None:
        super().__init__({f"{n}": torch.full((1000,), float(n)) for n in range(8)} | {"bad": torch.zeros(1000)})
        self._act = act

    def read(self, name: str, start: int = 0, stop: int | None = None, out: torch.Tensor | None = None) -> torch.Tensor:
        if name == "bad":
            self._act()
        return super().read(name, start, stop, out)


def bug() -> None:
    raise ZeroDivisionError("a bug")


@pytest.mark.parametrize("workers", [1, 2])
def test_bug_in_the_merge_leaves_nothing_and_is_not_dressed_up(tmp_path: Path, workers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "TASK_ELEMENTS", 200)
    odd = _Odd(bug)
    odd.__dict__["identity"] = "0" * 64  # hashing would read
    with pytest.raises(ZeroDivisionError, match="a bug"):
        save(odd, tmp_path / "out", workers=workers)
    assert names_in(tmp_path) == []


def test_worker_that_dies_leaves_what_was_finished_for_the_next_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the message says; the output is far too small for the journal to be written before its end."""
    monkeypatch.setattr(plan, "TASK_ELEMENTS", 200)
    monkeypatch.setattr(staging, "_PATIENCE", 2)
    act = [lambda: os.kill(os.getpid(), signal.SIGKILL)]
    odd = _Odd(lambda: act[0]())
    odd.__dict__["identity"] = "0" * 64
    with pytest.raises(WorkerDiedError, match=r"fewer --workers; the finished part is kept") as caught:
        save(odd, tmp_path / "out", workers=2)
    assert caught.value.exit_code == 1
    [left] = names_in(tmp_path)
    assert left.startswith(".out.")
    act[0] = lambda: None
    report = save(odd, tmp_path / "out", workers=1)
    assert 0 < report.resumed_bytes < report.bytes
    save(odd, tmp_path / "afresh" / "out", workers=1)
    assert contents(tmp_path / "out") == contents(tmp_path / "afresh" / "out")
    assert names_in(tmp_path) == ["afresh", "out"]


@forked
def test_workers_die_with_their_parent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the parent is killed, not the group: nobody writes on into a folder that the next run continues."""
    monkeypatch.setattr(plan, "TASK_ELEMENTS", 200)
    read, write = os.pipe()

    def parent() -> None:
        os.close(read)
        victim = os.getpid()

        def kill_parent() -> None:
            assert os.getpid() != victim
            os.kill(victim, signal.SIGKILL)
            signal.pause()

        odd = _Odd(kill_parent)
        odd.__dict__["identity"] = "0" * 64
        save(odd, tmp_path / "out", workers=2)

    assert run_in_child(parent) == -signal.SIGKILL
    os.close(write)
    with os.fdopen(read, "rb") as stream:
        assert stream.read() == b"", "the end of the pipe comes when the last worker is gone"
