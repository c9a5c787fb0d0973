"""mergekit-evolve's genome and files: what a vector of genes is merged to."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from modelglue.errors import RecipeError, UserError
from modelglue.recipe import build, canonical, read_recipe
from modelglue.recipe.evolve import read_evolve
from modelglue.recipe.genome import Genome, GenomeDefinition
from tests.recipe.on_disk import write_model, write_recipe

LAYERS = 4


def genome(method: str = "linear", models: tuple[str, ...] = ("a", "b"), layers: int = LAYERS, **more: Any) -> Genome:
    return Genome(GenomeDefinition(models=models, merge_method=method, **more), layers)  # type: ignore[arg-type]


def theirs(method: str, **keys: Any) -> Any:
    """What mergekit-evolve would hand to mergekit, as we read it."""
    value = {"merge_method": method, **keys}
    return canonical(read_recipe(value))


def ours(one: Genome, genes: Any) -> Any:
    return canonical(read_recipe(one.recipe(genes, store="bfloat16")))


# -- decoding --------------------------------------------------------------------------------------------------------------------


def test_layout() -> None:
    one = genome("ties", ("a", "b", "c"), base_model="base", layer_granularity=2, filters=("mlp",))
    assert one.shape == (2, 3, 2, 2)
    assert one.size == 24
    assert one.ranges == ((0, 2), (2, 4))
    values = one.decode(np.arange(24) / 24).values
    assert values["weight"][1, 2, 0] == pytest.approx((1 * 12 + 2 * 4 + 0) / 24)
    assert values["density"][0, 1, 1] == pytest.approx((4 + 2 + 1) / 24)


def test_a_search_starts_with_all_models_alike() -> None:
    one = genome("dare_ties", ("a", "b", "c", "d"), base_model="base")
    assert one.start().tolist() == [0.25, 1.0] * 4
    assert genome("slerp").start().tolist() == [0.5, 0.5]


def test_signs_and_clipping() -> None:
    genes = [-0.5, -0.3, 0.25, 1.7]
    found = genome("ties", base_model="base").decode(genes).values
    assert found["weight"].ravel().tolist() == [0.5, 0.25]
    assert found["density"].ravel().tolist() == [0.3, 1.0]
    signed = genome("ties", base_model="base", allow_negative_weights=True).decode(genes).values
    assert signed["weight"].ravel().tolist() == [-0.5, 0.25]
    assert signed["density"].ravel().tolist() == [0.3, 1.0]


@given(st.lists(st.floats(-2, 2), min_size=3, max_size=3))
@settings(max_examples=30, deadline=None)
def test_slerp_takes_the_two_largest_genes(genes: list[float]) -> None:
    found = genome("slerp", ("a", "b", "c")).decode(genes)
    (first, second), t = found.pairs[0], found.t[0]
    assert first != second
    assert genes[first] == max(genes)
    assert genes[second] == max(gene for position, gene in enumerate(genes) if position != first)
    assert t == pytest.approx(np.exp(genes[second]) / (np.exp(genes[first]) + np.exp(genes[second])))
    assert 0 < t <= 0.5


def test_faults_of_a_genotype() -> None:
    with pytest.raises(UserError, match="3 numbers; allowed are 2"):
        genome().decode([1, 2, 3])
    with pytest.raises(UserError, match="finite"):
        genome().decode([1, np.nan])
    with pytest.raises(UserError, match="layer_granularity 3 does not divide the 4 layers"):
        genome(layer_granularity=3)


# -- recipes ---------------------------------------------------------------------------------------------------------------------


def test_groups_and_filters_become_slices() -> None:
    one = genome("ties", base_model="base", layer_granularity=2, filters=("self_attn",))
    genes = (np.arange(16) + 1) / 16
    arrays = one.decode(genes).values

    def source(model: int, group: int) -> dict[str, Any]:
        parameters = {
            name: [
                {"filter": "self_attn", "value": float(array[group, model, 0])},
                {"filter": None, "value": float(array[group, model, 1])},
            ]
            for name, array in arrays.items()
        }
        return {"model": "ab"[model], "layer_range": [2 * group, 2 * group + 2], "parameters": parameters}

    slices = [
        {"sources": [source(0, group), source(1, group), {"model": "base", "layer_range": [2 * group, 2 * group + 2]}]} for group in (0, 1)
    ]
    expected = theirs("ties", base_model="base", slices=slices, parameters={"normalize": True}, dtype="bfloat16")
    found = ours(one, genes)
    for part in [*found["slices"], *expected["slices"]]:  # a filter of None and none at all say the same
        for entry in part["models"]:
            for name in ("weight", "density"):
                entry[name] = [{key: value for key, value in clause.items() if value is not None} for clause in entry[name]]
    assert found == expected


def test_slerp_becomes_slices_with_bases_of_their_own() -> None:
    one = genome("slerp", ("a", "b", "c"), layer_granularity=2)
    found = one.decode([0.1, 0.9, 0.5, 0.7, 0.2, 0.8])
    assert found.pairs == ((1, 2), (2, 0))
    slices = [
        {
            "sources": [{"model": "abc"[number], "layer_range": [2 * group, 2 * group + 2]} for number in pair],
            "base_model": "abc"[pair[0]],
            "parameters": {"t": t},
        }
        for group, (pair, t) in enumerate(zip(found.pairs, found.t, strict=True))
    ]
    expected = theirs("slerp", base_model="a", slices=slices, dtype="bfloat16")
    assert ours(one, [0.1, 0.9, 0.5, 0.7, 0.2, 0.8]) == expected


def test_smooth_genes_become_gradients() -> None:
    one = genome("task_arithmetic", base_model="base", layer_granularity=2, smooth=True, normalize=True)
    models = [{"model": "a", "parameters": {"weight": [0.1, 0.3]}}, {"model": "b", "parameters": {"weight": [0.2, 0.4]}}]
    expected = theirs("task_arithmetic", base_model="base", models=models, parameters={"normalize": True}, dtype="bfloat16")
    assert ours(one, [0.1, 0.2, 0.3, 0.4]) == expected


def test_one_group_is_the_whole_model() -> None:
    value = genome().recipe([0.25, -0.75])
    assert value == {
        "format": "modelglue/1",
        "method": "linear",
        "models": [{"model": "a", "weight": 0.25}, {"model": "b", "weight": 0.75}],
        "parameters": {"normalize": True},
    }
    assert json.loads(json.dumps(value)) == value


@pytest.mark.parametrize(("source", "expected"), [("union", "union"), ("base", "base"), ("model:a", {"model": "a"}), ("b", {"model": "b"})])
def test_tokenizers(source: str, expected: Any) -> None:
    assert genome(tokenizer_source=source).recipe([1, 1])["tokenizer"] == {"source": expected}


@pytest.mark.parametrize(
    ("method", "given", "expected"),
    [("linear", None, True), ("ties", None, True), ("dare_ties", None, True), ("task_arithmetic", None, False), ("linear", False, False)],
)
def test_whether_weights_are_normalised(method: str, given: bool | None, expected: bool) -> None:
    one = genome(method, base_model="base", normalize=given)
    assert one.recipe(one.start())["parameters"] == {"normalize": expected}


def test_a_density_of_nothing_keeps_nothing_to_speak_of() -> None:
    value = genome("ties", base_model="base").recipe([1.0, 0.0, 1.0, 0.5])
    assert [entry["density"] for entry in value["models"]] == [1e-6, 0.5]
    read_recipe(value)


def test_a_base_among_the_models_has_no_task_vector() -> None:
    one = genome("ties", ("a", "base"), base_model="base")
    assert one.size == 4
    assert [entry["model"] for entry in one.recipe(one.start())["models"]] == ["a"]


def folders(tmp_path: Path) -> tuple[str, ...]:
    return tuple(str(write_model(tmp_path / name, seed)) for seed, name in enumerate(("base", "one", "two")))


@pytest.mark.parametrize("method", ["linear", "task_arithmetic", "ties", "dare_ties"])
@pytest.mark.parametrize("granularity", [0, 1])
def test_one_model_with_weight_one_is_that_model(method: str, granularity: int, tmp_path: Path) -> None:
    base, *models = folders(tmp_path)
    one = genome(method, tuple(models), 2, base_model=None if method == "linear" else base, layer_granularity=granularity, filters=("mlp",))
    genes = np.zeros(one.shape)
    genes[..., 0] = [[[0.0], [1.0]]]
    genes[..., 1:] = 1
    built = build(read_recipe(one.recipe(genes)))
    wanted = build(read_recipe({"method": "linear", "models": [{"model": models[1], "weight": 1}]}))
    assert built.names() == wanted.names()
    for name in wanted.names():
        torch.testing.assert_close(built.tensor(name), wanted.tensor(name), rtol=1e-6, atol=1e-6)


def test_slerp_of_one_pair_is_slerp(tmp_path: Path) -> None:
    models = folders(tmp_path)
    one = genome("slerp", models, 2, layer_granularity=1)
    built = build(read_recipe(one.recipe([0.5, 0.0, 0.25] * 2)))
    t = float(1 / (1 + np.exp(0.25)))
    plain = build(read_recipe({"method": "slerp", "base": models[0], "models": [{"model": models[2]}], "parameters": {"t": t}}))
    for name in plain.names():
        torch.testing.assert_close(built.tensor(name), plain.tensor(name))


@pytest.mark.parametrize(
    ("keys", "text"),
    [
        ({"merge_method": "ties"}, "ties needs a base_model"),
        ({"merge_method": "slerp", "filters": ("mlp",)}, "slerp knows no filters"),
        ({"merge_method": "slerp", "smooth": True}, "slerp knows no smooth"),
        ({"merge_method": "slerp", "models": ("a",)}, "slerp needs two models"),
        ({"merge_method": "ties", "models": ("a",), "base_model": "a"}, "no model differs from the base_model"),
        ({"models": ("a", "a")}, "a model stands there twice"),
    ],
)
def test_definitions_that_do_not_fit_together(keys: dict[str, Any], text: str) -> None:
    with pytest.raises(ValidationError, match=text):
        GenomeDefinition(**{"models": ("a", "b"), "merge_method": "linear", **keys})


# -- files -----------------------------------------------------------------------------------------------------------------------

FILE = """\
genome:
  models:
    - org/one
    - org/two
  merge_method: dare_ties
  base_model: org/base
  tokenizer_source: base
  layer_granularity: 8
  normalize: false
  filters: [self_attn, mlp]
