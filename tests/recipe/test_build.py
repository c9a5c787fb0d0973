"""From a recipe to a checkpoint: the values, the donor, where references are looked for, and that outputs reproduce themselves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from modelglue.checkpoint import RECIPE_FILE, RECORD_FILE, Checkpoint, TensorsCheckpoint, open_checkpoint, save
from modelglue.errors import CheckpointError, MergeError, RecipeError
from modelglue.recipe import Recipe, build, linear_recipe, merge, read_recipe, read_with_models
from modelglue.recipe.schema import Entry
from tests.recipe.on_disk import write_model, write_recipe
from tests.zoo.models import model, tensors

NAME = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """base, a, b (float32) and half (bfloat16, another activation)."""
    root = tmp_path_factory.mktemp("models")
    for seed, name in enumerate(("base", "a", "b")):
        write_model(root / name, seed)
    write_model(root / "half", 3, dtype=torch.bfloat16, rms_norm_eps=0.5)
    return root


def bytes_of(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir())}


# -- values -----------------------------------------------------------------------------------------------------------------------


def test_a_nested_merge_is_the_merge_of_merges(folder: Path) -> None:
    inner = {"method": "linear", "models": [{"model": str(folder / "a"), "weight": 1}, {"model": str(folder / "b"), "weight": 3}]}
    merged = merge(
        {
            "method": "task_arithmetic",
            "base": str(folder / "base"),
            "models": [{"model": inner, "weight": 0.5}, {"model": str(folder / "b"), "weight": -0.25}],
        }
    )
    base, a, b = (tensors(seed)[NAME].double() for seed in range(3))
    expected = base + 0.5 * ((a + 3 * b) / 4 - base) - 0.25 * (b - base)
    torch.testing.assert_close(merged.tensor(NAME).double(), expected, rtol=1e-6, atol=1e-6)


def test_a_base_may_be_a_merge(folder: Path) -> None:
    base = {"method": "linear", "models": [{"model": str(folder / "base"), "weight": 1}, {"model": str(folder / "a"), "weight": 1}]}
    merged = merge({"method": "task_arithmetic", "base": base, "models": [{"model": str(folder / "b"), "weight": 2}]})
    mean = (tensors(0)[NAME].double() + tensors(1)[NAME].double()) / 2
    expected = mean + 2 * (tensors(2)[NAME].double() - mean)
    torch.testing.assert_close(merged.tensor(NAME).double(), expected, rtol=1e-6, atol=1e-6)
    assert merged.config["architectures"] == ["LlamaForCausalLM"]


def test_a_merge_of_merges_is_rounded_once_unless_it_says_otherwise(folder: Path) -> None:
    half = tensors(3, dtype=torch.bfloat16)[NAME].float()

    def outer(**inner: Any) -> torch.Tensor:
        nested = {
            "method": "linear",
            "models": [{"model": str(folder / "half"), "weight": 0.3}],
            "parameters": {"normalize": False},
            **inner,
        }
        value = {
            "method": "linear",
            "models": [{"model": nested, "weight": 3.1}],
            "parameters": {"normalize": False},
            "dtype": {"store": "bfloat16"},
        }
        return merge(value).tensor(NAME)

    once = ((half * 0.3) * 3.1).to(torch.bfloat16)
    twice = ((half * 0.3).to(torch.bfloat16).float() * 3.1).to(torch.bfloat16)
    assert not torch.equal(once, twice)
    assert torch.equal(outer(), once)
    assert torch.equal(outer(dtype={"store": "bfloat16"}), twice)


def test_seeds_of_nested_recipes_are_their_own(folder: Path) -> None:
    def dare(inner: int, outer: int) -> torch.Tensor:
        nested = {
            "method": "dare_ties", "base": str(folder / "base"), "seed": inner,
            "models": [{"model": str(folder / "a"), "weight": 1, "density": 0.5}],
        }  # fmt: skip
        return merge({"method": "linear", "models": [{"model": nested, "weight": 1}], "seed": outer}).tensor(NAME)

    assert torch.equal(dare(1, 1), dare(1, 2))
    assert not torch.equal(dare(1, 1), dare(2, 1))


def test_one_model_twice_counts_twice(folder: Path) -> None:
    models = [{"model": str(folder / "a"), "weight": 0.1}, {"model": str(folder / "a"), "weight": 1.0}]
    merged = merge({"method": "linear", "models": models, "parameters": {"normalize": False}})
    torch.testing.assert_close(merged.tensor(NAME), 1.1 * tensors(1)[NAME])


# -- the donor --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "base", "donor"),
    [
        ("linear", None, "a"),
        ("linear", "half", "half"),
        ("task_arithmetic", "half", "half"),
        ("linear", {"method": "linear", "models": ["half", "b"]}, "half"),
        ("task_arithmetic", {"method": "linear", "base": "half", "models": ["b"]}, "half"),
    ],
)
def test_config_tokenizer_and_dtypes_are_the_donors(folder: Path, method: str, base: Any, donor: str) -> None:
    def spelled(node: Any) -> Any:
        if isinstance(node, str):
            return str(folder / node)
        return {
            **node,
            "base": spelled(node["base"]) if "base" in node else None,
            "models": [{"model": spelled(one), "weight": 1} for one in node["models"]],
        }

    merged = merge({"method": method, "base": spelled(base) if base else None, "models": [{"model": str(folder / "a"), "weight": 1}]})
    expected = open_checkpoint(folder / donor)
    assert merged.config == expected.config
    assert merged.files == expected.files
    assert merged.info(NAME) == expected.info(NAME)


def test_a_merge_is_described_by_its_recipe_with_the_defaults_written_out(folder: Path) -> None:
    base, a, half = (str(folder / name) for name in ("base", "a", "half"))
    models = [{"model": a, "weight": [0, 1]}, {"model": half, "weight": 1}]
    inner = {"method": "linear", "models": [{"model": a, "weight": 1}]}
    assert merge({"method": "linear", "base": half, "models": models}).describe() == {
        "format": "modelglue/1", "method": "linear", "base": half, "models": models, "parameters": {"normalize": True}, "seed": 0,
    }  # fmt: skip
    assert merge({"method": "task_arithmetic", "base": base, "models": [{"model": inner, "weight": 1}]}).describe()["models"] == [
        {"model": {"format": "modelglue/1", **inner, "parameters": {"normalize": True}, "seed": 0}, "weight": 1}
    ]


# -- outputs reproduce themselves -------------------------------------------------------------------------------------------------


def recipes(folder: Path) -> dict[str, dict[str, Any]]:
    base, a, b, half = (str(folder / name) for name in ("base", "a", "b", "half"))
    nested = {"method": "linear", "models": [{"model": a, "weight": 1}, {"model": b, "weight": 2}]}
    return {
        "linear": {"method": "linear", "models": [{"model": a, "weight": 0.1}, {"model": b, "weight": 0.3}]},
        "defaults": {"method": "ties", "base": base, "models": [{"model": a, "weight": 1}, {"model": b, "weight": 1, "density": 0.3}]},
        "seeded": {"method": "dare_ties", "base": base, "models": [{"model": a, "weight": 1, "density": 0.4}], "seed": 12},
        "slerp": {"method": "slerp", "base": base, "models": [{"model": a}], "parameters": {"t": 0.25}},
        "stored": {"method": "linear", "models": [{"model": a, "weight": 1}], "dtype": {"store": "float16"}},
        "donor": {"method": "linear", "base": half, "models": [{"model": a, "weight": 1}, {"model": b, "weight": 1}]},
        "nested": {"method": "ties", "base": half, "models": [{"model": nested, "weight": 1}, {"model": half, "weight": 0.5}]},
        "nested base": {"method": "task_arithmetic", "base": {**nested, "base": half}, "models": [{"model": b, "weight": 0.5}], "seed": 3},
        "rounded inside": {"method": "linear", "models": [{"model": {**nested, "dtype": {"store": "float16"}}, "weight": 1}]},
    }


@pytest.mark.parametrize("name", recipes(Path()))
def test_the_recipe_inside_an_output_gives_the_same_bytes_again(folder: Path, name: str, tmp_path: Path) -> None:
    first, second = tmp_path / "1" / "merged", tmp_path / "2" / "merged"
    save(merge(recipes(folder)[name]), first)
    save(merge(first / RECIPE_FILE), second)
    found = bytes_of(first)
    assert bytes_of(second) == found
    assert set(found) == {"README.md", "config.json", "model.safetensors", RECIPE_FILE, RECORD_FILE, "tokenizer.json"}


def test_mergekits_dialect_gives_the_bytes_of_ours(folder: Path, tmp_path: Path) -> None:
    theirs = write_recipe(
        tmp_path / "theirs.yaml",
        f"merge_method: ties\nbase_model: {folder}/base\nmodels:\n  - model: {folder}/base\n"
        f"  - model: {folder}/a\n    parameters: {{weight: 0.5, density: 0.4}}\n"
        f"  - model: {folder}/b\n    parameters: {{weight: 1e-1}}\nparameters: {{normalize: true}}\ndtype: bfloat16\n",
    )
    ours = write_recipe(
        tmp_path / "ours.yaml",
        f"method: ties\nbase: {folder}/base\nmodels:\n  - {{model: {folder}/a, weight: 0.5, density: 0.4}}\n"
        f"  - {{model: {folder}/b, weight: 0.1}}\nparameters: {{normalize: true}}\ndtype: {{store: bfloat16}}\n",
    )
    save(merge(theirs), tmp_path / "1" / "merged")
    save(merge(ours), tmp_path / "2" / "merged")
    assert bytes_of(tmp_path / "1" / "merged") == bytes_of(tmp_path / "2" / "merged")


# -- references -------------------------------------------------------------------------------------------------------------------


def test_references_are_taken_from_the_recipes_folder_then_from_the_working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_model(tmp_path / "recipes" / "m", 1)
    write_model(tmp_path / "work" / "m", 2)
    write_model(tmp_path / "work" / "n", 3)
    path = write_recipe(
        tmp_path / "recipes" / "r.yaml", "method: linear\nmodels:\n  - {model: m, weight: 1}\n  - {model: ./n, weight: 0}\n"
    )
    monkeypatch.chdir(tmp_path / "work")
    merged = merge(path)
    assert torch.equal(merged.tensor(NAME), tensors(1)[NAME])
    assert [entry["model"] for entry in merged.describe()["models"]] == ["m", "./n"]
    assert torch.equal(merge(Path("../recipes/r.yaml")).tensor(NAME), tensors(1)[NAME])
    assert torch.equal(merge({"method": "linear", "models": [{"model": "m", "weight": 1}]}).tensor(NAME), tensors(2)[NAME])


def test_every_model_that_is_missing_is_named(folder: Path) -> None:
    value = {
        "method": "ties",
        "base": str(folder / "bsae"),
        "models": [{"model": str(folder / name), "weight": 1} for name in ("a", "c", "hlaf")],
    }
    with pytest.raises(CheckpointError) as caught:
        merge(value)
    lines = str(caught.value).split("\n")
    places = ("base", "models[1].model", "models[2].model")
    expected = [f"<recipe>: {place}: '{folder}/{name}'" for place, name in zip(places, ("bsae", "c", "hlaf"), strict=True)]
    assert [line.split(": no such file")[0] for line in lines] == expected
    assert "Did you mean 'base'?" in lines[0]
    assert "Did you mean 'half'?" in lines[2]


def test_models_are_opened_once_the_donor_first(folder: Path) -> None:
    a, b, half = (str(folder / name) for name in ("a", "b", "half"))
    nested = {"method": "linear", "base": half, "models": [{"model": a, "weight": 1}, {"model": b, "weight": 1}]}
    recipe, models = read_with_models({"method": "linear", "models": [{"model": nested, "weight": 1}, {"model": a, "weight": 1}]})
    assert list(models) == [half, a, b]
    assert recipe.models[1].model == a


def test_build_resolves_references_by_a_function() -> None:
    asked: list[str] = []

    def resolve(name: str) -> Checkpoint:
        asked.append(name)
        return model(tensors({"x": 1, "y": 2}[name]))

    recipe = read_recipe({"method": "linear", "models": [{"model": name, "weight": 1} for name in ("x", "y", "x")]})
    merged = build(recipe, resolve=resolve)
    assert asked == ["x", "y"]
    torch.testing.assert_close(merged.tensor(NAME), (2 * tensors(1)[NAME] + tensors(2)[NAME]) / 3)


def test_linear_recipe() -> None:
    recipe = linear_recipe(["a", "b"], [0.25, 0.75], "bfloat16")
    assert recipe == read_recipe(
        {"method": "linear", "models": [{"model": "a", "weight": 0.25}, {"model": "b", "weight": 0.75}], "dtype": {"store": "bfloat16"}}
    )
    assert linear_recipe(["a"], [1.0]).dtype.store is None
    with pytest.raises(ValueError, match="shorter"):
        linear_recipe(["a", "b"], [1.0])


def test_a_recipe_made_in_python_is_checked_when_it_is_built(folder: Path) -> None:
    with pytest.raises(RecipeError, match="'weight' is required by linear and missing"):
        merge(Recipe(method="linear", models=[Entry(model=str(folder / "a"))]))
    with pytest.raises(RecipeError, match="ties needs a base model; add base: REF"):
        merge(Recipe(method="ties", models=[Entry(model=str(folder / "a"), weight=1)]))


def test_messages_call_a_model_that_stands_there_twice_by_its_number() -> None:
    bad = tensors(1)
    bad[NAME][0, 0] = float("nan")
    models = {"x": TensorsCheckpoint(bad)}
    recipe = read_recipe({"method": "linear", "models": [{"model": "x", "weight": 1}, {"model": "x", "weight": 1}]})
    with pytest.raises(MergeError, match=rf"^x \(number 1\): tensor '{NAME}' holds NaN or infinity near element 0"):
        build(recipe, resolve=models.__getitem__).tensor(NAME)
