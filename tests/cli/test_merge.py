"""`modelglue merge`: what it writes and prints, and that whatever goes wrong is said in one message and leaves nothing behind."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from modelglue.cli.app import main
from modelglue.methods import all_methods, get
from tests.cli.conftest import Run, tree
from tests.recipe.on_disk import write_model, write_recipe, write_tokenizer
from tests.zoo.models import tensors

NAME = "model.layers.1.mlp.up_proj.weight"
#: a worker that is forked has what a test put in place of the system's calls
FORKED = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="workers are forked on Linux only")


def refused(run: Run, zoo: Path, *tokens: str | Path, code: int = 2) -> str:
    """Run a merge that must fail: one message, no traceback, and nothing that was not there before. The message."""
    before = tree(zoo.parent)
    found = run("merge", *(tokens or (zoo / "recipe.yaml", zoo / "out")))
    assert found.code == code
    assert found.out == ""
    assert found.err.startswith("error: ")
    assert "Traceback" not in found.err
    assert tree(zoo.parent) == before
    return found.err.removeprefix("error: ").removesuffix("\n")


# -- what it writes and prints ----------------------------------------------------------------------------------------------------


def test_writes_the_merge_and_says_so(run: Run, zoo: Path) -> None:
    found = run("merge", zoo / "recipe.yaml", zoo / "out")
    assert (found.code, found.out) == (0, "")
    assert found.err.startswith(f"{zoo}/out: 14 tensors, 1.9 kB (")
    assert found.err.endswith(" s)\n")
    written = load_file(zoo / "out" / "model.safetensors")
    base, a, b = (tensors(seed) for seed in range(3))
    assert set(written) == set(base)
    for name, value in written.items():
        expected = base[name].double() + 0.5 * (a[name].double() - base[name]) + 0.25 * (b[name].double() - base[name])
        torch.testing.assert_close(value.double(), expected, rtol=1e-6, atol=1e-6)
    assert json.loads((zoo / "out" / "config.json").read_text()) == json.loads((zoo / "base" / "config.json").read_text())
    assert (zoo / "out" / "tokenizer.json").read_bytes() == (zoo / "base" / "tokenizer.json").read_bytes()


def test_json(run: Run, zoo: Path) -> None:
    found = run("merge", zoo / "recipe.yaml", zoo / "out", "--json")
    assert found.err == ""
    assert json.loads(found.out) == {
        "directory": str(zoo / "out"), "tensors": 14, "bytes": 1920, "shards": 1, "resumed_bytes": 0, "already_complete": False,
        "warnings": [],
    }  # fmt: skip
    assert json.loads(run("merge", zoo / "recipe.yaml", zoo / "out", "--json").out)["already_complete"] is True


def test_quiet(run: Run, zoo: Path) -> None:
    assert run("merge", zoo / "recipe.yaml", zoo / "out", "--quiet") == (type(run("--version")))(0, "", "")
    assert (zoo / "out" / "model.safetensors").is_file()


def test_a_finished_output_is_left_alone(run: Run, zoo: Path) -> None:
    run("merge", zoo / "recipe.yaml", zoo / "out")
    stamps = {path: path.stat().st_mtime_ns for path in (zoo / "out").iterdir()}
    found = run("merge", zoo / "recipe.yaml", zoo / "out")
    assert found.code == 0
    assert found.err == f"{zoo}/out: 14 tensors, 1.9 kB (already complete)\n"
    assert {path: path.stat().st_mtime_ns for path in (zoo / "out").iterdir()} == stamps


def test_shards(run: Run, zoo: Path) -> None:
    found = run("merge", zoo / "recipe.yaml", zoo / "out", "--shard-size", "0.5kB", "--json")
    shards = json.loads(found.out)["shards"]
    files = sorted(path.name for path in (zoo / "out").glob("*.safetensors"))
    assert files == [f"model-{n:05d}-of-{shards:05d}.safetensors" for n in range(1, shards + 1)]
    assert shards == 5
    index = json.loads((zoo / "out" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 1920
    merged = {name: value for file in files for name, value in load_file(zoo / "out" / file).items()}
    run("merge", zoo / "recipe.yaml", zoo / "whole", "--quiet")
    whole = load_file(zoo / "whole" / "model.safetensors")
    assert set(merged) == set(whole) == set(index["weight_map"])
    assert all(torch.equal(merged[name], whole[name]) for name in whole)


def test_configs_that_differ_are_warned_of(run: Run, zoo: Path) -> None:
    shutil.rmtree(zoo / "b")
    write_model(zoo / "b", 2, hidden_act="gelu")
    warning = "b has hidden_act = gelu, base has silu; the output takes the first one's."
    found = run("merge", zoo / "recipe.yaml", zoo / "out")
    assert found.code == 0
    assert found.err.startswith(f"warning: {warning}\n{zoo}/out: 14 tensors")
    found = run("merge", zoo / "recipe.yaml", zoo / "out2", "--json")
    assert json.loads(found.out)["warnings"] == [warning]
    assert run("merge", zoo / "recipe.yaml", zoo / "out3", "--quiet").err == ""


def test_names_that_look_like_markup(run: Run, zoo: Path) -> None:
    (zoo / "[red]").mkdir()
    (zoo / "a").rename(zoo / "[red]" / "a")
    write_recipe(zoo / "r.yaml", "method: linear\nmodels:\n  - {model: '[red]/a', weight: 1}\n")
    found = run("merge", zoo / "r.yaml", zoo / "[bold]x[" / "out]")
    assert found.err.startswith(f"{zoo}/[bold]x[/out]: 14 tensors")
    assert (zoo / "[bold]x[" / "out]" / "model.safetensors").is_file()


def test_a_nested_recipe_from_another_folder(run: Run, zoo: Path, tmp_path: Path) -> None:
    text = """\
