"""mergekit's grammar: every form it has, what it becomes, and what is refused, with the lines and words of the user's own file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from modelglue.errors import RecipeError
from modelglue.methods import all_methods, get
from modelglue.recipe import canonical, dump, read_recipe
from tests.recipe.on_disk import write_recipe


def converted(**value: Any) -> dict[str, Any]:
    return canonical(read_recipe(value))


def read(folder: Path, text: str, **options: Any) -> Any:
    return read_recipe(write_recipe(folder / "r.yaml", text), **options)


def faults(folder: Path, text: str, **options: Any) -> list[str]:
    """The lines of the refusal, without the folder."""
    with pytest.raises(RecipeError) as caught:
        read(folder, text, **options)
    return [line.removeprefix(f"{folder}/") for line in str(caught.value).split("\n")]


def warnings(folder: Path, text: str) -> list[str]:
    """What reading finds odd, without the folder."""
    return [line.removeprefix(f"{folder}/") for line in read(folder, text).warnings]


# -- whole models -----------------------------------------------------------------------------------------------------------------


def test_whole_models() -> None:
    found = converted(
        merge_method="ties",
        base_model="org/base",
        models=[
            {"model": "org/base"},
            {"model": "org/a", "parameters": {"weight": 0.5, "density": 0.3}},
            {"model": "org/b", "parameters": {"weight": 1}},
        ],
        parameters={"normalize": True, "int8_mask": True, "lambda": 0.7},
        dtype="float32",
        out_dtype="torch.bfloat16",
    )
    assert found == {
        "format": "modelglue/1",
        "method": "ties",
        "base": "org/base",
        "models": [{"model": "org/a", "density": 0.3, "weight": 0.5}, {"model": "org/b", "weight": 1}],
        "parameters": {"lambda": 0.7, "normalize": True},
        "seed": 0,
        "dtype": {"compute": "float32", "store": "bfloat16"},
    }


@pytest.mark.parametrize(
    ("given_", "stored"),
    [
        ("float16", "float16"), ("fp16", "float16"), ("half", "float16"), ("bf16", "bfloat16"), ("torch.float32", "float32"),
        ("fp32", "float32"), ("torch.bfloat16", "bfloat16"),
    ],
)  # fmt: skip
def test_dtypes(given_: str, stored: str) -> None:
    models = [{"model": "a", "parameters": {"weight": 1}}]
    assert converted(merge_method="linear", models=models, dtype=given_)["dtype"]["store"] == stored
    assert converted(merge_method="linear", models=models, out_dtype=given_, dtype="float32")["dtype"]["store"] == stored


def test_without_a_dtype_inputs_promote_and_a_method_with_a_base_keeps_the_bases() -> None:
    models = [{"model": "a", "parameters": {"weight": 1}}]
    assert converted(merge_method="linear", models=models)["dtype"]["store"] == "widest"
    assert "dtype" not in converted(merge_method="task_arithmetic", base_model="b", models=models)


def test_slerp_takes_the_base_out_of_the_models() -> None:
    for models in (["x", "y"], ["y", "x"]):
        found = converted(merge_method="slerp", base_model="x", models=[{"model": name} for name in models], parameters={"t": 0.3})
        assert (found["base"], found["models"]) == ("x", [{"model": "y"}])


def test_linear_and_the_base(tmp_path: Path) -> None:
    """Listed, it only gives config and tokenizer; unlisted, it joins the average where a shared weight is its own as well."""
    models = [{"model": "a", "parameters": {"weight": 1}}, {"model": "b", "parameters": {"weight": 2}}]
    found = converted(merge_method="linear", base_model="b", models=models)
    assert (found["base"], [entry["model"] for entry in found["models"]]) == ("b", ["a", "b"])
    found = converted(merge_method="linear", base_model="c", models=models)
    assert (found["base"], [entry["model"] for entry in found["models"]]) == ("c", ["a", "b"])
    found = converted(merge_method="linear", base_model="c", models=models, parameters={"weight": 3})
    assert found["models"] == [{"model": "a", "weight": 1}, {"model": "b", "weight": 2}, {"model": "c"}]
    recipe = read(tmp_path, "merge_method: karcher\nbase_model: c\nmodels:\n  - model: a\n  - model: b\n", strict=True)
    assert [entry.model for entry in recipe.models] == ["a", "b", "c"]
    assert [note.removeprefix(f"{tmp_path}/") for note in recipe.notes] == [
        "r.yaml:2: base_model: is not among the models; karcher has no base, so it is merged as one of them."
    ]


def test_passthrough_and_the_base() -> None:
    found = converted(merge_method="passthrough", base_model="c", models=[{"model": "a"}])
    assert (found["base"], found["models"]) == ("c", [{"model": "a"}])


@pytest.mark.parametrize("method", [method.id for method in all_methods()])
def test_every_method_is_taken_by_its_name(method: str) -> None:
    known = get(method)
    each = {p.name: 0.5 for p in known.parameters if p.required and p.per_model}
    names = [f"m{number}" for number in range(known.min_models)]
    found = converted(
        merge_method=method,
        base_model="m0" if not known.takes_base else "base",
        models=[{"model": name, "parameters": each} for name in names],
        parameters={p.name: 0.5 for p in known.parameters if p.required and not p.per_model},
    )
    assert found["method"] == method
    assert [entry["model"] for entry in found["models"]] == names


def test_defaults_that_differ_there_are_written_down() -> None:
    value: dict[str, Any] = {"merge_method": "model_stock", "base_model": "x", "models": [{"model": "a"}, {"model": "b"}]}
    assert converted(**value)["parameters"] == {"clip_ratio": False}
    assert converted(**value, parameters={"clip_ratio": True})["parameters"] == {"clip_ratio": True}


def test_one_model_twice_is_two_inputs() -> None:
    models = [{"model": "a", "parameters": {"weight": 0.1}}, {"model": "a", "parameters": {"weight": 1}}]
    assert converted(merge_method="linear", models=models)["models"] == [{"model": "a", "weight": 0.1}, {"model": "a", "weight": 1}]


@pytest.mark.parametrize(
    ("given_", "entry"),
    [
        ("org/a@main+./lora", {"model": "org/a@main+./lora"}),
        ({"model": "org/a"}, {"model": "org/a"}),
        ({"model": {"path": "org/a"}}, {"model": "org/a"}),
        ({"model": {"path": "org/a", "revision": "v1"}, "lora": {"path": "org/l", "revision": "v2"}}, {"model": "org/a@v1+org/l@v2"}),
        ({"model": "org/a", "lora": "org/l"}, {"model": "org/a+org/l"}),
        ({"model": "org/a", "override_architecture": "LlamaForCausalLM"}, {"model": "org/a", "architecture": "LlamaForCausalLM"}),
    ],
)
def test_references_as_text_and_as_mappings(given_: Any, entry: dict[str, str]) -> None:
    models = [{"model": given_, "parameters": {"weight": 1}}]
    assert converted(merge_method="linear", models=models)["models"] == [{**entry, "weight": 1}]
    base = converted(merge_method="task_arithmetic", base_model=given_, models=[{"model": "x", "parameters": {"weight": 1}}])["base"]
    assert base == (entry["model"] if len(entry) == 1 else entry)


# -- settings ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given_", "taken"),
    [
        (0.5, 0.5),
        ("0.5", 0.5),
        (True, 1.0),
        ([0, "1", True], [0, 1.0, 1.0]),
        ([{"filter": "mlp", "value": "2"}, {"value": [0, 1]}], [{"filter": "mlp", "value": 2.0}, {"value": [0, 1]}]),
        ({"filter": "mlp", "value": 2}, {"filter": "mlp", "value": 2}),
    ],
)
def test_settings(given_: Any, taken: Any) -> None:
    value = {"merge_method": "linear", "models": [{"model": "a", "parameters": {"weight": given_}}], "parameters": {"weight": 1}}
    assert converted(**value)["models"] == [{"model": "a", "weight": taken}]


def test_truth_values_stay_what_they_are() -> None:
    models = [{"model": "a", "parameters": {"weight": 1}}]
    assert converted(merge_method="linear", models=models, parameters={"normalize": False})["parameters"] == {"normalize": False}
    found = converted(merge_method="linear", models=models, parameters={"normalize": [{"value": True}]})
    assert found["parameters"] == {"normalize": [{"value": True}]}


@pytest.mark.parametrize(("word", "means"), [("yes", True), ("On", True), ("no", False), ("OFF", False)])
def test_truth_values_of_older_yaml(word: str, means: bool, tmp_path: Path) -> None:
    entries = f"models:\n  - model: a\n    parameters: {{weight: 1}}\n  - model: b\n    parameters: {{weight: {word}}}\n"
    found = canonical(read(tmp_path, f"merge_method: linear\n{entries}parameters: {{normalize: {word}}}\n", strict=True))
    assert found["parameters"] == {"normalize": means}
    assert found["models"][1] == {"model": "b", "weight": float(means)}


# -- slices and modules -----------------------------------------------------------------------------------------------------------

SLICES = """\
merge_method: {method}
base_model: base
slices:
  - sources:
      - {{model: base, layer_range: {base}}}
      - {{model: a, layer_range: [0, 4], parameters: {{weight: 0.3}}}}
    parameters: {{density: 0.5}}
