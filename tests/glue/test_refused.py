"""What `glue` refuses: one message that names the place and the remedy, the right exit code, and nothing left outside the run folder."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import sqlite3
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file, save_file

from modelglue.cli.app import main
from modelglue.glue import glue
from tests.glue.conftest import state, stored
from tests.glue_runs import assert_no_half_model, computed_items, fingerprint
from tests.small_zoo import write_pair_zoo, write_yaml


@pytest.fixture(scope="module")
def healthy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A zoo that is glued in a second or two."""
    return write_pair_zoo(tmp_path_factory.mktemp("refused") / "zoo", ["reverse", "double"], items=4).parent


@pytest.fixture
def zoo(healthy: Path, tmp_path: Path) -> Path:
    """A copy of it to spoil."""
    return Path(shutil.copytree(healthy, tmp_path / "zoo"))


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    """`modelglue glue` in this process: exit code and message."""

    def call(*tokens: str | Path) -> tuple[int, str]:
        capsys.readouterr()
        try:
            main(["glue", *map(str, tokens), "--quiet"])
        except SystemExit as end:
            code = int(end.code or 0)
        else:
            code = 0
        return code, capsys.readouterr().err

    return call


Call = Callable[..., tuple[int, str]]


def refused(call: Call, zoo: Path, *tokens: str | Path, code: int = 2, run_remains: bool = False) -> str:
    """The message of a run that must fail. Only the run folder may be new, and only if the run had begun."""
    run = zoo.parent / "run"
    before = outside(run)
    found, message = call(*(tokens or (zoo / "zoo.yaml", run)))
    assert found == code, message
    assert message.startswith("error: ")
    assert "Traceback" not in message
    assert outside(run) == before
    assert run.exists() == run_remains
    return message.removeprefix("error: ").removesuffix("\n")


def outside(run: Path) -> Mapping[str, Any]:
    """Everything in the test's folder but the run."""
    return {name: content for name, content in state(run.parent).items() if name.split("/")[0] != run.name}


def change(zoo: Path, /, **groups: Any) -> None:
    """Replace or add groups at the top of zoo.yaml."""
    value = yaml.safe_load((zoo / "zoo.yaml").read_text())
    write_yaml(zoo / "zoo.yaml", {**value, **groups})


def line_of(zoo: Path, text: str) -> int:
    lines = (zoo / "zoo.yaml").read_text().splitlines()
    return next(number for number, line in enumerate(lines, 1) if text in line)


# -- the glue file ----------------------------------------------------------------------------------------------------------------


def test_a_missing_glue_file(call: Call, zoo: Path) -> None:
    message = refused(call, zoo, zoo / "zo.yaml", zoo.parent / "run")
    assert message == f"{zoo}/zo.yaml: cannot be read (No such file or directory). Did you mean 'zoo.yaml'? Give the path of a YAML file."


def test_a_glue_file_that_is_no_yaml(call: Call, zoo: Path) -> None:
    (zoo / "zoo.yaml").write_text("format: modelglue/1\nzoo: [\n")
    assert refused(call, zoo).startswith(f"{zoo}/zoo.yaml:3: is not valid YAML")


SPOILED: dict[str, tuple[dict[str, Any], str, str]] = {
    "misspelt key": ({"clutser": {"threshold": 0.9}}, "clutser", "clutser: unknown key. Did you mean 'cluster'"),
    "misspelt inner key": ({"cluster": {"treshold": 0.9}}, "treshold", "cluster.treshold: unknown key. Did you mean 'threshold'?"),
    "unknown strategy": ({"select": {"strategy": "averge"}}, "averge", "select.strategy: is 'averge', allowed is 'average', 'coefficient'"),
    "unknown method": ({"select": {"method": "ties"}}, "method", "select.method: unknown key."),
    "coefficient": ({"select": {"coefficients": [0.5, 1.5]}}, "1.5", "select.coefficients[1]: is 1.5, allowed is a number < 1."),
    "threshold": ({"cluster": {"threshold": 1}}, "threshold", "cluster.threshold: is 1, allowed is a number < 1."),
    "one expert": ({"mixture": {"max_experts": 1}}, "max_experts", "mixture.max_experts: is 1, allowed is a number >= 2."),
    "span": ({"router": {"route_span": "last"}}, "route_span", "router.route_span: "),
    "encoder": ({"router": {"encoder": "revers"}}, "format", "router.encoder is 'revers', allowed are"),
    "no tasks": ({"tasks": {"include": "tasks", "proxy": []}}, "proxy", "tasks.proxy: holds 0 items, allowed are 1 or more."),
    "format": ({"format": "modelglue/9"}, "format", "format: is 'modelglue/9', allowed is 'modelglue/1'."),
}  # fmt: skip


