"""Settings of the command line in a recipe and in every recipe inside it."""

from __future__ import annotations

from pathlib import Path

import yaml

from modelglue.recipe import canonical, read_recipe
from modelglue.recipe.override import overridden

NESTED = """
method: linear
base: {method: ties, base: b, models: [{model: c, weight: 1}], seed: 3}
models:
  - {model: a, weight: [0.1, 0.2]}
  - model: {method: slerp, base: d, models: [{model: e}], parameters: {t: 0.5}}
    weight: [{filter: mlp, value: 1}, {value: 0}]
"""


def test_every_recipe_inside_is_changed_and_nothing_else() -> None:
    recipe = read_recipe(yaml.safe_load(NESTED))
    before = canonical(recipe)
    changed = overridden(recipe, seed=9, allow_mixed=True)
    value = canonical(changed)
    assert [value["seed"], value["base"]["seed"], value["models"][1]["model"]["seed"]] == [9, 9, 9]
    assert all(one["allow_mixed"] for one in (value, value["base"], value["models"][1]["model"]))
    for one in (value, value["base"], value["models"][1]["model"]):
        del one["allow_mixed"]
        one["seed"] = 0
    value["base"]["seed"] = 3
    assert value == before
    assert canonical(recipe) == before


def test_nothing_to_change_is_the_recipe_itself() -> None:
    recipe = read_recipe({"method": "linear", "models": [{"model": "a", "weight": 1}]})
    assert overridden(recipe, seed=None, allow_mixed=None) is recipe


def test_slices_and_modules_are_looked_into() -> None:
    inner = {"method": "linear", "models": [{"model": "x", "weight": 1}]}
    slices = [{"models": [{"model": inner, "layers": [0, 2]}]}]
    recipe = read_recipe({"method": "passthrough", "modules": {"decoder": {"slices": slices}}})
    value = canonical(overridden(recipe, seed=4))
    assert value["modules"]["decoder"]["slices"][0]["models"][0]["model"]["seed"] == 4


def test_messages_still_name_file_and_line(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text("method: linear\nmodels:\n  - {model: a, weight: 1}\n")
    changed = overridden(read_recipe(path), seed=4)
    assert changed.origin.fault(("models", 0), "x").startswith(f"{path}:3: models[0]: x")