parameters: {{lambda: 2}}
"""


def test_the_base_of_a_slice_is_no_model_of_it(tmp_path: Path) -> None:
    found = canonical(read(tmp_path, SLICES.format(method="ties", base="[0, 4]")))
    assert found["slices"] == [{"models": [{"model": "a", "layers": [0, 4], "weight": 0.3}], "parameters": {"density": 0.5}}]
    found = canonical(read(tmp_path, SLICES.format(method="ties", base="[4, 8]")))
    assert found["slices"][0]["base"] == {"model": "base", "layers": [4, 8]}


def test_a_slice_may_have_a_base_of_its_own() -> None:
    part = {"base_model": "b", "sources": [{"model": "a", "layer_range": [0, 2]}, {"model": "b", "layer_range": [0, 2]}]}
    found = converted(merge_method="slerp", base_model="base", slices=[part], parameters={"t": 0.5})
    assert (found["base"], found["slices"]) == ("base", [{"base": "b", "models": [{"model": "a", "layers": [0, 2]}]}])


def test_layers_of_one_model_against_others_of_its_own() -> None:
    sources = [{"model": "a", "layer_range": [0, 2]}, {"model": "a", "layer_range": [2, 4]}]
    found = converted(merge_method="slerp", base_model="a", slices=[{"sources": sources}], parameters={"t": 0.5})
    assert found["slices"] == [{"base": {"model": "a", "layers": [0, 2]}, "models": [{"model": "a", "layers": [2, 4]}]}]


def test_modules() -> None:
    found = converted(
        merge_method="linear",
        modules={
            "encoder": {"models": [{"model": "a"}, {"model": "b"}], "parameters": {"weight": 2}},
            "decoder": {"slices": [{"sources": [{"model": "a", "layer_range": [0, 1]}]}]},
        },
        parameters={"weight": 1},
    )
    assert found["modules"] == {
        "encoder": {"models": [{"model": "a"}, {"model": "b"}], "parameters": {"weight": 2}},
        "decoder": {"slices": [{"models": [{"model": "a", "layers": [0, 1]}]}]},
    }


# -- tokenizer, chat template, settings of ours -------------------------------------------------------------------------------------

TWO = "merge_method: linear\nparameters: {weight: 1}\nmodels:\n  - model: a\n  - model: base\n"


@pytest.mark.parametrize(
    ("text", "section"),
    [
        ("tokenizer_source: union", {"source": "union"}),
        ("tokenizer_source: base", {"source": "base"}),
        ("tokenizer_source: a", {"source": {"model": "a"}}),
        ("tokenizer_source: model:a", {"source": {"model": "a"}}),
        ("tokenizer: {}", {"source": "union"}),
        ("tokenizer: {source: {model: {path: a}}, pad_to_multiple_of: 8}", {"source": {"model": "a"}, "pad_to_multiple_of": 8}),
        ("tokenizer: {tokens: {x: {source: base}}}", {"source": "union", "tokens": {"x": {"source": {"model": "base"}}}}),
        (
            "tokenizer: {tokens: {x: {source: {kind: zero}, force: true}}}",
            {"source": "union", "tokens": {"x": {"source": "zero", "force": True}}},
        ),
        ("tokenizer: {tokens: {x: {force: true}, y: }}", {"source": "union", "tokens": {"x": {"force": True}, "y": {}}}),
        (
            "tokenizer: {tokens: {x: {source: {kind: model_token, model: a, token: y}}}}",
            {"source": "union", "tokens": {"x": {"source": {"model": "a", "token": "y"}}}},
        ),
        (
            "tokenizer: {tokens: {x: {source: {kind: model_token, model: a, token_id: 3}}}}",
            {"source": "union", "tokens": {"x": {"source": {"model": "a", "token_id": 3}}}},
        ),
    ],
)
def test_tokenizer_sections(text: str, section: dict[str, Any], tmp_path: Path) -> None:
    recipe = read(tmp_path, TWO + text)
    assert canonical(recipe)["tokenizer"] == section
    assert read_recipe(canonical(recipe)) == recipe


def test_settings_of_ours_may_be_added() -> None:
    found = converted(
        merge_method="linear", models=[{"model": "a", "parameters": {"weight": 1}}], chat_template="chatml", seed=3, missing="drop",
        vocab_mismatch="truncate", on_shape_mismatch="skip", allow_mixed=True,
    )  # fmt: skip
    assert {key: found[key] for key in ("chat_template", "seed", "missing", "vocabulary_mismatch", "shape_mismatch", "allow_mixed")} == {
        "chat_template": "chatml", "seed": 3, "missing": "drop", "vocabulary_mismatch": "truncate", "shape_mismatch": "skip",
        "allow_mixed": True,
    }  # fmt: skip


# -- several documents --------------------------------------------------------------------------------------------------------------

SEVERAL = """\
name: one
merge_method: linear
models:
  - model: a
    parameters: {weight: 1}
