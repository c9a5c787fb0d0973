"""Our recipe dialect: complete, strict, and with one message per fault that names line, place, what was found and what is allowed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from modelglue.errors import RecipeError
from modelglue.methods import all_methods, get
from modelglue.recipe import FORMAT, Recipe, canonical, dump, read_recipe
from modelglue.recipe.schema import Dtype, Entry
from tests.recipe.on_disk import write_recipe

KEYS = (
    "format, method, base, models, slices, modules, hops, into, parameters, seed, dtype, tokenizer, chat_template, vocabulary_mismatch, "
    "missing, shape_mismatch, allow_mixed"
)
SOURCE = "model, part, architecture, layers"
NO_PARAMETER = "is no parameter of linear. Did you mean"
METHODS = (
    "arcee_fusion, breadcrumbs, breadcrumbs_ties, dare_linear, dare_ties, della, della_linear, karcher, linear, model_stock, multislerp, "
    "nearswap, nuslerp, passthrough, ram, ramplus_tl, sce, slerp, task_arithmetic, ties"
)


def faults(folder: Path, text: str) -> list[str]:
    """The lines of the refusal, without the folder."""
    path = write_recipe(folder / "r.yaml", text)
    with pytest.raises(RecipeError) as caught:
        read_recipe(path)
    return [line.removeprefix(f"{folder}/") for line in str(caught.value).split("\n")]


# -- what is accepted -------------------------------------------------------------------------------------------------------------


def test_every_key(tmp_path: Path) -> None:
    path = write_recipe(
        tmp_path / "r.yaml",
        """
format: modelglue/1
method: ties
base: org/base@main
models:
  - {model: ./a, weight: 0.5, density: 0.4}
  - model: org/b
    weight: 1e-1
