"""What must come out equal, however it is written: over random recipes of random methods."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from modelglue.checkpoint import Checkpoint, TensorsCheckpoint, save
from modelglue.methods import all_methods
from modelglue.methods.registry import Method
from modelglue.recipe import build, canonical, read_recipe
from tests.recipe.on_disk import write_model
from tests.zoo.models import CONFIG, siblings

LAYERS = 3
MODELS = {
    name: TensorsCheckpoint(weights, {**CONFIG, "num_hidden_layers": LAYERS}, label=name)
    for name, weights in zip("xyz", siblings(0, 3, layers=LAYERS), strict=True)
}
METHODS = all_methods()


def merged(value: Mapping[str, Any]) -> Checkpoint:
    return build(read_recipe(value), resolve=MODELS.__getitem__)


def assert_equal(one: Mapping[str, Any], other: Mapping[str, Any], *, exactly: bool = True) -> None:
    a, b = merged(one), merged(other)
    assert a.names() == b.names()
    for name in a.names():
        if exactly:
            assert torch.equal(a.tensor(name), b.tensor(name)), name
        else:
            torch.testing.assert_close(a.tensor(name), b.tensor(name), rtol=1e-5, atol=1e-6)


def required(method: Method, value: Any = 0.5) -> tuple[dict[str, Any], dict[str, Any]]:
    """Values for the parameters that have no default: per model, and global."""
    names = {each: [p.name for p in method.parameters if p.required and p.per_model is each] for each in (True, False)}
    return dict.fromkeys(names[True], value), dict.fromkeys(names[False], value)


def entries(method: Method) -> list[dict[str, Any]]:
    """As many models as the method takes, with weights that differ."""
    each, _ = required(method)
    count = min(max(method.min_models, 2), method.max_models or 2)
    return [{"model": name, **dict.fromkeys(each, 0.4 + 0.3 * number)} for number, name in enumerate("yz"[:count])]


def recipe(method: Method) -> dict[str, Any]:
    value: dict[str, Any] = {"method": method.id, "models": entries(method), "parameters": required(method)[1]}
    return {**value, "base": "x"} if method.takes_base else value


methods = pytest.mark.parametrize("method", METHODS, ids=lambda method: method.id)


@methods
def test_whole_models_are_one_slice(method: Method) -> None:
    value = recipe(method)
    models = [{**entry, "layers": [0, LAYERS]} for entry in value.pop("models")]
    assert_equal(recipe(method), {**value, "slices": [{"models": models}]})


@methods
def test_cutting_a_slice_in_two_changes_nothing(method: Method) -> None:
    value = recipe(method)
    models = value.pop("models")
    for cut in (1, 2):
        parts = [{"models": [{**entry, "layers": layers} for entry in models]} for layers in ([0, cut], [cut, LAYERS])]
        if "model" in str(value["parameters"].get("trim_scope")):
            continue
        assert_equal(recipe(method), {**value, "slices": parts})


@methods
def test_the_order_of_models_counts_only_where_the_method_says_so(method: Method) -> None:
    if not method.symmetric or method.needs_uniform or (method.max_models or 2) < 2:
        pytest.skip("the order counts, there is chance, or there is one model")
    value = recipe(method)
    assert_equal(value, {**value, "models": value["models"][::-1]}, exactly=False)


@methods
def test_gradients_of_equal_numbers_and_filters_that_catch_all_are_numbers(method: Method) -> None:
    value = recipe(method)

    def rewritten(write: Any) -> dict[str, Any]:
        return {
            **value,
            "models": [{key: item if key == "model" else write(item) for key, item in entry.items()} for entry in value["models"]],
            "parameters": {key: write(item) for key, item in value["parameters"].items()},
        }

    expected = merged(value)
    for write in (
        lambda number: [number, number, number],
        lambda number: [number],
        lambda number: [{"value": number}],
        lambda number: {"filter": "*", "value": number},
        lambda number: [{"filter": "no tensor is called so", "value": 9.0}, {"value": number}],
        lambda number: [{"filter": "mlp", "value": number}, {"value": [number, number]}],
    ):
        found = merged(rewritten(write))
        assert all(torch.equal(found.tensor(name), expected.tensor(name)) for name in expected.names())
        assert found.identity == expected.identity


@methods
def test_what_a_model_says_counts_more_than_what_the_slice_says_and_so_on(method: Method) -> None:
    value = recipe(method)
    keys = [key for key in value["models"][0] if key != "model"]
    if not keys:
        pytest.skip("no parameter is required of every model")
    expected = {**value, "models": [{"model": entry["model"], **dict.fromkeys(keys, 0.5)} for entry in value["models"]]}
    bare = [{"model": entry["model"], "layers": [0, LAYERS]} for entry in value.pop("models")]
    silent = [{"filter": "nowhere", "value": 7.0}]
    part = {"models": [{**entry, **dict.fromkeys(keys, silent)} for entry in bare], "parameters": dict.fromkeys(keys, 0.5)}
    assert_equal(expected, {**value, "slices": [part], "parameters": {**value["parameters"], **dict.fromkeys(keys, 3.0)}})
    part = {"models": bare, "parameters": dict.fromkeys(keys, silent)}
    assert_equal(expected, {**value, "slices": [part], "parameters": {**value["parameters"], **dict.fromkeys(keys, 0.5)}})


numbers = st.floats(0.1, 0.9)
curves = st.one_of(numbers, st.lists(numbers, min_size=1, max_size=5))
conditions = st.one_of(
    curves,
    st.tuples(st.sampled_from(["mlp", "self_attn", "layers.1.", "norm", "weight"]), curves, curves).map(
        lambda found: [{"filter": found[0], "value": found[1]}, {"value": found[2]}]
    ),
)


@settings(max_examples=30, deadline=None)
@given(first=conditions, second=conditions, shared=conditions)
def test_any_settings_give_what_the_definition_says(first: Any, second: Any, shared: Any) -> None:
    """Against the definition, written down plainly: the weights of every tensor, by name and layer."""

    def at(setting: Any, name: str) -> float:
        if isinstance(setting, list) and isinstance(setting[0], dict):
            setting = next(clause["value"] for clause in setting if clause.get("filter", "") in name)
        layer = int(name.split(".")[2]) if ".layers." in name else 0
        if not isinstance(setting, list):
            return float(setting)
        x = layer / (LAYERS - 1) * (len(setting) - 1)
        low = min(int(x), len(setting) - 1)
        high = min(low + 1, len(setting) - 1)
        return float(setting[low] + (x - low) * (setting[high] - setting[low]))

    found = merged(
        {
            "method": "linear", "models": [{"model": "x", "weight": first}, {"model": "y", "weight": second}, {"model": "z"}],
            "parameters": {"weight": shared, "normalize": False},
        }
    )  # fmt: skip
    for name in found.names():
        expected = sum(at(setting, name) * MODELS[key].tensor(name) for key, setting in zip("xyz", (first, second, shared), strict=True))
        torch.testing.assert_close(found.tensor(name), expected, rtol=1e-5, atol=1e-6)


@settings(max_examples=30, deadline=None)
@given(first=conditions, second=conditions, shared=conditions, data=st.data())
def test_any_recipe_reads_back_equal(first: Any, second: Any, shared: Any, data: st.DataObject) -> None:
    models = [{"model": "x", "weight": first}, {"model": "y", "weight": second}]
    whole: dict[str, Any] = {"models": models}
    part = {"models": [{**entry, "layers": [0, 2]} for entry in models], "parameters": {"weight": shared}}
    shape = data.draw(st.sampled_from([whole, {"slices": [part, part]}, {"modules": {"default": whole, "other": {"slices": [part]}}}]))
    extra = {
        key: value
        for key, value in {
            "tokenizer": {"source": {"model": "x"}, "tokens": {"t": {"source": "zero", "force": True}, "u": {}}, "pad_to_multiple_of": 8},
            "chat_template": "auto", "missing": "present", "shape_mismatch": "skip", "vocabulary_mismatch": "truncate", "allow_mixed": True,
            "into": {"model": "v", "part": {"language_model": "model"}}, "dtype": {"store": "widest"},
            "base": {"model": "x", "part": "text", "architecture": "LlamaModel"},
        }.items()
        if data.draw(st.booleans())
    }  # fmt: skip
    found = read_recipe({"method": "linear", **shape, **extra, "parameters": {"weight": shared}})
    assert read_recipe(canonical(found)) == found
    assert canonical(read_recipe(canonical(found))) == canonical(found)


@pytest.mark.parametrize("dialect", ["slices", "gradients", "nested"])
def test_bytes_are_equal_whatever_the_workers_and_when_made_again(dialect: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name, weights in zip("xyz", siblings(0, 3, layers=LAYERS), strict=True):
        write_model(tmp_path / name, weights=weights, num_hidden_layers=LAYERS)
    inner = {
        "method": "linear",
        "models": [{"model": "x", "weight": [0.2, 0.9]}, {"model": "y", "weight": 0.5}],
        "dtype": {"store": "bfloat16"},
    }
    part = {"models": [{"model": "y", "layers": [0, 2]}, {"model": "z", "layers": [1, 3]}], "base": {"model": "x", "layers": [1, 3]}}
    recipes: dict[str, dict[str, Any]] = {
        "slices": {"method": "dare_ties", "base": "x", "slices": [part, part], "parameters": {"weight": [1.0, 0.2], "density": 0.5}},
        "gradients": {
            "method": "ties", "base": "x", "models": [{"model": "y", "density": [1.0, 0.3], "weight": 1.0}, {"model": "z", "weight": 0.5}],
        },
        "nested": {"method": "slerp", "base": inner, "models": [{"model": inner}], "parameters": {"t": [0, 1]}},
    }  # fmt: skip
    recipe = read_recipe(recipes[dialect])
    for folder, workers in (("one", 1), ("many", 3)):
        save(build(recipe), tmp_path / folder, workers=workers)
    again = build(read_recipe(tmp_path / "one" / "modelglue_recipe.yaml"), relative_to=tmp_path / "one")
    save(again, tmp_path / "again")
    first = {path.name: path.read_bytes() for path in (tmp_path / "one").iterdir()}
    for folder in ("many", "again"):
        assert {path.name: path.read_bytes() for path in (tmp_path / folder).iterdir()} == first


def test_a_union_of_equal_vocabularies_is_no_tokenizer_section(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate("xy"):
        write_model(tmp_path / name, seed)
    value: dict[str, Any] = {"method": "linear", "models": [{"model": "x", "weight": 1}, {"model": "y", "weight": 2}]}
    plain, union = build(read_recipe(value)), build(read_recipe({**value, "tokenizer": {"source": "union"}}))
    assert plain.names() == union.names()
    assert all(torch.equal(plain.tensor(name), union.tensor(name)) for name in plain.names())
    assert plain.config == union.config
    assert plain.files == union.files