@pytest.mark.parametrize("what", SPOILED)
def test_settings(call: Call, zoo: Path, what: str) -> None:
    groups, line, expected = SPOILED[what]
    change(zoo, **groups)
    message = refused(call, zoo)
    assert message.startswith(f"{zoo}/zoo.yaml:{line_of(zoo, line)}: ")
    assert expected in message


@pytest.mark.parametrize("alias", ["mixture", "family-0", "family-12"])
def test_aliases_of_results(call: Call, zoo: Path, alias: str) -> None:
    """A model with the name of a result could not be told from it."""
    change(zoo, zoo={"models": [{"id": "models/reverse", "alias": alias}, {"id": "models/stranger"}]})
    assert f"the alias '{alias}' (of id 'models/reverse') is what a result is called; give the model another alias" in refused(call, zoo)


def test_one_alias_twice(call: Call, zoo: Path) -> None:
    change(zoo, zoo={"models": [{"id": "models/reverse"}, {"id": "models/stranger", "alias": "reverse"}]})
    assert "two models have the alias 'reverse' (ids 'models/reverse' and 'models/stranger')" in refused(call, zoo)


# -- models -----------------------------------------------------------------------------------------------------------------------


def test_a_missing_model(call: Call, zoo: Path) -> None:
    change(zoo, zoo={"models": [{"id": "models/revers"}]})
    message = refused(call, zoo)
    assert message.startswith(f"'models/revers': no such file or folder (looked at {zoo}/models/revers). Did you mean 'reverse'")


def test_what_is_not_supported_yet(call: Call, zoo: Path) -> None:
    change(zoo, zoo={"models": [{"id": "models/reverse", "dtype": "float16"}]})
    assert refused(call, zoo).startswith("zoo model 'reverse': dtype is not supported yet.")


def test_a_missing_adapter(call: Call, zoo: Path) -> None:
    change(zoo, zoo={"models": [{"id": "models/reverse", "adapter": "models/rev"}]})
    assert refused(call, zoo).startswith(f"'models/rev': no such file or folder (looked at {zoo}/models/rev). Did you mean 'reverse'")


def test_an_encoder_with_an_adapter(call: Call, zoo: Path) -> None:
    change(zoo, zoo={"models": [{"id": "models/reverse", "adapter": "models/rev"}]}, router={"encoder": "reverse"})
    assert "router.encoder is 'reverse', which has an adapter; allowed are models that stand in one folder" in refused(call, zoo)


BEYOND = json.dumps({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}).encode()
HOSTILE = {
    "a header of exabytes": (2**60).to_bytes(8, "little") + b"{}",
    "cut off": b"\x10",
    "not JSON": (8).to_bytes(8, "little") + b"{{{{{{{{",
    "beyond its end": len(BEYOND).to_bytes(8, "little") + BEYOND,
}


@pytest.mark.parametrize("what", HOSTILE)
def test_hostile_weights(call: Call, zoo: Path, what: str) -> None:
    path = zoo / "models" / "stranger" / "model.safetensors"
    path.write_bytes(HOSTILE[what])
    assert refused(call, zoo).startswith(f"{path}: ")


@pytest.mark.parametrize("model", ["stranger", "base", "reverse-b"])
@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_values_that_are_no_numbers(call: Call, zoo: Path, model: str, value: float) -> None:
    """In any tensor of any model, whether similarity looks at it or not; found before anything is scored."""
    name = {
        "stranger": "gpt_neox.embed_in.weight",
        "base": "model.embed_tokens.weight",
        "reverse-b": "model.layers.0.mlp.up_proj.weight",
    }[model]
    path = zoo / "models" / model / "model.safetensors"
    weights = load_file(path)
    weights[name][3, 5] = value
    save_file(weights, path, metadata={"format": "pt"})
    message = refused(call, zoo, run_remains=True)
    assert message == (
        f"SafetensorsCheckpoint('models/{model}'): tensor '{name}' holds values that are NaN or infinite. "
        "Leave the model out, or restore its weights."
    )
    assert stored(zoo.parent / "run") == (0, 0)


