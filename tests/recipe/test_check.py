"""`check`: its numbers against real files, and the same refusals as `merge`."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from modelglue.checkpoint import save
from modelglue.checkpoint.output.memory import DEFAULT_BYTES, PROCESS_BYTES
from modelglue.errors import MergeError, ModelGlueError, UserError
from modelglue.methods import get
from modelglue.recipe import check, merge, read_recipe
from tests.recipe.on_disk import write_model, write_recipe
from tests.zoo.models import tensors


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    for seed, name in enumerate(("base", "a", "b")):
        write_model(root / name, seed, rope_theta=1e4)
    write_model(root / "half", 3, dtype=torch.bfloat16, rope_theta=1e6)
    return root


def weights(path: Path) -> dict[str, torch.Tensor]:
    with safe_open(path / "model.safetensors", "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping


def weight_bytes(path: Path) -> int:
    return sum(tensor.nbytes for tensor in weights(path).values())


# -- numbers ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "read", "passes"),
    [
        ({"method": "linear", "models": {"a": 1, "b": 1}}, ["a", "b"], 1),
        ({"method": "linear", "models": {"a": 1, "half": 1}}, ["a", "half"], 1),
        ({"method": "linear", "base": "half", "models": {"a": 1}}, ["a"], 1),
        ({"method": "linear", "base": "half", "models": {"a": 1}, "dtype": {"store": "float16"}}, ["a"], 1),
        ({"method": "task_arithmetic", "base": "base", "models": {"a": 1, "b": 1}}, ["base", "a", "b"], 1),
        ({"method": "ties", "base": "half", "models": {"a": 1, "b": 1}}, ["half", "a", "b"], 2),
        ({"method": "ties", "base": "base", "models": {"a": 1}, "parameters": {"density": 0.5, "rescale": True}}, ["base", "a"], 3),
        ({"method": "dare_ties", "base": "base", "models": {"a": 1}}, ["base", "a"], 2),
        ({"method": "dare_ties", "base": "base", "models": {"a": 1}, "parameters": {"rescale": False}}, ["base", "a"], 1),
    ],
)
def test_numbers_are_those_of_the_files(folder: Path, value: dict[str, Any], read: list[str], passes: int, tmp_path: Path) -> None:
    recipe = {
        **value,
        "base": str(folder / value["base"]) if "base" in value else None,
        "models": [{"model": str(folder / name), "weight": weight} for name, weight in value["models"].items()],
    }
    report = check(recipe)
    save(merge(recipe), tmp_path / "out")
    written = weights(tmp_path / "out")
    assert report.method == value["method"]
    assert report.models == tuple(str(folder / name) for name in value["models"])
    assert report.base == recipe["base"]
    assert report.architecture == "LlamaForCausalLM"
    assert report.tensors == len(written) == 14
    assert report.parameters == sum(tensor.numel() for tensor in written.values())
    assert report.read_bytes == sum(weight_bytes(folder / name) for name in read)
    assert report.output_bytes == weight_bytes(tmp_path / "out")
    short = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
    assert report.store == ", ".join(sorted({short[tensor.dtype] for tensor in written.values()}))
    assert (report.passes, report.workers) == (passes, 1)


@pytest.mark.parametrize(("method", "parameters", "passes"), [("arcee_fusion", {}, 3), ("sce", {}, 2), ("sce", {"select_topk": 0.5}, 4)])
def test_every_reading_of_the_inputs_counts(folder: Path, method: str, parameters: dict[str, Any], passes: int) -> None:
    models = [{"model": str(folder / "a")}]
    assert check({"method": method, "base": str(folder / "base"), "models": models, "parameters": parameters}).passes == passes


def test_models_are_counted_once_and_nested_ones_too(folder: Path) -> None:
    nested = {"method": "ties", "base": str(folder / "base"), "models": [{"model": str(folder / "a"), "weight": 1}]}
    report = check({"method": "linear", "models": [{"model": nested, "weight": 1}, {"model": str(folder / "a"), "weight": 1}]})
    assert report.models == ("(ties merge)", str(folder / "a"))
    assert report.read_bytes == weight_bytes(folder / "base") + weight_bytes(folder / "a")
    assert report.passes == 2


def test_memory_grows_with_inputs_workers_and_nesting(folder: Path) -> None:
    """Reckoned as `save` reckons it: processes, then for every worker the pages and chunks of all inputs."""
    models = [{"model": str(folder / name), "weight": 1} for name in ("a", "b")]
    two = check({"method": "linear", "models": models})
    three = check({"method": "linear", "models": [*models, models[0]]})
    assert PROCESS_BYTES < two.memory_bytes < three.memory_bytes < DEFAULT_BYTES
    six = check({"method": "linear", "models": models}, workers=3)
    assert six.memory_bytes - PROCESS_BYTES == 3 * (two.memory_bytes - PROCESS_BYTES)
    nested = check({"method": "linear", "models": [{"model": {"method": "linear", "models": models}, "weight": 1}, models[0]]})
    assert nested.memory_bytes > three.memory_bytes


def test_a_limit_of_memory_is_kept_or_refused(folder: Path) -> None:
    recipe = {"method": "linear", "models": [{"model": str(folder / "a"), "weight": 1}]}
    wide = check(recipe, workers=8)
    limit = (wide.memory_bytes + PROCESS_BYTES) // 2
    narrow = check(recipe, workers=8, memory=limit)
    assert narrow.workers < wide.workers == 8
    assert narrow.memory_bytes <= limit
    with pytest.raises(UserError, match="a memory of 1,000 bytes is too little"):
        check(recipe, memory=1000)


def test_the_disk_holds_headers_too(folder: Path, tmp_path: Path) -> None:
    recipe = {"method": "linear", "models": [{"model": str(folder / "a"), "weight": 1}]}
    report = check(recipe)
    save(merge(recipe), tmp_path / "out")
    assert (report.disk_bytes, report.shards) == ((tmp_path / "out" / "model.safetensors").stat().st_size, 1)
    assert report.output_bytes < report.disk_bytes


def test_the_number_of_workers_is_what_merge_would_use(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = {"method": "linear", "models": [{"model": str(folder / "a"), "weight": 1}]}
    monkeypatch.setenv("MODELGLUE_WORKERS", "3")
    assert check(recipe).workers == 1
    monkeypatch.setattr("modelglue.checkpoint.output.execution.SMALL_OUTPUT_BYTES", 0)
    assert check(recipe).workers == 3
    assert check(recipe, workers=2).workers == 2


def test_what_the_command_line_overrules(folder: Path, tmp_path: Path) -> None:
    write_model(tmp_path / "mistral", 1, architectures=["MistralForCausalLM"])
    write_model(tmp_path / "fewer", 1, words=["<s>", "</s>"])
    mixed, fewer = (
        {"method": "linear", "models": [{"model": str(folder / "a"), "weight": 1}, {"model": str(tmp_path / name), "weight": 1}]}
        for name in ("mistral", "fewer")
    )
    with pytest.raises(MergeError, match="one merge takes one architecture"):
        check(mixed)
    assert check(mixed, allow_mixed=True).tensors == 14
    with pytest.raises(MergeError, match="number their tokens differently"):
        check(fewer)
    assert check(fewer, truncate_vocabulary=True).tensors == 14


def test_licences_are_among_the_warnings(folder: Path, tmp_path: Path) -> None:
    for name, licence in (("x", "cc-by-nc-4.0"), ("y", "mit")):
        write_model(tmp_path / name, 1)
        (tmp_path / name / "README.md").write_text(f"---\nlicense: {licence}\n---\n")
    recipe = {"method": "linear", "models": [{"model": str(tmp_path / name), "weight": 1} for name in ("x", "y")]}
    (warning,) = check(recipe).warnings
    assert warning == f"{tmp_path}/x is under cc-by-nc-4.0, for non-commercial use only; mit beside it does not change that."


def test_a_base_that_is_a_merge_has_a_name(folder: Path) -> None:
    base = {"method": "linear", "models": [{"model": str(folder / "base"), "weight": 1}]}
    assert check({"method": "ties", "base": base, "models": [{"model": str(folder / "a"), "weight": 1}]}).base == "(linear merge)"


def test_warnings_speak_of_the_donor_first(folder: Path) -> None:
    models = [{"model": str(folder / "a"), "weight": 1}, {"model": str(folder / "half"), "weight": 1}]
    end = "; the output takes the first one's."
    assert check({"method": "linear", "models": models}).warnings == (
        f"{folder}/half has rope_theta = 1000000.0, {folder}/a has 10000.0{end}",
    )
    assert check({"method": "linear", "base": str(folder / "half"), "models": models}).warnings == (
        f"{folder}/a has rope_theta = 10000.0, {folder}/half has 1000000.0{end}",
    )


def test_a_file_is_read_relative_to_its_folder(folder: Path, tmp_path: Path) -> None:
    path = write_recipe(tmp_path / "r.yaml", "method: linear\nmodels:\n  - {model: ./m, weight: 1}\n")
    shutil.copytree(folder / "a", tmp_path / "m")
    assert check(path) == check(str(path)) == check(path, workers=1)
    assert check(path).models == ("./m",)
    assert read_recipe(path).models[0].model == "./m"


def test_a_recipe_may_be_given_as_it_is(folder: Path) -> None:
    recipe = read_recipe({"method": "linear", "models": [{"model": str(folder / "a"), "weight": 1}]})
    assert check(recipe).tensors == 14


# -- refusals ---------------------------------------------------------------------------------------------------------------------


def _broken(root: Path) -> dict[str, dict[str, Any]]:
    """Models that do not go with `a`, one per way."""
    odd = tensors(1)
    missing = {name: value for name, value in odd.items() if name != "model.layers.0.mlp.up_proj.weight"}
    shape = {**odd, "lm_head.weight": torch.zeros(9, 6)}
    integer = {**odd, "lm_head.weight": torch.zeros(8, 6, dtype=torch.int32)}
    eight_bit = {name: value.to(torch.float8_e4m3fn) for name, value in odd.items()}
    for name, found in (("missing", missing), ("shape", shape), ("integer", integer), ("eight", eight_bit)):
        write_model(root / name, weights=found)
    write_model(root / "mistral", 1, architectures=["MistralForCausalLM"])
    write_model(root / "words", 1, words=["a", "b"])
    write_model(root / "truncated", 1)
    path = root / "truncated" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    write_model(root / "a", 1)
    (root / "empty").mkdir()

    def pair(other: str, *, first: str = "a") -> dict[str, Any]:
        return {"method": "linear", "models": [{"model": str(root / first), "weight": 1}, {"model": str(root / other), "weight": 1}]}

    return {
        "missing": pair("missing"), "shape": pair("shape"), "integer": pair("integer"), "eight": pair("eight", first="eight"),
        "mistral": pair("mistral"), "words": pair("words"), "truncated": pair("truncated"), "empty": pair("empty"),
        "nowhere": pair("nowhere"), "adapter": pair("a+b"), "hub": pair("../../org/name"),
        "recipe": {**pair("a"), "sed": 1}, "method": {**pair("a"), "method": "liner"},
    }  # fmt: skip


BROKEN = (
    "missing", "shape", "integer", "eight", "mistral", "words", "truncated", "empty", "nowhere", "adapter", "hub", "recipe", "method",
)  # fmt: skip


@pytest.fixture(scope="module")
def broken(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    return _broken(tmp_path_factory.mktemp("broken"))


@pytest.mark.parametrize("name", BROKEN)
def test_what_merge_refuses_before_reading_weights_check_refuses_in_the_same_words(
    broken: dict[str, dict[str, Any]], name: str, tmp_path: Path
) -> None:
    with pytest.raises(ModelGlueError) as by_check:
        check(broken[name])
    with pytest.raises(ModelGlueError) as by_merge:
        save(merge(broken[name]), tmp_path / "out")
    assert str(by_check.value) == str(by_merge.value)
    assert type(by_check.value) is type(by_merge.value)
    assert by_check.value.exit_code == 2
    assert list(tmp_path.iterdir()) == []


def test_all_cases_are_asked(broken: dict[str, dict[str, Any]]) -> None:
    assert set(broken) == set(BROKEN)


def test_a_method_that_holds_matrices_needs_the_largest_whole(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of every input, and three more."""
    recipe = {"method": "linear", "models": [{"model": str(folder / "a"), "weight": 1}]}
    before = check(recipe).memory_bytes
    linear = get("linear")
    monkeypatch.setattr(type(linear), "unit", lambda self, parameters: "matrix")
    chunks, matrices = (3 * 1 + 8) * 60 * 4, (1 + 3) * 60 * 4
    assert check(recipe).memory_bytes - before == matrices - chunks