parameters: {lambda: 2, normalize: 1, trim_scope: model, density: 0.9}
seed: 7
dtype: {compute: float32, store: bfloat16}
""",
    )
    recipe = read_recipe(path)
    assert recipe == Recipe(
        format="modelglue/1",
        method="ties",
        base="org/base@main",
        models=[Entry(model="./a", weight=0.5, density=0.4), Entry(model="org/b", weight=0.1)],
        parameters={"lambda": 2, "normalize": 1, "trim_scope": "model", "density": 0.9},
        seed=7,
        dtype=Dtype(compute="float32", store="bfloat16"),
    )
    assert [entry.own for entry in recipe.models] == [{"weight": 0.5, "density": 0.4}, {"weight": 0.1}]


def test_defaults() -> None:
    recipe = read_recipe({"method": "linear", "models": [{"model": "a", "weight": 1}]})
    assert (recipe.format, recipe.base, recipe.parameters, recipe.seed, recipe.dtype) == (FORMAT, None, {}, 0, Dtype(store=None))


def test_nesting_in_models_and_base() -> None:
    inner = {"method": "linear", "models": [{"model": "x", "weight": 1}], "seed": 3}
    recipe = read_recipe({"method": "ties", "base": inner, "models": [{"model": inner, "weight": 1}, {"model": "y", "weight": 2}]})
    nested = Recipe(method="linear", models=[Entry(model="x", weight=1)], seed=3)
    assert recipe.base == nested
    assert [entry.model for entry in recipe.models] == [nested, "y"]
    assert [entry.label for entry in recipe.models] == ["(linear merge)", "y"]


def test_a_base_for_a_method_without_one_is_the_donor() -> None:
    recipe = read_recipe({"method": "linear", "base": "a", "models": [{"model": "a", "weight": 1}, {"model": "b", "weight": 1}]})
    assert recipe.base == "a"


def test_recipes_are_frozen() -> None:
    recipe = read_recipe({"method": "linear", "models": [{"model": "a", "weight": 1}]})
    with pytest.raises(ValidationError):
        recipe.seed = 1  # type: ignore[misc]


# -- what is refused --------------------------------------------------------------------------------------------------------------

LINEAR = "models:\n  - {model: a, weight: 1}\n"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", ["r.yaml: is empty, allowed is a mapping of keys to values."]),
        ("# nothing\n", ["r.yaml: is empty, allowed is a mapping of keys to values."]),
        ("- method: linear", ["r.yaml: is a list, allowed is a mapping of keys to values."]),
        ("linear", ["r.yaml: is 'linear', allowed is a mapping of keys to values."]),
        ("3", ["r.yaml: is 3, allowed is a mapping of keys to values."]),
        ("models: [{model: a}]", ["r.yaml:1: method: is required and missing."]),
        ("method: linear", ["r.yaml:1: models: is required and missing."]),
        ("method: linear\nmodels: []", ["r.yaml:2: models: holds 0 items, allowed are 1 or more."]),
        ("method: linear\nmodels: {a: 1}", ["r.yaml:2: models: is a mapping, allowed is a list."]),
        ("method: linear\nmodels:", ["r.yaml:2: models: is empty, allowed is a list."]),
        ("method: linear\nmodels:\n  - a", ["r.yaml:3: models[0]: is 'a', allowed is a mapping of keys to values."]),
        (
            f"metod: linear\n{LINEAR}",
            [
                "r.yaml:1: method: is required and missing.",
                f"r.yaml:1: metod: unknown key. Did you mean 'method'? Allowed: {KEYS}.",
            ],
        ),
        (f"method: linear\n{LINEAR}output: {{}}", [f"r.yaml:4: output: unknown key. Allowed: {KEYS}."]),
        (f"method: 5\n{LINEAR}", ["r.yaml:1: method: is 5, allowed is text (put quotes around it if it is meant as text)."]),
        (f"method: linaer\n{LINEAR}", [f"r.yaml:1: method: there is no merge method 'linaer'. Did you mean 'linear'? Known: {METHODS}."]),
        (f"method: linear\nformat: modelglue/2\n{LINEAR}", ["r.yaml:2: format: is 'modelglue/2', allowed is 'modelglue/1'."]),
        (f"method: linear\nseed: -1\n{LINEAR}", ["r.yaml:2: seed: is -1, allowed is a number >= 0."]),
        (f"method: linear\nseed: true\n{LINEAR}", ["r.yaml:2: seed: is true, allowed is a whole number."]),
        (f"method: linear\nseed: 1.5\n{LINEAR}", ["r.yaml:2: seed: is 1.5, allowed is a whole number."]),
        (f"method: linear\nseed: '1'\n{LINEAR}", ["r.yaml:2: seed: is '1', allowed is a whole number."]),
        (f"method: linear\ndtype: bfloat16\n{LINEAR}", ["r.yaml:2: dtype: is 'bfloat16', allowed is a mapping of keys to values."]),
        (
            f"method: linear\ndtype:\n  store: bf16\n  copmute: float32\n{LINEAR}",
            [
                "r.yaml:3: dtype.store: is 'bf16', allowed is 'float32', 'float16', 'bfloat16', 'donor' or 'widest'.",
                "r.yaml:4: dtype.copmute: unknown key. Did you mean 'compute'? Allowed: compute, store.",
            ],
        ),
        (f"method: linear\nparameters:\n{LINEAR}", ["r.yaml:2: parameters: is empty, allowed is a mapping of keys to values."]),
        (
            f"method: linear\nparameters:\n  normalise: true\n{LINEAR}",
            [f"r.yaml:3: parameters.normalise: 'normalise' {NO_PARAMETER} 'normalize'? Allowed: weight, normalize."],
        ),
        (
            f"method: linear\nparameters: {{normalize: yes}}\n{LINEAR}",
            ["r.yaml:2: parameters.normalize: normalize is 'yes', allowed is true or false."],
        ),
        (
            "method: ties\nbase: b\nparameters: {trim_scope: tensors, lambda: x}\nmodels:\n  - {model: a, weight: 1}",
            [
                "r.yaml:3: parameters.trim_scope: trim_scope is 'tensors', allowed is tensor or model.",
                "r.yaml:3: parameters.lambda: lambda is 'x', allowed is a number.",
            ],
        ),
        ("method: ties\nmodels:\n  - {model: a, weight: 1}", ["r.yaml:1: ties needs a base model; add base: REF."]),
        (
            "method: slerp\nbase: q\nparameters: {t: 0.5}\nmodels:\n  - model: a\n  - model: b",
            ["r.yaml:1: slerp takes exactly 1 model besides the base, the recipe has 2."],
        ),
        (
            "method: model_stock\nbase: q\nmodels:\n  - model: a",
            ["r.yaml:1: model_stock takes at least 2 models besides the base, the recipe has 1."],
        ),
        (
            "method: linear\nmodels:\n  - {model: a, weight: 1}\n  - {model: b, weight: -1}",
            ["r.yaml:1: the weights sum to 0, so they cannot be normalised; change them or set normalize: false."],
        ),
    ],
)
def test_faults_of_the_document(text: str, expected: list[str], tmp_path: Path) -> None:
    assert faults(tmp_path, text) == expected


@pytest.mark.parametrize(
    ("entry", "expected"),
    [
        ("{model: a}", "models[0].weight: model a: 'weight' is required by linear and missing."),
        ("{model: a, weight: .inf}", "models[0].weight: model a: weight is inf, allowed is a finite number."),
        ("{model: a, weight: 1e999}", "models[0].weight: model a: weight is inf, allowed is a finite number."),
        ("{model: a, weight: '1'}", "models[0].weight: model a: weight is '1', allowed is a number."),
        ("{model: a, weight: true}", "models[0].weight: model a: weight is True, allowed is a number."),
        ("{model: a, weight: yes}", "models[0].weight: model a: weight is 'yes', allowed is a number."),
        ("{model: a, weight: 1:30}", "models[0].weight: model a: weight is '1:30', allowed is a number."),
        ("{model: a, weight: [1, x]}", "models[0].weight[1]: is 'x', allowed in a gradient are numbers."),
        ("{model: a, weight: [1, true]}", "models[0].weight[1]: is True, allowed in a gradient are numbers."),
        (
            "{model: a, weight: []}",
            "models[0].weight: model a: weight is an empty list, allowed is a number, a list of numbers, or a list of {filter, value}.",
        ),
        ("{model: a, weight: [1, {value: 1}]}", "models[0].weight[1]: is a mapping, allowed in a gradient are numbers."),
        ("{model: a, weight: [{filter: mlp}]}", "models[0].weight[0]: 'value' is required and missing."),
        (
            "{model: a, weight: {filtre: mlp, value: 1}}",
            "models[0].weight.filtre: unknown key. Did you mean 'filter'? Allowed: filter, value.",
        ),
        ("{model: a, weight: [{filter: 3, value: 1}]}", "models[0].weight[0].filter: is 3, allowed is a part of tensor names, as text."),
        ("{model: a, weight: [{value: x}]}", "models[0].weight: model a: weight is 'x', allowed is a number."),
        ("{model: a, weight: [{value: {value: 1}}]}", "models[0].weight[0].value: is a mapping, allowed is a number or a list of numbers."),
        ("{model: a, weight: 1, layers: [0, 2]}", "models[0].layers: belongs into slices:; whole models give all of their layers."),
        ("{model: a, weight: }", "models[0].weight: model a: weight is None, allowed is a number."),
        (
            "{model: a, weight: 1, normalize: false}",
            "models[0].normalize: model a: 'normalize' is one value for the whole merge; put it under parameters:.",
        ),
        ("{model: 5, weight: 1}", "models[0].model: is 5, allowed is text (put quotes around it if it is meant as text)."),
        ("{model: 1e-5, weight: 1}", "models[0].model: is 1e-05, allowed is text (put quotes around it if it is meant as text)."),
        ("{model: , weight: 1}", "models[0].model: is empty, allowed is text (put quotes around it if it is meant as text)."),
        ("{model: '', weight: 1}", "models[0].model: is '', allowed is text that is not empty."),
        ("{model: [a], weight: 1}", "models[0].model: is a list, allowed is text (put quotes around it if it is meant as text)."),
        ("{weight: 1}", "models[0].model: is required and missing."),
    ],
)  # fmt: skip
def test_faults_of_an_entry(entry: str, expected: str, tmp_path: Path) -> None:
    assert faults(tmp_path, f"method: linear\nmodels:\n  - {entry}") == [f"r.yaml:3: {expected}"]


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        ("tokenizer: {source: 5}", "tokenizer.source: is 5, allowed is 'union' or 'base'."),
        ("tokenizer: {source: b}", "tokenizer.source: 'b' is neither union nor base nor a model of this recipe. Its models: a."),
        ("tokenizer: {tokens: {x: {source: q}}}", "tokenizer.tokens.x.source: 'q' is no model of this recipe. Its models: a."),
        (
            "tokenizer: {tokens: {x: {source: {model: a, tokn: y}}}}",
            "tokenizer.tokens.x.source.tokn: unknown key. Did you mean 'token' or 'token_id'? Allowed: model, token, token_id.",
        ),
        (
            "tokenizer: {tokens: {x: {source: {model: a, token: y, token_id: 3}}}}",
            "tokenizer.tokens.x.source: names a token and a token_id; give one of them.",
        ),
        ("into: {model: a}", "into.part: is required and missing."),
        ("into: {model: a, part: 5}", "into.part: is 5, allowed is text (put quotes around it if it is meant as text)."),
        (
            "slices: [{models: [{model: a, layers: [0, 1], weight: 1}]}]",
            "slices: stands beside models; a recipe has one of models, slices, modules, hops.",
        ),
        (
            "base: {model: a, layers: [0, 1]}",
            "base.layers: stands above all slices; give the layers of the base inside the slice, as its base.",
        ),
        ("modules: {x: {}}", "modules: stands beside models; a recipe has one of models, slices, modules, hops."),
        ("missing: skip", "missing: is 'skip', allowed is 'error', 'present' or 'drop'."),
    ],
)
def test_faults_of_the_rest(more: str, expected: str, tmp_path: Path) -> None:
    found = faults(tmp_path, f"method: linear\n{LINEAR}{more}")
    assert found[0] == f"r.yaml:4: {expected}"


def test_ranges_name_the_entry_even_if_a_model_stands_there_twice(tmp_path: Path) -> None:
    text = """\