def test_shapes_that_differ_from_the_config(call: Call, zoo: Path) -> None:
    path = zoo / "models" / "stranger" / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "intermediate_size": config["intermediate_size"] + 8}))
    message = refused(call, zoo)
    assert message.startswith("SafetensorsCheckpoint('models/stranger'): tensor 'gpt_neox.layers.0.mlp.")
    assert "with this config needs" in message


def test_a_missing_tensor(call: Call, zoo: Path) -> None:
    path = zoo / "models" / "reverse-b" / "model.safetensors"
    weights = load_file(path)
    del weights["model.norm.weight"]
    save_file(weights, path, metadata={"format": "pt"})
    assert refused(call, zoo).startswith("SafetensorsCheckpoint('models/reverse-b'): holds no values for 'model.norm.weight'")


def test_a_model_without_tokenizer(call: Call, zoo: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (zoo / "models" / "stranger" / name).unlink()
    assert refused(call, zoo).startswith("SafetensorsCheckpoint('models/stranger'): has no tokenizer (tokenizer.json or tokenizer.model)")


# -- tasks ------------------------------------------------------------------------------------------------------------------------


def test_a_missing_task(call: Call, zoo: Path) -> None:
    change(zoo, tasks={"include": "tasks", "proxy": ["reverse_proxie"]})
    message = refused(call, zoo)
    assert message.startswith(f"task 'reverse_proxie': no YAML file in {zoo}/tasks defines it, and it is no task of the harness.")
    assert "Did you mean 'reverse_proxy'" in message


def test_a_missing_folder_of_tasks(call: Call, zoo: Path) -> None:
    change(zoo, tasks={"include": "taks", "proxy": ["reverse_proxy"]})
    assert refused(call, zoo).startswith(f"{zoo}/taks: no such folder; tasks.include names a folder with task YAML files.")


def test_missing_data(call: Call, zoo: Path) -> None:
    (zoo / "tasks" / "data" / "double" / "test.jsonl").unlink()
    message = refused(call, zoo)
    assert message.startswith(f"task 'double_test' ({zoo}/tasks/double_test.yaml): cannot be loaded: Unable to find")
    assert f"'{zoo}/tasks/data/double/test.jsonl'" in message


def test_sets_that_share_items(call: Call, zoo: Path) -> None:
    data = zoo / "tasks" / "data" / "double"
    with (data / "test.jsonl").open("a") as stream:
        stream.write((data / "proxy.jsonl").read_text().splitlines(keepends=True)[1])
    message = refused(call, zoo)
    assert message.startswith("tasks: test and proxy share 1 items (one of them is ")
    assert "of 'double': 'double: " in message


def test_sets_of_different_skills(call: Call, zoo: Path) -> None:
    change(zoo, tasks={"include": "tasks", "proxy": ["reverse_proxy", "double_proxy"], "test": ["reverse_test"]})
    assert refused(call, zoo).startswith("tasks.test covers reverse, tasks.proxy covers reverse, double. Give the same skills in every set")


def test_an_expert_without_prompts(call: Call, zoo: Path) -> None:
    """It is best at nothing, so no task lends it prompts; known only when everybody has been measured."""
    change(zoo, tasks={"include": "tasks", "proxy": ["double_proxy"]}, mixture={"keep": "all"})
    message = refused(call, zoo, run_remains=True)
    assert message.startswith(
        "expert of reverse, reverse-b: no router prompts. Give the models prompts: {positive: [...]} or a domain: tag."
    )


def test_a_layer_that_the_encoder_does_not_have(call: Call, zoo: Path) -> None:
    change(zoo, router={"router_layer": 99})
    assert "router_layer is 99, the encoder has 8 layers; allowed is 0 to 7." in refused(call, zoo, run_remains=True)
    assert not (zoo.parent / "run" / "mixture").exists()


# -- the run folder ---------------------------------------------------------------------------------------------------------------


def test_a_folder_that_is_no_run(call: Call, zoo: Path) -> None:
    """It is never touched, with --overwrite neither."""
    other = zoo.parent / "mine"
    other.mkdir()
    (other / "thesis.txt").write_text("years of work")
    for options in ([], ["--overwrite"]):
        message = refused(call, zoo, zoo / "zoo.yaml", other, *options)
        assert message == (
            f"{other}: the folder exists and holds no modelglue run (run.json is missing). Choose a new path; it will not be overwritten."
        )


def test_a_file_in_place_of_the_folder(call: Call, zoo: Path) -> None:
    (zoo.parent / "file").write_text("text")
    message = refused(call, zoo, zoo / "zoo.yaml", zoo.parent / "file")
    assert message == f"{zoo.parent}/file: is a file; a run needs a folder. Choose another path."
    message = refused(call, zoo, zoo / "zoo.yaml", zoo.parent / "file" / "run")
    assert message == f"{zoo.parent}/file/run: cannot be written (Not a directory). Choose a folder you may write to."


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_may_not_be_written(call: Call, zoo: Path) -> None:
    locked = zoo.parent / "locked"
    locked.mkdir(mode=0o500)
    message = refused(call, zoo, zoo / "zoo.yaml", locked / "run")
    assert message == f"{locked}/run: cannot be written (Permission denied). Choose a folder you may write to."


def test_a_disk_that_may_not_be_written(call: Call, zoo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mkdir = Path.mkdir

    def refuse(path: Path, *arguments: Any, **options: Any) -> None:
        if path.name == "run":
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))
        mkdir(path, *arguments, **options)

    monkeypatch.setattr(Path, "mkdir", refuse)
    assert refused(call, zoo) == f"{zoo.parent}/run: cannot be written (Read-only file system). Choose a folder you may write to."