method: linear
models:
  - model: {method: slerp, base: ../zoo/base, models: [{model: ../zoo/a}], parameters: {t: 0.5}}
    weight: 1
  - {model: ../zoo/half, weight: 1}
dtype: {store: bfloat16}
"""
    path = write_recipe(tmp_path / "recipes" / "r.yaml", text)
    assert run("merge", path, tmp_path / "deep" / "down" / "out", "--quiet").code == 0
    assert load_file(tmp_path / "deep" / "down" / "out" / "model.safetensors")[NAME].dtype == torch.bfloat16


def test_an_outputs_recipe_gives_the_same_bytes_beside_it(run: Run, zoo: Path, tmp_path: Path) -> None:
    """Its references are taken from where it stands, wherever the first recipe stood."""
    assert run("merge", zoo / "recipe.yaml", tmp_path / "deep" / "down" / "out", "--quiet").code == 0
    recipe = (tmp_path / "deep" / "down" / "out" / "modelglue_recipe.yaml").read_text()
    assert "base: ../../../zoo/base\n" in recipe
    assert run("merge", tmp_path / "deep" / "down" / "out" / "modelglue_recipe.yaml", tmp_path / "deep" / "down" / "again").code == 0
    assert tree(tmp_path / "deep" / "down" / "again") == tree(tmp_path / "deep" / "down" / "out")
    assert "Paths in it are seen from this folder" in (tmp_path / "deep" / "down" / "again" / "README.md").read_text()


def test_an_output_on_an_input(run: Run, zoo: Path) -> None:
    message = refused(run, zoo, zoo / "recipe.yaml", zoo / "a", "--overwrite")
    assert message == f"{zoo}/a: is the model 'a' ({zoo}/a), which is read here. Choose another path."


def test_mergekits_dialect(run: Run, zoo: Path) -> None:
    write_recipe(
        zoo / "r.yaml",
        "merge_method: task_arithmetic\nbase_model: base\nmodels:\n  - model: base\n"
        "  - model: a\n    parameters: {weight: 0.5}\n  - model: b\n    parameters: {weight: 0.25}\n",
    )
    run("merge", zoo / "r.yaml", zoo / "theirs" / "out", "--quiet")
    run("merge", zoo / "recipe.yaml", zoo / "ours" / "out", "--quiet")
    assert tree(zoo / "theirs") == tree(zoo / "ours")


@pytest.mark.parametrize("method", [method.id for method in all_methods()])
def test_the_committed_models_merge_by_every_method(run: Run, tiny_zoo: Path, tmp_path: Path, method: str) -> None:
    models = tiny_zoo / "models"
    found = get(method)
    each = ", weight: 1" if any(parameter.name == "weight" and parameter.per_model for parameter in found.parameters) else ""
    names = ["sort", "reverse"][: found.max_models]
    text = f"method: {method}\nbase: {models}/base\nmodels:\n" + "".join(f"  - {{model: {models}/{name}{each}}}\n" for name in names)
    needed = [parameter.name for parameter in found.parameters if parameter.required and not parameter.per_model]
    path = write_recipe(tmp_path / "r.yaml", text + (f"parameters: {{{needed[0]}: 0.5}}\n" if needed else ""))
    before = tree(models / "sort")
    assert run("merge", path, tmp_path / "out", "--quiet").code == 0
    merged, base = (load_file(folder / "model.safetensors") for folder in (tmp_path / "out", models / "base"))
    assert {name: (value.shape, value.dtype) for name, value in merged.items()} == {n: (v.shape, v.dtype) for n, v in base.items()}
    assert any(not torch.equal(merged[name], base[name]) for name in base)
    assert tree(models / "sort") == before


# -- the recipe -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("method: linaer\nmodels:\n  - {model: a, weight: 1}\n", "recipe.yaml:1: method: there is no merge method 'linaer'."),
        ("method: linear\nmodles:\n  - {model: a, weight: 1}\n", "recipe.yaml:2: modles: unknown key. Did you mean "),
        ("method: linear\nmodels:\n  - model: a\n    wieght: 1\n", "recipe.yaml:4: models[0].wieght: model a: 'wieght' is no parameter"),
        ("method: linear\nmodels: [\n", "recipe.yaml:3: is not valid YAML"),
        ("", "recipe.yaml: is empty, allowed is a mapping"),
        ("method: ties\nmodels:\n  - {model: a, weight: 1}\n", "recipe.yaml:1: ties needs a base model"),
        ("merge_method: linear\nslices: []\nmodels: []\n", "recipe.yaml:3: models: is empty; a recipe says in one of models"),
    ],
)  # fmt: skip
def test_a_bad_recipe(run: Run, zoo: Path, text: str, expected: str) -> None:
    write_recipe(zoo / "recipe.yaml", text)
    assert f"{zoo}/{expected}" in refused(run, zoo)


def test_a_missing_recipe(run: Run, zoo: Path) -> None:
    message = refused(run, zoo, zoo / "recpie.yaml", zoo / "out")
    assert (
        message
        == f"{zoo}/recpie.yaml: cannot be read (No such file or directory). Did you mean 'recipe.yaml'? Give the path of a YAML file."
    )


def test_a_folder_as_recipe(run: Run, zoo: Path) -> None:
    assert refused(run, zoo, zoo / "a", zoo / "out") == f"{zoo}/a: cannot be read (Is a directory). Give the path of a YAML file."


# -- references -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reference", "expected"),
    [
        ("./aa", "'./aa': no such file or folder (looked at {zoo}/aa). Did you mean 'a'?"),
        ("hlaf", "'hlaf': no such file or folder (looked at {zoo}/hlaf). Did you mean 'half'?"),
        ("/no/where/at/all", "'/no/where/at/all': no such file or folder."),
        ("a/model.safetensor", "(looked at {zoo}/a/model.safetensor). Did you mean 'model.safetensors'?"),
        ("a/config.json", "{zoo}/a/config.json: is no file of weights that is known."),
        ("base+a", "{zoo}/a: holds no adapter_config.json, so it is no adapter."),
        ("some-org/some-model", "'some-org/some-model': is no local path, and not in the hub's cache, and the hub cannot be reached."),
        ("some-org/some-model@main", "'some-org/some-model@main': is no local path, and not in the hub's cache"),
        ("some-org/some--model", "'some-org/some--model': is no local path, and no hub id either"),
        ("x" * 300, "no such file or folder"),
    ],
)  # fmt: skip
def test_a_reference_that_leads_nowhere(run: Run, zoo: Path, reference: str, expected: str) -> None:
    write_recipe(zoo / "recipe.yaml", f"method: linear\nmodels:\n  - {{model: a, weight: 1}}\n  - {{model: '{reference}', weight: 1}}\n")
    assert expected.format(zoo=zoo) in refused(run, zoo)


def test_an_adapter_folder(run: Run, zoo: Path) -> None:
    (zoo / "b" / "model.safetensors").rename(zoo / "b" / "adapter_model.safetensors")
    assert refused(run, zoo).startswith(f"{zoo}/b: is an adapter, not a model.")


def test_a_folder_of_pickles(run: Run, zoo: Path) -> None:
    (zoo / "b" / "model.safetensors").unlink()
    torch.save(tensors(2), zoo / "b" / "pytorch_model.bin")
    assert run("merge", zoo / "recipe.yaml", zoo / "out", "--quiet").code == 0
    write_model(zoo / "b2", 2)
    write_recipe(zoo / "r.yaml", (zoo / "recipe.yaml").read_text().replace("model: b", "model: b2"))
    assert run("merge", zoo / "r.yaml", zoo / "safe", "--quiet").code == 0
    assert (zoo / "out" / "model.safetensors").read_bytes() == (zoo / "safe" / "model.safetensors").read_bytes()


def test_a_folder_without_weights(run: Run, zoo: Path) -> None:
    (zoo / "b" / "model.safetensors").unlink()
    assert refused(run, zoo).startswith(f"{zoo}/b: holds no .safetensors file, and no .bin")


# -- hostile and damaged files ----------------------------------------------------------------------------------------------------


def _file(header: Any, data: bytes = b"", *, length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def _one(**changes: Any) -> dict[str, Any]:
    return {"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8], **changes}}


_W = json.dumps(_one()["w"]).encode()
FILES: dict[str, tuple[bytes, str]] = {
    "empty": (b"", ""),
    "seven bytes": (b"1234567", ""),
    "a header longer than the file": (_file(b"{}", length=1000), ""),
    "a header of exabytes": (_file(b"{}", length=2**63), ""),
    "no json": (_file(b"{nonsense"), ""),
    "not utf-8": (_file(b'{"\xff": 1}'), ""),
    "deep json": (_file(b'{"w":' + b"[" * 100_000), ""),
    "a list": (_file([1]), ""),
    "a tensor twice": (_file(b'{"w":%s,"w":%s}' % (_W, _W), b"8" * 8), "'w'"),
    "an entry that is a number": (_file({"w": 3}), "'w'"),
    "no dtype": (_file({"w": {"shape": [2], "data_offsets": [0, 8]}}, b"8" * 8), "'w'"),
    "an unknown dtype": (_file(_one(dtype="F33"), b"8" * 8), "'w'"),
    "a negative shape": (_file(_one(shape=[-2]), b"8" * 8), "'w'"),
    "a shape of text": (_file(_one(shape="2"), b"8" * 8), "'w'"),
    "an overflowing shape": (_file(_one(shape=[2**62, 2**62]), b"8" * 8), "'w'"),
    "offsets beyond the end": (_file(_one(data_offsets=[0, 16]), b"8" * 8), "'w'"),
    "offsets backwards": (_file(_one(data_offsets=[8, 0]), b"8" * 8), "'w'"),
    "a shape that does not fit": (_file(_one(shape=[3]), b"8" * 8), "'w'"),
    "bytes of nobody": (_file(_one(), b"8" * 9), ""),
    "a hole": (_file({**_one(), "v": {"dtype": "F32", "shape": [1], "data_offsets": [12, 16]}}, b"8" * 16), "'v'"),
    "an overlap": (_file({**_one(), "v": {"dtype": "F32", "shape": [2], "data_offsets": [4, 12]}}, b"8" * 12), "'v'"),
}  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_a_hostile_file_is_named(run: Run, zoo: Path, name: str) -> None:
    data, tensor = FILES[name]
    (zoo / "b" / "model.safetensors").write_bytes(data)
    message = refused(run, zoo)
    assert message.startswith(f"{zoo}/b/model.safetensors: ")
    assert tensor in message


@pytest.mark.parametrize("cut", [1, 100, 1919, 1921, 4000])
def test_a_truncated_file_is_named(run: Run, zoo: Path, cut: int) -> None:
    path = zoo / "b" / "model.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[: max(len(data) - cut, 3)])
    assert refused(run, zoo).startswith(f"{path}: ")


def _split(folder: Path) -> dict[str, str]:
    """The model of a folder in two shards with an index."""
    found = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(found)
    weight_map = {}
    for number, part in enumerate((names[:7], names[7:]), 1):
        file = f"model-{number:05d}-of-00002.safetensors"
        save_file({name: found[name] for name in part}, folder / file)
        weight_map.update(dict.fromkeys(part, file))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return weight_map


def test_shards_are_read(run: Run, zoo: Path) -> None:
    run("merge", zoo / "recipe.yaml", zoo / "1" / "out", "--quiet")
    _split(zoo / "b")
    run("merge", zoo / "recipe.yaml", zoo / "2" / "out", "--quiet")
    assert tree(zoo / "1") == tree(zoo / "2")


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda index: "{", "model.safetensors.index.json: "),
        (lambda index: "[]", "model.safetensors.index.json: "),
        (lambda index: {"weight_map": {}}, "model.safetensors.index.json: "),
        (lambda index: {"weight_map": {**index, NAME: 3}}, f"tensor '{NAME}'"),
        (lambda index: {"weight_map": {**index, NAME: "model-00003-of-00002.safetensors"}}, "model-00003-of-00002.safetensors"),
        (lambda index: {"weight_map": {**index, NAME: "../a/model.safetensors"}}, "'../a/model.safetensors'"),
        (lambda index: {"weight_map": {**index, NAME: "/etc/passwd"}}, "'/etc/passwd'"),
        (lambda index: {"weight_map": {**index, NAME: "model-00001-of-00002.safetensors"}}, f"tensor '{NAME}'"),
        (lambda index: {"weight_map": {k: v for k, v in index.items() if k != NAME}}, f"tensor '{NAME}'"),
        (lambda index: {"weight_map": {**index, "ghost": "model-00001-of-00002.safetensors"}}, "tensor 'ghost'"),
    ],
)
def test_a_bad_index_is_named(run: Run, zoo: Path, change: Callable[[Any], Any], expected: str) -> None:
    path = zoo / "b" / "model.safetensors.index.json"
    changed = change(_split(zoo / "b"))
    path.write_text(changed if isinstance(changed, str) else json.dumps(changed))
    message = refused(run, zoo)
    assert str(zoo / "b") in message
    assert expected in message


def test_a_missing_shard_is_named(run: Run, zoo: Path) -> None:
    _split(zoo / "b")
    (zoo / "b" / "model-00002-of-00002.safetensors").unlink()
    assert "model-00002-of-00002.safetensors" in refused(run, zoo)
    (zoo / "b" / "model.safetensors.index.json").unlink()
    assert f"{zoo}/b: " in refused(run, zoo)


def test_a_config_that_is_no_json(run: Run, zoo: Path) -> None:
    (zoo / "b" / "config.json").write_text("{")
    assert refused(run, zoo).startswith(f"{zoo}/b/config.json: is not valid")


# -- models that do not fit -------------------------------------------------------------------------------------------------------


def replace(zoo: Path, name: str, change: Callable[[dict[str, torch.Tensor]], Any], **config: Any) -> None:
    found = load_file(zoo / name / "model.safetensors")
    change(found)
    shutil.rmtree(zoo / name)
    write_model(zoo / name, weights=found, **config)


def test_shapes_that_differ(run: Run, zoo: Path) -> None:
    replace(zoo, "b", lambda found: found.update({NAME: torch.zeros(9, 6)}))
    message = refused(run, zoo)
    assert f"tensor '{NAME}' has shape [9, 6] in b and [10, 6] in base" in message


def test_tensors_that_differ_are_all_named(run: Run, zoo: Path) -> None:
    replace(zoo, "a", lambda found: found.pop(NAME))
    replace(zoo, "b", lambda found: found.update({"extra": torch.zeros(1)}))
    message = refused(run, zoo)
    assert f"tensor '{NAME}' is missing in a" in message
    assert "tensor 'extra' is only in b, not in base" in message


def test_architectures_that_differ(run: Run, zoo: Path) -> None:
    replace(zoo, "b", lambda found: None, architectures=["MistralForCausalLM"])
    assert "b is a MistralForCausalLM and a a LlamaForCausalLM" in refused(run, zoo)


def test_vocabularies_that_differ(run: Run, zoo: Path) -> None:
    write_tokenizer(zoo / "b", {"a": 0, "b": 1})
    found = refused(run, zoo)
    assert "b and base number their tokens differently" in found
    assert "`vocabulary_mismatch: truncate`" in found


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("model", ["base", "a", "b"])
def test_weights_that_are_no_numbers(run: Run, zoo: Path, model: str, value: float) -> None:
    replace(zoo, model, lambda found: found[NAME].view(-1).__setitem__(17, value))
    assert refused(run, zoo).startswith(f"{model}: tensor '{NAME}' holds NaN or infinity near element 17.")


def test_a_result_that_does_not_fit_its_dtype(run: Run, zoo: Path) -> None:
    write_recipe(zoo / "recipe.yaml", "method: linear\nmodels:\n  - {model: a, weight: 1}\ndtype: {store: float16}\n")
    replace(zoo, "a", lambda found: found[NAME].view(-1).__setitem__(0, 1e5))
    assert f"tensor '{NAME}' does not fit float16" in refused(run, zoo)


def test_a_result_that_overflows(run: Run, zoo: Path) -> None:
    write_recipe(zoo / "recipe.yaml", "method: linear\nmodels:\n  - {model: a, weight: 1e38}\nparameters: {normalize: false}\n")
    replace(zoo, "a", lambda found: found[NAME].fill_(100))
    assert f"tensor '{NAME}' comes out with NaN or infinity" in refused(run, zoo)


def test_integer_tensors_that_differ(run: Run, zoo: Path) -> None:
    for number, name in enumerate(("base", "a", "b")):
        replace(zoo, name, lambda found, number=number: found.update({"ids": torch.tensor([1, 2, number // 2])}))
    assert "tensor 'ids' is I64, which cannot be merged, and b differs from a" in refused(run, zoo)


def test_eight_bit_floats(run: Run, zoo: Path) -> None:
    for name in ("base", "a", "b"):
        replace(zoo, name, lambda found: found.update({NAME: found[NAME].to(torch.float8_e4m3fn)}))
    assert f"'{NAME}'" in refused(run, zoo)


# -- the output -------------------------------------------------------------------------------------------------------------------


def test_an_existing_folder_is_kept_unless_told_otherwise(run: Run, zoo: Path) -> None:
    (zoo / "out").mkdir()
    (zoo / "out" / "thesis.tex").write_text("years of work")
    assert refused(run, zoo) == f"{zoo}/out: exists already. Choose another path, or pass --overwrite to replace it."
    assert refused(run, zoo, zoo / "recipe.yaml", zoo / "out", "--overwrite") == (
        f"{zoo}/out: holds 'thesis.tex' and is neither a model nor a mixture nor an adapter, so it is not replaced. "
        "Choose another path, or remove the folder by hand."
    )
    (zoo / "out" / "config.json").write_text("{}")
    assert run("merge", zoo / "recipe.yaml", zoo / "out", "--overwrite", "--quiet").code == 0
    assert sorted(path.name for path in (zoo / "out").iterdir()) == [
        "README.md", "config.json", "model.safetensors", "modelglue_recipe.yaml", "modelglue_record.json", "tokenizer.json",
    ]  # fmt: skip
    assert sorted(path.name for path in zoo.iterdir()) == ["a", "b", "base", "half", "out", "recipe.yaml"]


def test_the_output_of_another_recipe_is_another_folder(run: Run, zoo: Path) -> None:
    run("merge", zoo / "recipe.yaml", zoo / "out", "--quiet")
    write_recipe(zoo / "other.yaml", "method: linear\nmodels:\n  - {model: a, weight: 1}\n")
    assert "exists already" in refused(run, zoo, zoo / "other.yaml", zoo / "out")
    replace(zoo, "b", lambda found: found[NAME].view(-1).__setitem__(0, 2.0))
    assert "exists already" in refused(run, zoo)


def test_an_overwrite_that_fails_keeps_the_old_folder(run: Run, zoo: Path) -> None:
    run("merge", zoo / "recipe.yaml", zoo / "out", "--quiet")
    replace(zoo, "b", lambda found: found[NAME].view(-1).__setitem__(3, float("nan")))
    assert "holds NaN" in refused(run, zoo, zoo / "recipe.yaml", zoo / "out", "--overwrite")


def test_no_room_for_the_output(run: Run, zoo: Path) -> None:
    (zoo / "file").write_text("in the way")
    message = refused(run, zoo, zoo / "recipe.yaml", zoo / "file" / "out")
    assert message.startswith(f"{zoo}/file/out: cannot be written (")
    assert "exists already" in refused(run, zoo, zoo / "recipe.yaml", zoo / "file")


def test_a_folder_that_may_not_be_written(run: Run, zoo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make = Path.mkdir

    def mkdir(self: Path, *arguments: Any, **options: Any) -> None:
        if self.name.endswith(".partial"):
            raise PermissionError(errno.EACCES, "Permission denied", str(self))
        make(self, *arguments, **options)

    monkeypatch.setattr(Path, "mkdir", mkdir)
    assert refused(run, zoo) == f"{zoo}/out: cannot be written (Permission denied). Choose a folder you may write to."


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write and read everything")
def test_real_permissions(run: Run, zoo: Path) -> None:
    zoo.chmod(0o555)
    try:
        assert "cannot be written (Permission denied)" in refused(run, zoo)
    finally:
        zoo.chmod(0o755)
    (zoo / "recipe.yaml").chmod(0)
    found = run("merge", zoo / "recipe.yaml", zoo / "out")
    assert (found.code, "cannot be read (Permission denied)" in found.err) == (2, True)


@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=FORKED)])
@pytest.mark.parametrize(
    ("number", "code", "message"),
    [
        (errno.ENOSPC, 1, "the disk is full ({}). Free some space and run it again; nothing was left behind."),
        (errno.EDQUOT, 1, "the disk is full ({}). Free some space and run it again; nothing was left behind."),
        (errno.EIO, 1, "[Errno 5] {}. Nothing was left behind."),
        (errno.EROFS, 2, "cannot be written ({}). Choose a folder you may write to."),
    ],
)
def test_a_disk_that_fails(
    run: Run, zoo: Path, monkeypatch: pytest.MonkeyPatch, workers: int, number: int, code: int, message: str
) -> None:
    """In this process and in forked workers, which inherit the broken disk."""
    monkeypatch.setattr("modelglue.checkpoint.output.plan.TASK_ELEMENTS", 50)

    def pwrite(descriptor: int, data: Any, offset: int) -> int:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "pwrite", pwrite)
    found = refused(run, zoo, zoo / "recipe.yaml", zoo / "out", "--workers", str(workers), code=code)
    assert found == f"{zoo}/out: {message.format(os.strerror(number))}"


def test_a_disk_that_is_too_small_is_noticed_before_anything_is_written(run: Run, zoo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.statvfs

    def statvfs(path: Any) -> Any:
        found = list(real(path))
        found[4] = 0  # blocks that are free for us
        return os.statvfs_result(found)

    monkeypatch.setattr(os, "statvfs", statvfs)
    write_model(zoo / "larger", weights={"w": torch.ones(200, 200)})
    write_recipe(zoo / "recipe.yaml", "method: linear\nmodels:\n  - {model: larger, weight: 1}\n")
    message = refused(run, zoo, code=1)
    assert "the disk is full: the output needs" in message
    assert message.endswith("nothing was left behind.")


def test_short_writes_are_continued(run: Run, zoo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run("merge", zoo / "recipe.yaml", zoo / "1" / "out", "--quiet")
    real = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda descriptor, data, offset: real(descriptor, data[:7], offset))
    run("merge", zoo / "recipe.yaml", zoo / "2" / "out", "--quiet")
    assert tree(zoo / "1") == tree(zoo / "2")


def test_out_of_memory(run: Run, zoo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def pwrite(descriptor: int, data: Any, offset: int) -> int:
        raise MemoryError("3 GB wanted")

    monkeypatch.setattr(os, "pwrite", pwrite)
    assert refused(run, zoo, code=1) == "out of memory (3 GB wanted). Use fewer --workers, or a smaller batch."


@FORKED
def test_a_worker_that_dies(run: Run, zoo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("modelglue.checkpoint.output.plan.TASK_ELEMENTS", 50)
    monkeypatch.setattr(os, "pwrite", lambda descriptor, data, offset: os.kill(os.getpid(), signal.SIGKILL))
    found = run("merge", zoo / "recipe.yaml", zoo / "out", "--workers", "2")
    expected = "a worker process died, probably for want of memory. Run it again with fewer --workers; the finished part is kept."
    assert (found.code, found.out, found.err) == (1, "", f"error: {expected}\n")
    assert not (zoo / "out").exists()


def test_ctrl_c_keeps_what_was_done_for_the_next_run(run: Run, zoo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run("merge", zoo / "recipe.yaml", zoo / "1" / "out", "--quiet")
    real = os.pwrite

    def pwrite(descriptor: int, data: Any, offset: int) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "pwrite", pwrite)
    found = run("merge", zoo / "recipe.yaml", zoo / "2" / "out")
    assert (found.code, found.out, found.err) == (130, "", "interrupted; run it again to continue\n")
    [left] = (zoo / "2").iterdir()
    assert left.name.startswith(".out.")
    assert left.name.endswith(".partial")
    monkeypatch.setattr(os, "pwrite", real)
    assert run("merge", zoo / "recipe.yaml", zoo / "2" / "out", "--quiet").code == 0
    assert tree(zoo / "1") == tree(zoo / "2")


# -- options ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["", "5", "0GB", "-1GB", "GB", "5 parsecs", "1e9B", "0.5B", "nanGB", "5.5.5MB"])
def test_shard_sizes_that_are_none(run: Run, zoo: Path, text: str) -> None:
    message = refused(run, zoo, zoo / "recipe.yaml", zoo / "out", f"--shard-size={text}")
    assert message == f"--shard-size is '{text}'; allowed is a positive size such as 500MB, 5GB or 2GiB."


@pytest.mark.parametrize("text", ["500MB", "5gb", "0.5 GB", "1B", " 2 KB ", "1TB"])
def test_shard_sizes(run: Run, zoo: Path, text: str) -> None:
    assert run("merge", zoo / "recipe.yaml", zoo / "out", "--shard-size", text, "--quiet").code == 0


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        (("--workers", "0"), 'Invalid value "0" for --workers. Must be >= 1.'),
        (("--workers", "-1"), "--workers"),
        (("--workers", "many"), 'Invalid value for --workers: unable to convert "many" into int.'),
        (("--shrad-size", "1GB"), "Did you mean --shard-size?"),
        (("--no-json",), "--no-json"),
    ],
)
def test_options_that_are_none(run: Run, zoo: Path, tokens: tuple[str, ...], expected: str) -> None:
    before = tree(zoo)
    found = run("merge", zoo / "recipe.yaml", zoo / "out", *tokens)
    assert (found.code, found.out) == (2, "")
    assert expected in " ".join(found.err.replace("│", " ").split())
    assert tree(zoo) == before


def test_the_traceback_is_shown_when_it_is_asked_for(run: Run, zoo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_recipe(zoo / "recipe.yaml", "method: liner\nmodels:\n  - {model: a, weight: 1}\n")
    for tokens in (["merge", "r", "o", "--traceback"], ["--traceback", "merge", "r", "o"]):
        found = run(*[{"r": str(zoo / "recipe.yaml"), "o": str(zoo / "out")}.get(token, token) for token in tokens])
        assert found.code == 2
        assert found.err.startswith("Traceback (most recent call last):\n")
        assert "recipe/read.py" in found.err
        assert found.err.splitlines()[-1].startswith(f"error: {zoo}/recipe.yaml:1: method: there is no merge method 'liner'.")
    monkeypatch.setenv("MODELGLUE_TRACEBACK", "1")
    assert "Traceback" in run("merge", zoo / "recipe.yaml", zoo / "out").err


def test_the_traceback_of_a_system_error_is_the_systems(run: Run, zoo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(source: Any, **_: Any) -> Any:
        raise OSError(errno.EIO, "Input/output error", "/dev/tape")

    monkeypatch.setattr("modelglue.recipe.read_with_models", broken)
    assert refused(run, zoo, code=1) == "/dev/tape: Input/output error."
    found = run("merge", zoo / "recipe.yaml", zoo / "out", "--traceback")
    assert "in broken" in found.err
    assert (found.code, found.err.splitlines()[-1]) == (1, "error: /dev/tape: Input/output error.")


def test_a_bug_is_not_dressed_up(zoo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What nobody foresaw keeps its traceback: it is for us and not for the user to mend."""

    def broken(source: Any, **_: Any) -> Any:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr("modelglue.recipe.read_with_models", broken)
    with pytest.raises(ZeroDivisionError, match="a bug"):
        main(["merge", str(zoo / "recipe.yaml"), str(zoo / "out")])