method: ties
base: b
models:
  - model: a
    weight: 1
    density: 1.5
  - model: a
    weight: 1
    density: 0
"""
    assert faults(tmp_path, text) == [
        "r.yaml:6: models[0].density: model a (number 1): density is 1.5, allowed is (0, 1].",
        "r.yaml:9: models[1].density: model a (number 2): density is 0, allowed is (0, 1].",
    ]


def test_a_label_may_hold_quotes_and_colons(tmp_path: Path) -> None:
    text = 'method: linear\nmodels:\n  - model: "it\'s: here"\n    wieght: 1\n    weight: 1\n'
    assert faults(tmp_path, text) == [
        f"r.yaml:4: models[0].wieght: model it's: here: 'wieght' {NO_PARAMETER} 'weight'? Allowed: weight, normalize."
    ]


def test_several_faults_are_reported_at_once(tmp_path: Path) -> None:
    text = """\
method: linear
models:
  - model: a
    wieght: 1
  - model: b
    weight: x
parameters:
  normalise: true
"""
    assert faults(tmp_path, text) == [
        f"r.yaml:8: parameters.normalise: 'normalise' {NO_PARAMETER} 'normalize'? Allowed: weight, normalize.",
        "r.yaml:4: models[0].wieght: model a: 'wieght' is no parameter of linear. Did you mean 'weight'? Allowed: weight, normalize.",
        "r.yaml:6: models[1].weight: model b: weight is 'x', allowed is a number.",
        "r.yaml:3: models[0].weight: model a: 'weight' is required by linear and missing.",
    ]


def test_faults_inside_nested_recipes(tmp_path: Path) -> None:
    structure = """\