dtype: float16
---
name: two
merge_method: slerp
base_model: one
models:
  - model: b
parameters: {t: 0.5}
---
merge_method: task_arithmetic
base_model: b
models:
  - {model: one, parameters: {weight: 1}}
  - {model: two, parameters: {weight: 2}}
dtype: bfloat16
"""


def test_documents_nest_and_are_rounded_each(tmp_path: Path) -> None:
    one = {
        "format": "modelglue/1", "method": "linear", "models": [{"model": "a", "weight": 1}], "seed": 0,
        "dtype": {"compute": "float32", "store": "float16"},
    }  # fmt: skip
    two = {
        "format": "modelglue/1", "method": "slerp", "base": one, "models": [{"model": "b"}], "parameters": {"t": 0.5}, "seed": 0,
        "dtype": {"compute": "float32", "store": "donor"},
    }  # fmt: skip
    recipe = read(tmp_path, SEVERAL)
    assert canonical(recipe) == {
        "format": "modelglue/1", "method": "task_arithmetic", "base": "b",
        "models": [{"model": one, "weight": 1}, {"model": two, "weight": 2}], "seed": 0,
        "dtype": {"compute": "float32", "store": "bfloat16"},
    }  # fmt: skip
    assert read_recipe(canonical(recipe)) == recipe
    assert (recipe.warnings, recipe.notes) == ((), ())


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("base_model: b\n", "base_modle: b\n", ["r.yaml:16: base_modle: unknown key. Did you mean 'base_model'? Allowed: "]),
        ("weight: 1}\ndtype: float16", "wieght: 1}\ndtype: float16", ["r.yaml:5: models[0].parameters.wieght: is no parameter of linear."]),
        ("t: 0.5", "t: x", ["r.yaml:13: parameters.t: t is 'x', allowed is a number."]),
        ("name: two\n", "name: one\n", ["r.yaml:8: name: 'one' is the name of another document as well."]),
        ("name: two\n", "", ["r.yaml:14: has no name; at most one document, the result, may go without."]),
        ("model: a\n", "model: two\n", ["r.yaml:1: name: the documents form a circle: one -> two -> one."]),
        ("merge_method: slerp\n", "method: slerp\n", ["r.yaml:8: has no merge_method; every document of a file with several is a recipe."]),
    ],
)
def test_faults_of_several_documents(old: str, new: str, expected: list[str], tmp_path: Path) -> None:
    assert SEVERAL.count(old) == 1
    found = faults(tmp_path, SEVERAL.replace(old, new))
    assert len(found) == len(expected)
    for line, start in zip(found, expected, strict=True):
        assert line.startswith(start)


def test_the_result_may_have_a_name_and_what_it_does_not_use_is_said(tmp_path: Path) -> None:
    recipe = read(tmp_path, SEVERAL.replace("merge_method: task", "name: last\nmerge_method: task"))
    assert recipe.method == "task_arithmetic"
    lines = warnings(tmp_path, SEVERAL.replace("{model: two, parameters: {weight: 2}}", "{model: c, parameters: {weight: 2}}"))
    assert lines == ["r.yaml:8: name: the result does not use the document 'two'; it is not merged."]
    circle = SEVERAL.split("---")[0].replace("model: a", "model: two") + "---" + SEVERAL.split("---")[1]
    assert faults(tmp_path, circle) == ["r.yaml: every document is an input of another, so there is no result: they form a circle."]


def test_documents_that_use_each_other_without_end_are_refused(tmp_path: Path) -> None:
    first = "name: d0\nmerge_method: linear\nparameters: {weight: 1}\nmodels:\n  - model: a\n"
    twice = "name: d{}\nmerge_method: linear\nparameters: {{weight: 1}}\nmodels:\n  - model: d{}\n  - model: d{}\n"
    text = "---\n".join([first, *(twice.format(number, number - 1, number - 1) for number in range(1, 40))])
    assert faults(tmp_path, text) == ["r.yaml: the documents use each other more than 1,000 times when written out."]


def test_several_documents_of_ours_are_nested_by_hand(tmp_path: Path) -> None:
    text = "method: linear\nmodels: [{model: a, weight: 1}]\n"
    assert faults(tmp_path, f"{text}---\n{text}") == ["r.yaml: holds 2 YAML documents, one is allowed here. Nest recipes as models."]


# -- refusals -----------------------------------------------------------------------------------------------------------------------

LINEAR = "merge_method: linear\nmodels:\n  - model: a\n    parameters: {weight: 1}\n"
TOP = "merge_method, models, slices, modules, base_model, parameters, dtype, out_dtype, tokenizer_source, tokenizer, chat_template, name"
PART = (
    "merge_method: {method}\n{more}slices:\n  - sources:\n      - {{model: a, layer_range: {a}}}\n      - {{model: b, layer_range: {b}}}\n"
)


def slices(a: str, b: str, method: str = "linear", more: str = "parameters: {weight: 1}\n") -> str:
    return PART.format(method=method, more=more, a=a, b=b)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (LINEAR + "base_modle: x", f"r.yaml:5: base_modle: unknown key. Did you mean 'base_model'? Allowed: {TOP}."),
        (LINEAR + "sources: []", f"r.yaml:5: sources: does not belong here. Did you mean 'slices'? Allowed: {TOP}."),
        (LINEAR.replace("merge_method", "merge_methd"), "r.yaml:1: merge_methd: unknown key. Did you mean 'merge_method'?"),
        (LINEAR + "weight: 1", "r.yaml:5: weight: is a parameter. Parameters stand under 'parameters:' in this dialect."),
        (LINEAR + "parameters: [1]", "r.yaml:5: parameters: is a list, allowed is a mapping of parameter names to values."),
        (LINEAR + "parameters:\n  weight: x", "r.yaml:6: parameters.weight: weight is 'x', allowed is a number."),
        (LINEAR + "parameters:\n  normalize: [0, .5]", "r.yaml:6: parameters.normalize: normalize is 0.5, allowed is true or false."),
        (
            LINEAR + "dtype: int64",
            "r.yaml:5: dtype: is 'int64', which would round every weight to a whole number. Allowed: float32, float16, bfloat16.",
        ),
        (LINEAR + "dtype: bf17", "r.yaml:5: dtype: is 'bf17', allowed is float32, float16 or bfloat16."),
        (LINEAR + "dtype: float32\nout_dtype: fp8", "r.yaml:6: out_dtype: is 'fp8', allowed is float32, float16 or bfloat16."),
        (
            LINEAR + "base_model: {path: x}",
            "r.yaml:5: base_model: is a mapping, allowed is a reference as text, or {model: {path, revision}, lora: {path, revision}}.",
        ),
        (
            LINEAR + "base_model: {model: {pth: x}}",
            "r.yaml:5: base_model.model: is a mapping, allowed is a path as text, or {path, revision}.",
        ),
        (LINEAR + "slices: [x]", "r.yaml:5: slices: stands beside models; a recipe has one of models, slices, modules."),
        (
            LINEAR + "tokenizer: {}\ntokenizer_source: base",
            "r.yaml:6: tokenizer_source: stands beside 'tokenizer'; give one of them.",
        ),
        (
            LINEAR + "tokenizer_source: uninon",
            "r.yaml:5: tokenizer_source: 'uninon' is neither union nor base nor a model of this recipe. "
            "Did you mean 'union'? Its models: a.",
        ),
        (
            LINEAR + "tokenizer: {tokens: {x: {source: q}}}",
            "r.yaml:5: tokenizer.tokens.x.source: 'q' is no model of this recipe. Its models: a.",
        ),
        (
            LINEAR + "tokenizer: {tokens: {x: {source: {kind: model_token, model: a}}}}",
            "r.yaml:5: tokenizer.tokens.x.source: needs exactly one of token and token_id.",
        ),
        (
            LINEAR + "tokenizer: {tokens: {x: {source: {kind: mean}}}}",
            "r.yaml:5: tokenizer.tokens.x.source.kind: is 'mean', allowed is zero or model_token.",
        ),
        (LINEAR + "tokenizer: {pad_to_multiple_of: 0}", "r.yaml:5: tokenizer.pad_to_multiple_of: is 0, allowed is a number >= 1."),
        (
            LINEAR + "tokenizer: {pad_to_multiple: 8}",
            "r.yaml:5: tokenizer.pad_to_multiple: unknown key. Did you mean 'pad_to_multiple_of'? "
            "Allowed: source, tokens, pad_to_multiple_of.",
        ),
        (LINEAR + "missing: skip", "r.yaml:5: missing: is 'skip', allowed is 'error', 'present' or 'drop'."),
        (LINEAR + "vocab_mismatch: cut", "r.yaml:5: vocab_mismatch: is 'cut', allowed is 'error' or 'truncate'."),
        ("merge_method: linear", "r.yaml:1: has none of models, slices, modules; a recipe has one of them."),
        ("merge_method: linear\nmodels: []", "r.yaml:2: models: is empty; a recipe says in one of models, slices, modules what is merged."),
        ("merge_method: linear\nslices:", "r.yaml:2: slices: is empty; a recipe says in one of models, slices, modules what is merged."),
        ("merge_method: linear\nmodels: {a: 1}", "r.yaml:2: models: is a mapping, allowed is a list of {model: REF, parameters: {...}}."),
        ("merge_method: linear\nmodels:\n  - a\n", "r.yaml:3: models[0]: is 'a', allowed is {model: REF, parameters: {...}}."),
        (
            "merge_method: linear\nmodels:\n  - parameters: {weight: 1}\n",
            "r.yaml:3: models[0]: has no model; allowed is {model: REF, parameters: {...}}.",
        ),
        (
            "merge_method: linear\nmodels:\n  - model: a\n    weight: 1\n",
            "r.yaml:4: models[0].weight: is a parameter. Parameters stand under 'parameters:' in this dialect.",
        ),
        (
            "merge_method: linear\nmodels:\n  - model: a\n    wieght: 1\n",
            "r.yaml:4: models[0].wieght: is a parameter. Parameters stand under 'parameters:' in this dialect.",
        ),
        (
            "merge_method: linear\nmodels:\n  - model: a\n    parameters: 3\n",
            "r.yaml:4: models[0].parameters: is 3, allowed is a mapping of parameter names to values.",
        ),
        (
            "merge_method: linear\nmodels:\n  - model: a\n",
            "r.yaml:3: models[0].parameters.weight: model a: 'weight' is required by linear and missing.",
        ),
        (
            "merge_method: linear\nmodels:\n  - model: a\n    parameters:\n      wieght: 1\n      weight: 1\n",
            "r.yaml:5: models[0].parameters.wieght: is no parameter of linear. Did you mean 'weight'? Allowed: weight, normalize.",
        ),
        (
            "merge_method: linear\nmodels:\n  - model: a\n    parameters:\n      weight:\n        - {fliter: x, value: 1}\n",
            "r.yaml:6: models[0].parameters.weight[0].fliter: unknown key. Did you mean 'filter'? Allowed: filter, value.",
        ),
        ("merge_method: slerp\nparameters: {t: 0.5}\nmodels:\n  - model: a\n", "r.yaml:1: slerp needs a base model; add base_model: REF."),
        (
            "merge_method: slerp\nbase_model: a\nparameters: {t: 0.5}\nmodels:\n  - model: b\n  - model: c\n",
            "r.yaml:1: slerp takes exactly 1 model besides the base, the recipe has 2.",
        ),
        (
            "merge_method: passthrough\nmodels:\n  - model: b\n  - model: c\n",
            "r.yaml:1: passthrough takes exactly 1 model, the recipe has 2.",
        ),
        (
            slices("[0, 2]", "[0, 3]"),
            "r.yaml:4: slices[0]: takes 3 layers of b [0, 3] and 2 of a [0, 2]; all models of a slice give equally many.",
        ),
        (slices("[3, 1]", "[0, 2]"), "r.yaml:5: slices[0].sources[0].layer_range: model a: is [3, 1], allowed is [a, b] with 0 <= a < b."),
        (slices("[0, 1.5]", "[0, 2]"), "r.yaml:5: slices[0].sources[0].layer_range: is [0, 1.5], allowed is [first, last + 1]."),
        (slices("[0, 1, 2]", "[0, 2]"), "r.yaml:5: slices[0].sources[0].layer_range: is [0, 1, 2], allowed is [first, last + 1]."),
        (
            slices("[0, 2]", "[0, 2]").replace("b, layer_range: [0, 2]", "b"),
            "r.yaml:6: slices[0].sources[1].layer_range: model b: is required in a slice and missing; give [first, last + 1].",
        ),
        (
            slices("[0, 2]", "[2, 4]", "ties", "base_model: q\nparameters: {weight: 1}\n"),
            "r.yaml:5: slices[0]: does not say which layers of the base it takes, and its models' ranges differ. "
            "Add the base with its range.",
        ),
        ("experts: []\nbase_model: a", "r.yaml:1: experts: is a recipe for a mixture of experts, not for a merge."),
        ("tasks: []\ngenome: {}", "r.yaml:2: genome: is a plan for an evolutionary search, not a merge."),
    ],
)
def test_refusals(text: str, expected: str, tmp_path: Path) -> None:
    [found] = faults(tmp_path, text)
    assert found == expected or (expected.endswith("merge.") and found.startswith(expected))


def test_a_key_of_another_place_that_is_nearly_one_of_this(tmp_path: Path) -> None:
    found = faults(tmp_path, "merge_method: passthrough\nslices:\n  - source: [{model: a, layer_range: [0, 1]}]\n")
    assert found[0] == "r.yaml:3: slices[0].source: does not belong here. Did you mean 'sources'? Allowed: sources, base_model, parameters."


def test_whole_numbers_may_be_written_otherwise(tmp_path: Path) -> None:
    text = slices('[0.0, "2"]', "[0, 2]") + "tokenizer: {source: union, pad_to_multiple_of: 64.0}\n"
    found = canonical(read(tmp_path, text, strict=True))
    assert [entry["layers"] for entry in found["slices"][0]["models"]] == [[0, 2], [0, 2]]
    assert found["tokenizer"]["pad_to_multiple_of"] == 64


def test_a_value_of_the_whole_merge_has_no_effect_on_one_model(tmp_path: Path) -> None:
    """As in mergekit, whose grammar takes any parameter anywhere; but it is said."""
    text = "merge_method: ties\nbase_model: x\nmodels:\n  - model: a\n    parameters: {weight: 1, normalize: false, int8_mask: true}\n"
    expected = (
        "r.yaml:5: models[0].parameters.normalize: is one value for the whole merge, so it has no effect here; "
        "it belongs under the recipe's parameters."
    )
    assert warnings(tmp_path, text) == [expected]
    assert canonical(read(tmp_path, text))["models"] == [{"model": "a", "weight": 1}]
    assert faults(tmp_path, text, strict=True) == [expected]


def test_a_method_without_its_base_is_one_fault(tmp_path: Path) -> None:
    text = "merge_method: slerp\nparameters: {t: 0.5}\nmodels:\n  - model: a\n  - model: b\n"
    assert faults(tmp_path, text) == ["r.yaml:1: slerp needs a base model; add base_model: REF."]


def test_layer_ranges_count_forward(tmp_path: Path) -> None:
    assert faults(tmp_path, slices("[0, -1]", "[-2, 1]")) == [
        "r.yaml:5: slices[0].sources[0].layer_range: model a: is [0, -1], allowed is [a, b] with 0 <= a < b.",
        "r.yaml:6: slices[0].sources[1].layer_range: model b: is [-2, 1], allowed is [a, b] with 0 <= a < b.",
    ]


def test_an_unknown_method_is_answered_with_the_nearest(tmp_path: Path) -> None:
    [found] = faults(tmp_path, LINEAR.replace("linear", "linaer"))
    assert found.startswith("r.yaml:1: merge_method: there is no merge method 'linaer'. Did you mean 'linear'? Known: ")


def test_faults_are_reported_at_once(tmp_path: Path) -> None:
    text = """\