# -- what the command line overrules, and mergekit's flags --------------------------------------------------------------------------


def recipe_of(folder: Path) -> Any:
    return yaml.safe_load((folder / "modelglue_recipe.yaml").read_text())


def test_a_seed_replaces_the_recipes(run: Run, zoo: Path) -> None:
    write_recipe(zoo / "r.yaml", "method: dare_linear\nbase: base\nmodels:\n  - {model: a, weight: 1, density: 0.5}\nseed: 3\n")
    for name, tokens in (("3", ()), ("3again", ("--seed", "3")), ("4", ("--seed", "4"))):
        assert run("merge", zoo / "r.yaml", zoo / name, "--quiet", *tokens).code == 0
    weights = {name: (zoo / name / "model.safetensors").read_bytes() for name in ("3", "3again", "4")}
    assert weights["3"] == weights["3again"] != weights["4"]
    assert (recipe_of(zoo / "3again")["seed"], recipe_of(zoo / "4")["seed"]) == (3, 4)
    assert run("merge", zoo / "4" / "modelglue_recipe.yaml", zoo / "once more", "--quiet").code == 0
    assert (zoo / "once more" / "model.safetensors").read_bytes() == weights["4"]


def test_models_of_two_classes_only_when_asked(run: Run, zoo: Path) -> None:
    config = json.loads((zoo / "b" / "config.json").read_text())
    (zoo / "b" / "config.json").write_text(json.dumps({**config, "architectures": ["MistralForCausalLM"]}))
    assert "one merge takes one architecture" in refused(run, zoo)
    assert run("merge", zoo / "recipe.yaml", zoo / "out", "--quiet", "--allow-mixed").code == 0
    assert recipe_of(zoo / "out")["allow_mixed"] is True
    assert run("merge", zoo / "recipe.yaml", zoo / "out", "--quiet", "--allow-crimes").code == 0