tasks:
  - name: arc_easy
    weight: 0.5
  - my_task
  - {name: third, weight: -1, metric: "exact_match,strict-match"}
limit: 100
num_fewshot: 3
"""


def test_a_file_is_read_unchanged(tmp_path: Path) -> None:
    plan = read_evolve(write_recipe(tmp_path / "evolve.yml", FILE))
    assert plan.genome == GenomeDefinition(
        models=("org/one", "org/two"),
        merge_method="dare_ties",
        base_model="org/base",
        tokenizer_source="base",
        layer_granularity=8,
        normalize=False,
        filters=("self_attn", "mlp"),
    )
    assert [(task.name, task.weight, task.metric) for task in plan.tasks] == [
        ("arc_easy", 0.5, "acc,none"), ("my_task", 1.0, "acc,none"), ("third", -1.0, "exact_match,strict-match"),
    ]  # fmt: skip
    assert (plan.limit, plan.num_fewshot, plan.shuffle, plan.random_init) == (100, 3, False, False)
    assert (plan.apply_chat_template, plan.fewshot_as_multiturn) == (True, True)
    metrics = {"arc_easy": {"acc,none": 0.8}, "my_task": {"acc,none": 0.5}, "third": {"exact_match,strict-match": 0.25, "acc,none": 1.0}}
    assert plan.score(metrics) == pytest.approx(0.4 + 0.5 - 0.25)


@pytest.mark.parametrize(
    ("old", "new", "text"),
    [
        ("dare_ties", "dare_linear", r"evolve\.yml:5: genome\.merge_method: is 'dare_linear', allowed is 'linear', 'task_arithmetic'"),
        ("limit: 100", "limits: 100", r"evolve\.yml:16: limits: unknown key\. Did you mean 'limit'"),
        ("limit: 100", "limit: 0", r"evolve\.yml:16: limit: is 0, allowed is a number >= 1"),
        ("  base_model: org/base\n", "", r"evolve\.yml:1: genome: dare_ties needs a base_model"),
        ("layer_granularity: 8", "layer_granularity: 8.5", r"evolve\.yml:8: genome\.layer_granularity: is 8\.5, allowed is a whole number"),
    ],
)
def test_faults_of_a_file_are_named_by_line(old: str, new: str, text: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=text):
        read_evolve(write_recipe(tmp_path / "evolve.yml", FILE.replace(old, new)))