merge_method: ties
base_modell: x
models:
  - model: a
    weight: 1
  - model: b
    parameters: {weight: 1, density: 1.5}
parameters: 3
dtype: int8
"""
    assert [fault.split(" ")[0] for fault in faults(tmp_path, text)] == [
        "r.yaml:2:",
        "r.yaml:8:",
        "r.yaml:5:",
        "r.yaml:9:",
        "r.yaml:7:",
        "r.yaml:1:",
    ]


# -- warnings -----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (LINEAR + "embed_slerp: true\n", ["r.yaml:5: embed_slerp: has no effect here; older versions knew it. It is ignored."]),
        (LINEAR + "normalize: true\n", ["r.yaml:5: normalize: has no effect here; older versions knew it. It is ignored."]),
        (LINEAR + "comment: mine\n", [f"r.yaml:5: comment: unknown key; it is ignored. Allowed: {TOP}."]),
        (
            LINEAR + "    layer_range: [0, 2]\n",
            ["r.yaml:5: models[0].layer_range: has no effect here; older versions knew it. It is ignored."],
        ),
        (
            slices("[0, 2]", "[0, 2]") + "    residual_weight: 0.5\n",
            ["r.yaml:7: slices[0].residual_weight: has no effect here; older versions knew it. It is ignored."],
        ),
        (
            LINEAR + "parameters: {density: 0.5}\n",
            ["r.yaml:5: parameters.density: is no parameter of linear; it is ignored. Allowed: weight, normalize."],
        ),
        (LINEAR + "parameters: {int8_mask: true}\nname: x\n", []),
        (
            LINEAR + "parameters: {normalize: [{filter: 'layers.*.mlp', value: 1}, {value: 0}]}\n",
            [
                "r.yaml:5: parameters.normalize: the filter 'layers.*.mlp' is taken literally, as a part of tensor names; "
                "it is no pattern.",
            ],
        ),
        (LINEAR + "parameters: {normalize: [{filter: '*', value: 1}]}\n", []),
    ],
)
def test_warnings_and_strict(text: str, expected: list[str], tmp_path: Path) -> None:
    assert warnings(tmp_path, text) == expected
    if expected:
        assert faults(tmp_path, text, strict=True) == expected
    else:
        read(tmp_path, text, strict=True)


def test_what_is_converted_reads_back_to_the_same_recipe(tmp_path: Path) -> None:
    for text in (LINEAR, SEVERAL, slices("[0, 2]", "[0, 2]"), SLICES.format(method="ties", base="[4, 8]"), TWO + "tokenizer_source: union"):
        recipe = read(tmp_path, text)
        assert read_recipe(write_recipe(tmp_path / "ours.yaml", dump(recipe))) == recipe
