"""`modelglue check`: the report in words and as JSON, and the refusals of `merge`."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.cli.conftest import Run, tree
from tests.recipe.on_disk import write_model, write_recipe


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch) -> dict[str, int | None]:
    """What the machine has free: as much as the test says."""
    free: dict[str, int | None] = {"disk": 5_000_000_000, "memory": 2_000_000_000}
    monkeypatch.setattr("modelglue.cli.check._disk_free", lambda out: free["disk"])
    monkeypatch.setattr("modelglue.cli.check._memory_free", lambda: free["memory"])
    return free


def test_the_report(run: Run, zoo: Path) -> None:
    before = tree(zoo)
    found = run("check", zoo / "recipe.yaml")
    assert (found.code, found.err) == (0, "")
    memory = json.loads(run("check", zoo / "recipe.yaml", "--json").out)["memory_bytes"]
    assert found.text == (
        "method task_arithmetic models a b base base architecture LlamaForCausalLM tensors 14, 0.0 M parameters, stored as F32 "
        f"reads 5.8 kB, once disk 3.3 kB in 1 file; 5.0 GB free memory up to {memory / 1e6:.1f} MB private in 1 worker; 2.0 GB free "
        "ok: this merge will run"
    )
    assert tree(zoo) == before


def test_json(run: Run, zoo: Path) -> None:
    found = run("check", zoo / "recipe.yaml", "--json", "--workers", "2")
    assert (found.code, found.err) == (0, "")
    value = json.loads(found.out)
    assert 250_000_000 < value.pop("memory_bytes") < 1_000_000_000
    assert value == {
        "method": "task_arithmetic", "models": ["a", "b"], "base": "base", "architecture": "LlamaForCausalLM", "tensors": 14,
        "parameters": 480, "read_bytes": 5760, "passes": 1, "output_bytes": 1920, "disk_bytes": 3256, "shards": 1, "workers": 2,
        "store": "F32", "warnings": [], "notes": [], "alignment": None, "disk_free": 5_000_000_000, "memory_free": 2_000_000_000,
    }  # fmt: skip


def test_what_stands_out(run: Run, zoo: Path) -> None:
    """Several workers, two passes, a nested model, no base, no config."""
    (zoo / "a" / "config.json").unlink()
    nested = "{method: ties, base: a, models: [{model: b, weight: 1}]}"
    write_recipe(zoo / "r.yaml", f"method: linear\nmodels:\n  - {{model: {nested}, weight: 1}}\ndtype: {{store: bfloat16}}\n")
    text = run("check", zoo / "r.yaml", "--workers", "3").text
    assert "models (ties merge) base none architecture unknown (no config)" in text
    assert "stored as BF16 reads 3.8 kB, twice disk 2.3 kB in 1 file" in text
    assert "private in 3 workers" in text


def test_what_the_machine_has_too_little_of(run: Run, zoo: Path, machine: dict[str, int | None]) -> None:
    machine["disk"], machine["memory"] = 3000, 1000
    found = run("check", zoo / "recipe.yaml")
    assert found.code == 0
    assert "warning: disk: the merge needs 3.3 kB, 3.0 kB are free now. Choose another disk.\n" in found.out
    assert "MB, 1.0 kB are free now. Set --memory, or use fewer --workers.\n" in found.out
    machine["disk"] = machine["memory"] = None
    found = run("check", zoo / "recipe.yaml")
    assert ("free" in found.out, "warning" in found.out) == (False, False)


def test_what_vocabularies_become(run: Run, zoo: Path) -> None:
    write_model(zoo / "more", 4, words=["<s>", "</s>", "a", "b", "c", "d", "x", "y"])
    write_recipe(
        zoo / "r.yaml", "method: linear\nmodels:\n  - {model: a, weight: 1}\n  - {model: more, weight: 1}\ntokenizer: {source: union}\n"
    )
    text = run("check", zoo / "r.yaml").text
    assert (
        "vocabulary 10 tokens in 10 rows a: 8 rows before; now 8 of its own, 2 of the only model that has the token more: 8 rows before"
        in text
    )
    alignment = json.loads(run("check", zoo / "r.yaml", "--json").out)["alignment"]
    assert (alignment["tokens"], alignment["rows"]) == (10, 10)


def test_limits_and_flags_are_those_of_merge(run: Run, zoo: Path) -> None:
    found = run("check", zoo / "recipe.yaml", "--memory", "1MB")
    assert (found.code, "a memory of 1,000,000 bytes is too little" in found.err) == (2, True)
    found = run("check", zoo / "recipe.yaml", "--memory", "much")
    assert (found.code, "--memory is 'much'; allowed is a positive size such as 500MB, 5GB or 2GiB." in found.err) == (2, True)
    write_recipe(zoo / "r.yaml", "merge_method: linear\nembed_slerp: true\nmodels:\n  - {model: a, parameters: {weight: 1}}\n")
    assert run("check", zoo / "r.yaml").code == 0
    assert run("check", zoo / "r.yaml", "--strict").code == 2


def test_similarity_on_request(run: Run, zoo: Path) -> None:
    for name, seed in (("c", 1), ("d", 1)):  # twins of a
        write_model(zoo / name, seed)
    write_recipe(
        zoo / "r.yaml",
        "method: task_arithmetic\nbase: base\nmodels:\n  - {model: a, weight: 1}\n  - {model: c, weight: 1}\n  - {model: b, weight: 1}\n",
    )
    assert "similarity" not in run("check", zoo / "r.yaml").out
    found = json.loads(run("check", zoo / "r.yaml", "--similarity", "--json").out)
    pairs = {tuple(pair["models"]): pair for pair in found["similarity"]["pairs"]}
    assert set(pairs) == {("a", "c"), ("a", "b"), ("c", "b")}
    assert pairs["a", "c"]["weights"] == pytest.approx(1.0)
    assert pairs["a", "c"]["task_vectors"] == pytest.approx(1.0)
    assert abs(pairs["a", "b"]["weights"]) < 0.5
    far = [warning for warning in found["warnings"] if "alike; below 0.95 a merge seldom keeps" in warning]
    assert [warning.split(" are ")[0] for warning in far] == ["a and b", "c and b"]
    text = run("check", zoo / "r.yaml", "--similarity").text
    assert "a - c: weights 1.0000, task vectors +1.0000" in text


def test_task_vectors_that_point_apart(run: Run, zoo: Path) -> None:
    base, a = load_file(zoo / "base" / "model.safetensors"), load_file(zoo / "a" / "model.safetensors")
    write_model(zoo / "anti", weights={name: base[name] - (a[name] - base[name]) for name in base})
    write_recipe(zoo / "r.yaml", "method: ties\nbase: base\nmodels:\n  - {model: a, weight: 1}\n  - {model: anti, weight: 1}\n")
    out = run("check", zoo / "r.yaml", "--similarity").out
    assert "the task vectors of a and anti point in opposite directions (-1.0000): one takes back what the other adds." in out


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
            ["r.yaml:3: models[0].wieght", "r.yaml:4: models[1].weight", "r.yaml:3: models[0].weight"],
        ),
        (
            "method: linear\nmodels:\n  - {model: ./aa, weight: 1}\n  - {model: ./bb, weight: 1}\n",
            ["r.yaml:3: models[0].model: './aa': no such file", "r.yaml:4: models[1].model: './bb': no such file"],
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