method: linear
models:
  - weight: 1
    model:
      method: ties
      base: x
      models:
        - {model: q, weight: 1}
      sed: 4
base: {method: linear, modles: []}
"""
    assert faults(tmp_path, structure) == [
        f"r.yaml:10: base.modles: unknown key. Did you mean 'modules' or 'models' or 'model'? Allowed: {KEYS}, {SOURCE}.",
        f"r.yaml:9: models[0].model.sed: unknown key. Did you mean 'seed'? Allowed: {KEYS}.",
    ]
    meaning = """\
method: task_arithmetic
base:
  method: linear
  models:
    - model: y
models:
  - weight: 1
    model:
      method: ties
      models:
        - {model: q, weight: 1, dens: 2}
  - weight: 1
    model:
      method: tis
      models:
        - {model: q, weight: 1}
"""
    assert faults(tmp_path, meaning) == [
        "r.yaml:5: base.models[0].weight: model y: 'weight' is required by linear and missing.",
        "r.yaml:11: models[0].model.models[0].dens: model q: 'dens' is no parameter of ties. Did you mean 'density'? Allowed: "
        f"{', '.join(parameter.name for parameter in get('ties').parameters)}.",
        "r.yaml:8: models[0].model: ties needs a base model; add base: REF.",
        f"r.yaml:14: models[1].model.method: there is no merge method 'tis'. Did you mean 'ties'? Known: {METHODS}.",
    ]


def test_parameters_of_the_other_dialect(tmp_path: Path) -> None:
    assert faults(tmp_path, "method: linear\nmodels:\n  - model: a\n    weight: 1\n    parameters: {weight: 1}") == [
        "r.yaml:5: models[0].parameters: model a: 'parameters' is no parameter of linear. Allowed: weight, normalize. "
        "Parameters stand beside 'model' in this dialect."
    ]


def test_mappings_from_python_are_checked_as_strictly() -> None:
    with pytest.raises(RecipeError) as caught:
        read_recipe({"method": "linear", "models": [{"model": "a", "weight": 1}], "sed": 1})
    assert str(caught.value) == f"<recipe>: sed: unknown key. Did you mean 'seed'? Allowed: {KEYS}."


def test_a_long_value_is_shortened_in_the_message(tmp_path: Path) -> None:
    [fault] = faults(tmp_path, f"method: linear\ndtype: {'x' * 100_000}\n{LINEAR}")
    assert fault == f"r.yaml:2: dtype: is '{'x' * 79}..., allowed is a mapping of keys to values."


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(["method", "models", "parameters", "seed", "dtype", "base", "format"]), st.data())
def test_a_misspelt_key_is_answered_with_the_right_one(key: str, data: st.DataObject) -> None:
    """One letter dropped or two exchanged: the nearest name is offered."""
    at = data.draw(st.integers(0, len(key) - 2))
    misspelt = key[:at] + data.draw(st.sampled_from([key[at + 1] + key[at] + key[at + 2 :], key[at + 1 :]]))
    if misspelt == key:
        return
    with pytest.raises(RecipeError) as caught:
        read_recipe({"method": "linear", "models": [{"model": "a", "weight": 1}], misspelt: 1})
    assert f"{misspelt}: unknown key. Did you mean" in str(caught.value)
    assert f"'{key}'" in str(caught.value).split("Allowed:")[0]


# -- writing recipes --------------------------------------------------------------------------------------------------------------


def test_canonical_has_one_order_and_no_empty_keys() -> None:
    recipe = read_recipe(
        {
            "models": [{"weight": 1, "density": 0.5, "model": "a"}, {"model": "b", "weight": 2}],
            "parameters": {"normalize": False, "lambda": 2.0},
            "method": "ties",
            "base": "x",
        }
    )
    assert dump(recipe) == (
        "format: modelglue/1\nmethod: ties\nbase: x\nmodels:\n- model: a\n  density: 0.5\n  weight: 1\n- model: b\n  weight: 2\n"
        "parameters:\n  lambda: 2.0\n  normalize: false\nseed: 0\n"
    )
    assert list(canonical(read_recipe({"method": "linear", "models": [{"model": "a", "weight": 1}]}))) == [
        "format",
        "method",
        "models",
        "seed",
    ]


references = st.one_of(
    st.from_regex(r"[A-Za-z0-9._~/@-]{1,12}", fullmatch=True),
    st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\x85\u2028\u2029"), min_size=1, max_size=12),
    st.sampled_from(["1e-5", "yes", "null", "12:30", "0.5", "{a}", "- x", "#x", "a: b", "'", '"', "007"]),
)
numbers = st.floats(-3, 3).filter(lambda value: abs(value) > 1e-6)


def _value(parameter: Any, data: st.DataObject) -> Any:
    if parameter.choices:
        return data.draw(st.sampled_from(parameter.choices))
    if parameter.type is bool:
        return data.draw(st.booleans())
    if parameter.type is int:
        return data.draw(st.integers(1, 20))
    return data.draw(numbers.map(abs).filter(lambda value: parameter.range is None or value in parameter.range))


def _recipe(data: st.DataObject, depth: int) -> dict[str, Any]:
    """A valid recipe of any method, with any of its parameters, nested up to `depth`."""
    method = data.draw(st.sampled_from(all_methods()))
    count = data.draw(st.integers(method.min_models, method.max_models or 3))

    def node() -> Any:
        return _recipe(data, depth - 1) if depth and data.draw(st.booleans()) else data.draw(references)

    chosen = [parameter for parameter in method.parameters if parameter.required or data.draw(st.booleans())]
    value: dict[str, Any] = {
        "method": method.id,
        "models": [{"model": node(), **{p.name: _value(p, data) for p in chosen if p.per_model}} for _ in range(count)],
        "parameters": {p.name: _value(p, data) for p in chosen if not p.per_model},
        "seed": data.draw(st.integers(0, 2**70)),
    }
    own = [{key: given for key, given in entry.items() if key != "model"} for entry in value["models"]]
    assume(not method.resolve(value["parameters"], own, ["one of them"] * count)[1])  # what single ranges cannot say
    if method.needs_base or data.draw(st.booleans()):
        value["base"] = node()
    if data.draw(st.booleans()):
        value["dtype"] = {"store": data.draw(st.sampled_from(["float32", "float16", "bfloat16"]))}
    return value


@settings(max_examples=120, deadline=None)
@given(data=st.data())
def test_a_recipe_reads_back_equal(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    recipe = read_recipe(_recipe(data, depth=2))
    path = tmp_path_factory.mktemp("recipe") / "r.yaml"
    path.write_text(dump(recipe), encoding="utf-8")
    again = read_recipe(path)
    assert again == recipe
    assert dump(again) == dump(recipe)
    assert read_recipe(canonical(recipe)) == recipe


def test_the_dump_is_plain_yaml() -> None:
    """Any other reader of YAML sees the same values."""
    recipe = read_recipe({"method": "linear", "models": [{"model": "1e-5", "weight": 0.001}], "seed": 3})
    assert yaml.safe_load(dump(recipe)) == canonical(recipe)
