"""`modelglue convert`: what it prints is the same merge in our dialect."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from modelglue.recipe import canonical, read_recipe
from tests.cli.conftest import Run

CASES = sorted((Path(__file__).parents[1] / "golden" / "files" / "mergekit-models" / "cases").glob("*/recipe.yml"))


@pytest.mark.parametrize("path", CASES, ids=lambda path: path.parent.name)
def test_recipes_of_mergekit_are_printed_as_ours(run: Run, path: Path, tmp_path: Path) -> None:
    found = run("convert", path)
    assert (found.code, found.err) == (0, "")
    assert "merge_method" not in found.out
    (tmp_path / "ours.yaml").write_text(found.out, encoding="utf-8")
    assert read_recipe(tmp_path / "ours.yaml") == read_recipe(path)
    assert yaml.safe_load(found.out) == json.loads(run("convert", path, "--json").out) == canonical(read_recipe(path))
    assert run("convert", tmp_path / "ours.yaml").out == found.out


TEXT = """\
merge_method: karcher
base_model: c
models:
  - model: a
  - model: b
embed_slerp: true
"""


def test_notes_and_warnings_go_to_the_other_stream(run: Run, tmp_path: Path) -> None:
    (tmp_path / "r.yml").write_text(TEXT)
    found = run("convert", tmp_path / "r.yml")
    assert yaml.safe_load(found.out)["models"] == [{"model": name} for name in "abc"]
    assert f"note: {tmp_path}/r.yml:2: base_model: is not among the models" in found.err
    assert f"{tmp_path}/r.yml:6: embed_slerp: has no effect here" in found.err
    strict = run("convert", tmp_path / "r.yml", "--strict")
    assert (strict.code, strict.out) == (2, "")
    assert strict.err.startswith(f"error: {tmp_path}/r.yml:6: embed_slerp: has no effect here")


def test_a_file_is_written_once(run: Run, tmp_path: Path) -> None:
    (tmp_path / "r.yml").write_text(TEXT)
    out = tmp_path / "ours.yaml"
    assert run("convert", tmp_path / "r.yml", out).out == ""
    written = out.read_bytes()
    assert read_recipe(out) == read_recipe(tmp_path / "r.yml")
    again = run("convert", tmp_path / "r.yml", out)
    assert (again.code, again.err.splitlines()[-1]) == (2, f"error: {out}: exists. Choose another name, or say --overwrite.")
    assert run("convert", tmp_path / "r.yml", out, "--overwrite").code == 0
    assert out.read_bytes() == written


def test_recipes_of_other_tools_are_told_by_name(run: Run, tmp_path: Path) -> None:
    (tmp_path / "moe.yml").write_text("base_model: a\nexperts:\n  - source_model: b\n")
    found = run("convert", tmp_path / "moe.yml")
    assert found.code == 2
    assert f"error: {tmp_path}/moe.yml:2: experts: is a recipe for a mixture of experts, not for a merge." in found.err