def test_a_run_of_other_settings(call: Call, zoo: Path) -> None:
    """Settings, models and tasks are inputs; with --overwrite the folder starts afresh, and what has been scored is not scored again."""
    run = zoo.parent / "run"
    change(zoo, select={"strategy": "average"})
    glue(zoo / "zoo.yaml", run)
    first, before = fingerprint(run), state(run)
    (run / "left-over.txt").write_text("of the earlier run")
    change(zoo, select={"strategy": "coefficient", "coefficients": [0.25]})
    message = refused(call, zoo, run_remains=True)
    assert message.startswith(f"{run}: holds a run of other inputs or settings (key ")
    assert message.endswith("Choose another folder, or pass --overwrite to start afresh in this one; scores that still fit are kept.")
    (run / "left-over.txt").unlink()
    assert {name: content for name, (_, content) in state(run).items()} == {name: content for name, (_, content) in before.items()}

    stored_before = stored(run)[1]
    (run / "left-over.txt").write_text("of the earlier run")
    assert call(zoo / "zoo.yaml", run, "--overwrite") == (0, "")
    assert not (run / "left-over.txt").exists()
    assert fingerprint(run) != first
    glue(zoo / "zoo.yaml", zoo.parent / "fresh")
    assert fingerprint(run) == fingerprint(zoo.parent / "fresh")
    scored = computed_items(run)[0]
    assert 0 < scored < computed_items(zoo.parent / "fresh")[0]
    assert stored(run)[1] == stored_before + scored
    assert call(zoo / "zoo.yaml", run, "--overwrite") == (0, "")  # the same inputs: nothing is thrown away
    assert fingerprint(run) == fingerprint(zoo.parent / "fresh")


def test_a_kill_in_the_first_write_does_not_lock_the_folder(zoo: Path) -> None:
    run = zoo.parent / "run"
    run.mkdir()
    for name in (".run.json.1234.partial", ".zoo.json.1234.partial"):
        (run / name).write_text('{"format": "model')
    glue(zoo / "zoo.yaml", run)
    assert [path.name for path in run.iterdir() if path.name.endswith(".partial")] == []
    assert (run / "decisions.json").is_file()


def test_delta_without_a_base(call: Call, zoo: Path) -> None:
    value = yaml.safe_load((zoo / "zoo.yaml").read_text())
    change(zoo, zoo={key: setting for key, setting in value["zoo"].items() if key != "base"}, similarity={"delta": True})
    assert "similarity.delta subtracts the base, and the zoo has none" in refused(call, zoo)


def swap_a_model(zoo: Path) -> None:
    shutil.copy(zoo / "models" / "base" / "model.safetensors", zoo / "models" / "reverse-b")


