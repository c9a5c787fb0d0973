"""`modelglue check`: the report in words and as JSON, and the refusals of `merge`."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.cli.conftest import Run, tree
from tests.recipe.on_disk import write_model, write_recipe


def test_the_report(run: Run, zoo: Path) -> None:
    before = tree(zoo)
    found = run("check", zoo / "recipe.yaml")
    assert (found.code, found.err) == (0, "")
    assert found.text == (
        "method task_arithmetic models a b base base architecture LlamaForCausalLM tensors 14, 0.0 M parameters, stored as F32 "
        "reads 5.8 kB, once writes 1.9 kB memory 2.6 kB of chunks in 1 worker, besides torch itself ok: this merge will run"
    )
    assert tree(zoo) == before


def test_json(run: Run, zoo: Path) -> None:
    found = run("check", zoo / "recipe.yaml", "--json", "--workers", "2")
    assert (found.code, found.err) == (0, "")
    assert json.loads(found.out) == {
        "method": "task_arithmetic", "models": ["a", "b"], "base": "base", "architecture": "LlamaForCausalLM", "tensors": 14,
        "parameters": 480, "read_bytes": 5760, "passes": 1, "output_bytes": 1920, "workers": 2, "memory_bytes": 2 * 4 * 60 * 11,
        "store": "F32", "warnings": [],
    }  # fmt: skip


def test_what_stands_out(run: Run, zoo: Path) -> None:
    """Several workers, two passes, a nested model, no base, no config."""
    (zoo / "a" / "config.json").unlink()
    nested = "{method: ties, base: a, models: [{model: b, weight: 1}]}"
    write_recipe(zoo / "r.yaml", f"method: linear\nmodels:\n  - {{model: {nested}, weight: 1}}\ndtype: {{store: bfloat16}}\n")
    text = run("check", zoo / "r.yaml", "--workers", "3").text
    assert "models (ties merge) base none architecture unknown (no config)" in text
    assert "stored as BF16 reads 3.8 kB, twice writes 960 B" in text
    assert "in 3 workers, besides torch itself" in text


def test_warnings(run: Run, zoo: Path) -> None:
    shutil.rmtree(zoo / "b")
    write_model(zoo / "b", 2, hidden_act="gelu", rope_scaling={"type": "yarn", "factor": 2})
    found = run("check", zoo / "recipe.yaml")
    assert found.code == 0
    assert found.out.splitlines()[-3:] == [
        "warning: b has hidden_act = gelu, base has silu; the output takes the first one's.",
        "warning: b has rope_scaling = {'factor': 2, 'type': 'yarn'}, base has none; the output takes the first one's.",
        "ok: this merge will run",
    ]
    assert len(json.loads(run("check", zoo / "recipe.yaml", "--json").out)["warnings"]) == 2


def test_names_that_look_like_markup(run: Run, zoo: Path) -> None:
    (zoo / "[red]x[").mkdir()
    (zoo / "a").rename(zoo / "[red]x[" / "a]")
    write_recipe(zoo / "r.yaml", "method: linear\nmodels:\n  - {model: '[red]x[/a]', weight: 1}\n")
    assert "models [red]x[/a] base none" in run("check", zoo / "r.yaml").text


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "method: linear\nmodels:\n  - {model: a, wieght: 1}\n  - {model: b, weight: x}\n",
            ["r.yaml:3: models[0].wieght", "r.yaml:3: models[0].weight", "r.yaml:4: models[1].weight"],
        ),
        (
            "method: linear\nmodels:\n  - {model: ./aa, weight: 1}\n  - {model: ./bb, weight: 1}\n",
            ["'./aa': no such file", "'./bb': no such file"],
        ),
    ],
)
@pytest.mark.parametrize("options", [(), ("--json",)])
def test_all_faults_at_once(run: Run, zoo: Path, text: str, expected: list[str], options: tuple[str, ...]) -> None:
    path = write_recipe(zoo / "r.yaml", text)
    found = run("check", path, *options)
    assert (found.code, found.out) == (2, "")
    lines = found.err.removeprefix("error: ").splitlines()
    assert len(lines) == len(expected)
    for line, start in zip(lines, expected, strict=True):
        assert line.removeprefix(f"{zoo}/").startswith(start)


def test_merge_and_check_refuse_in_the_same_words(run: Run, zoo: Path) -> None:
    shutil.rmtree(zoo / "b")
    write_model(zoo / "b", 2, words=["x"])
    by_check, by_merge = run("check", zoo / "recipe.yaml"), run("merge", zoo / "recipe.yaml", zoo / "out")
    assert by_check == by_merge
    assert by_check.code == 2


def test_workers(run: Run, zoo: Path) -> None:
    found = run("check", zoo / "recipe.yaml", "--workers", "0")
    assert found.code == 2
    assert 'Invalid value "0" for --workers. Must be >= 1.' in found.err
