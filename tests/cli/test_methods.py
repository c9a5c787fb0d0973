"""`modelglue methods`: the catalogue as the signatures declare it."""

from __future__ import annotations

import json

import pytest

from modelglue.methods import all_methods, get
from tests.cli.conftest import Run

IDS = [method.id for method in all_methods()]


def test_the_list(run: Run) -> None:
    found = run("methods")
    assert (found.code, found.err) == (0, "")
    lines = found.out.splitlines()
    assert lines[0].split() == ["method", "base", "reads", "inputs", "holds", "what", "it", "does"]
    first = {line.split()[0]: line.split()[1:4] for line in lines[1:] if line and not line.startswith((" ", "modelglue"))}
    assert list(first) == IDS
    assert first["linear"][:2] == ["once", "element"]
    assert first["ties"] == ["yes", "twice", "element"]
    assert lines[-1] == "modelglue methods NAME explains one."
    for method in all_methods():
        assert method.summary.split()[0] in found.out


@pytest.mark.parametrize("name", IDS)
def test_an_explanation(run: Run, name: str) -> None:
    found = run("methods", name)
    assert (found.code, found.err) == (0, "")
    method = get(name)
    assert found.out.splitlines()[0] == f"{name}  {method.source}"
    assert " ".join(method.doc.partition("Parameters:")[0].split()) in found.text
    assert ("\nparameter " in found.out) == bool(method.parameters)
    rows = found.out.partition("\nparameter ")[2].splitlines()[1:]
    assert [row.split()[0] for row in rows if not row.startswith(" ")] == [parameter.name for parameter in method.parameters]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("linear", "Takes 1 model or more. parameter"),
        ("slerp", "Takes a base and 1 model. parameter"),
        ("arcee_fusion", "Takes a base and 1 model. It has no parameters."),
        ("multislerp", "Takes a base, if one is given, and 1 model or more. parameter"),
        (
            "model_stock",
            "Takes a base and 2 models or more. Where a recipe of mergekit does not say, it means clip_ratio: false. parameter",
        ),
        ("task_arithmetic", "Takes a base and 1 model or more. There, density and rescale may stand and have no effect. parameter"),
    ],
)
def test_what_a_method_takes(run: Run, name: str, said: str) -> None:
    assert said in run("methods", name).text


def test_the_rows_of_a_parameter_table(run: Run) -> None:
    rows = {line.split()[0]: line.split() for line in run("methods", "ties").out.splitlines() if line.strip()}
    assert rows["weight"][1:4] == ["model", "float", "required"]
    assert rows["density"][1:6] == ["model", "float", "1.0", "(0,", "1]"]
    assert rows["normalize"][1:4] == ["merge", "bool", "true"]
    assert rows["trim_scope"][1:7] == ["merge", "str", "tensor", "tensor", "|", "model"]


def test_json(run: Run) -> None:
    found = json.loads(run("methods", "--json").out)
    assert [method["id"] for method in found] == IDS
    assert json.loads(run("methods", "dare_ties", "--json").out) == [found[IDS.index("dare_ties")]]


def test_the_schema_of_one_method(run: Run) -> None:
    [found] = json.loads(run("methods", "dare_ties", "--json").out)
    parameters = {parameter["name"]: parameter for parameter in found.pop("parameters")}
    summary = found.pop("summary")
    assert summary == get("dare_ties").summary
    assert found == {
        "id": "dare_ties", "source": "DARE, arXiv 2311.03099, with the election of TIES, arXiv 2306.01708", "units": ["element"],
        "returns": "tensor", "needs_base": True, "takes_base": True, "surveys": True, "random": True, "symmetric": False,
        "models": {"least": 1, "most": None},
    }  # fmt: skip
    assert list(parameters) == ["weight", "density", "lambda", "normalize", "rescale", "rescale_by"]
    assert parameters["density"] == {
        "name": "density", "per_model": True, "type": "float", "required": False, "default": 1.0, "choices": [], "range": "[0, 1]",
        "doc": "probability with which an entry of this model's task vector is kept.",
    }  # fmt: skip
    assert parameters["weight"]["required"] is True
    assert parameters["weight"]["default"] is None
    assert parameters["rescale_by"]["choices"] == ["length", "inverse"]


def test_an_unknown_method(run: Run) -> None:
    found = run("methods", "tis")
    assert (found.code, found.out) == (2, "")
    assert found.err == f"error: there is no merge method 'tis'. Did you mean 'ties'? Known: {', '.join(IDS)}.\n"