def drop_an_item(zoo: Path) -> None:
    path = zoo / "tasks" / "data" / "double" / "test.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[1:]))


@pytest.mark.parametrize("spoil", [swap_a_model, drop_an_item])
def test_other_models_or_items_are_another_run(call: Call, zoo: Path, spoil: Callable[[Path], None]) -> None:
    run = zoo.parent / "run"
    with pytest.raises(KeyboardInterrupt):
        glue(zoo / "zoo.yaml", run, listener=interrupted)
    spoil(zoo)
    assert refused(call, zoo, run_remains=True).startswith(f"{run}: holds a run of other inputs or settings (key ")


def test_two_runs_at_once_in_one_folder(call: Call, zoo: Path) -> None:
    run = zoo.parent / "run"
    run.mkdir()
    with (run / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        message = refused(call, zoo, run_remains=True)
    assert message == f"{run}: another process is running here. Wait for it, or choose another folder."
    assert [path.name for path in run.iterdir()] == [".lock"]


@pytest.mark.parametrize("name", ["families.json", "zoo.json"])
def test_a_file_of_the_run_that_somebody_spoiled(call: Call, zoo: Path, name: str) -> None:
    run = zoo.parent / "run"
    with pytest.raises(KeyboardInterrupt):
        glue(zoo / "zoo.yaml", run, listener=interrupted)
    (run / name).write_text("{")
    assert refused(call, zoo, run_remains=True).startswith(f"{run}/{name}: is not JSON any more")
    (run / name).unlink()
    assert call(zoo / "zoo.yaml", run) == (0, "")


def interrupted(event: str, fields: Mapping[str, Any]) -> None:
    if fields.get("name") == "ranking":
        raise KeyboardInterrupt


# -- no room ----------------------------------------------------------------------------------------------------------------------


def test_a_disk_that_is_full_while_a_model_is_written(call: Call, zoo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was scored stays; with room the run goes on from there, and ends as any other."""
    run = zoo.parent / "run"
    with monkeypatch.context() as patch:
        pwrite, calls = os.pwrite, iter(range(1000))

        def full(*arguments: Any) -> int:
            if next(calls) == 5:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return pwrite(*arguments)

        patch.setattr(os, "pwrite", full)
        message = refused(call, zoo, code=1, run_remains=True)
    assert message.startswith(
        f"{run}/representatives/family-0: the disk is full (No space left on device). Free some space and run it again"
    )
    assert list((run / "representatives").iterdir()) == []
    scored = stored(run)
    assert scored[1] > 0
    assert call(zoo / "zoo.yaml", run) == (0, "")
    assert_no_half_model(run)
    glue(zoo / "zoo.yaml", zoo.parent / "fresh")
    assert fingerprint(run) == fingerprint(zoo.parent / "fresh")


def test_a_disk_that_is_full_while_scores_are_written(call: Call, zoo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = zoo.parent / "run"
    connect = sqlite3.connect

    def small(path: str, **options: Any) -> sqlite3.Connection:
        connection = connect(path, **options)
        connection.execute("PRAGMA max_page_count = 5")
        return connection

    with monkeypatch.context() as patch:
        patch.setattr(sqlite3, "connect", small)
        message = refused(call, zoo, code=1, run_remains=True)
    assert message.startswith(f"{run}/scores.sqlite: scores cannot be written (database or disk is full). Free some space and run it again")
    assert call(zoo / "zoo.yaml", run) == (0, "")


def test_a_disk_that_is_full_while_a_file_of_the_run_is_written(call: Call, zoo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = zoo.parent / "run"
    replace = Path.replace

    def full(path: Path, target: Path) -> Path:
        if Path(target).name == "families.json":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return replace(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", full)
        message = refused(call, zoo, code=1, run_remains=True)
    assert message.startswith(f"{run}/families.json: the disk is full")
    assert sorted(path.name for path in run.iterdir() if path.name.endswith("partial")) == []


def test_out_of_memory(call: Call, zoo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def exhausted(*_: Any, **__: Any) -> None:
        raise MemoryError

    monkeypatch.setattr("modelglue.evaluation.resident.load_live", exhausted)
    assert "out of memory" in refused(call, zoo, code=1, run_remains=True)