def test_vocabularies_are_cut_only_when_asked(run: Run, zoo: Path) -> None:
    write_tokenizer(zoo / "b", {"<s>": 0, "</s>": 1})
    refused(run, zoo)
    assert run("merge", zoo / "recipe.yaml", zoo / "out", "--quiet", "--truncate-vocabulary").code == 0
    assert recipe_of(zoo / "out")["vocabulary_mismatch"] == "truncate"


def test_warnings_are_errors_when_strict(run: Run, zoo: Path) -> None:
    write_recipe(zoo / "recipe.yaml", "merge_method: linear\nembed_slerp: true\nmodels:\n  - {model: a, parameters: {weight: 1}}\n")
    found = run("merge", zoo / "recipe.yaml", zoo / "out")
    assert (found.code, found.err.startswith(f"warning: {zoo}/recipe.yaml:2: embed_slerp")) == (0, True)
    shutil.rmtree(zoo / "out")
    assert "embed_slerp" in refused(run, zoo, zoo / "recipe.yaml", zoo / "out", "--strict")


def test_mergekits_flags(run: Run, zoo: Path) -> None:
    """The command line of somebody who has only changed the program's name."""
    flags = (
        "--lazy-unpickle", "--allow-crimes", "--copy-tokenizer", "--out-shard-size", "500B", "--random-seed", "7", "-j", "1",
        "--low-cpu-memory", "--lora-merge-cache", zoo / "cache", "--no-write-model-card", "--trust-remote-code", "--no-cuda",
        "--device", "cpu", "-v",
    )  # fmt: skip
    found = run("merge", *flags, zoo / "recipe.yaml", zoo / "out")
    assert (found.code, found.out) == (0, "")
    notes = [line.removeprefix("note: ").partition(":")[0] for line in found.err.splitlines() if line.startswith("note: ")]
    assert notes == [
        "--lazy-unpickle", "--copy-tokenizer", "--low-cpu-memory", "--lora-merge-cache", "--no-write-model-card", "--trust-remote-code",
        "--verbose",
    ]  # fmt: skip
    assert recipe_of(zoo / "out")["seed"] == 7
    assert (zoo / "out" / "README.md").exists()
    assert not (zoo / "cache").exists()
    quiet = run("merge", "--lazy-unpickle", zoo / "recipe.yaml", zoo / "quiet", "--quiet")
    assert (quiet.code, quiet.err) == (0, "")


def test_licences_are_warned_of(run: Run, zoo: Path) -> None:
    for name, licence in (("base", "mit"), ("a", "cc-by-nc-4.0"), ("b", "mit")):
        (zoo / name / "README.md").write_text(f"---\nlicense: {licence}\n---\n")
    found = run("merge", zoo / "recipe.yaml", zoo / "out", "--json")
    warning = "a is under cc-by-nc-4.0, for non-commercial use only; mit beside it does not change that."
    assert json.loads(found.out)["warnings"] == [warning]
    assert found.err == f"warning: {warning}\n"
    card = (zoo / "out" / "README.md").read_text()
    assert "- ../a is under cc-by-nc-4.0, for non-commercial use only" in card
    assert "license:" not in card.split("---")[1]


def test_a_device_that_is_none(run: Run, zoo: Path) -> None:
    assert "device 'abacus'" in refused(run, zoo, zoo / "recipe.yaml", zoo / "out", "--device", "abacus")
