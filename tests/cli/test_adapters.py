"""`modelglue extract-lora` and `modelglue merge-adapters`, one after the other, and what a merge does with the result."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from modelglue.checkpoint import SafetensorsCheckpoint, open_checkpoint
from modelglue.checkpoint.adapter import open_adapter
from tests.adapters.on_disk import write_adapter
from tests.checkpoint.files import names_in, randn
from tests.cli.conftest import Run, tree
from tests.recipe.on_disk import write_recipe


def test_a_model_is_taken_apart_and_put_together(run: Run, zoo: Path) -> None:
    found = run("extract-lora", zoo / "a", zoo / "base", zoo / "lora", "--rank", "64")
    assert found.code == 0
    assert found.err.startswith(f"{zoo}/lora: rank up to 6, ")
    assert found.err.endswith("0.0% of the decomposed difference is lost\n")
    assert found.text.startswith("module as tensors rank error stable rank size ")
    ours, again = SafetensorsCheckpoint(zoo / "a"), open_checkpoint(f"{zoo}/base+{zoo}/lora")
    for name in ours.names():
        torch.testing.assert_close(again.tensor(name), ours.tensor(name), rtol=1e-5, atol=1e-6)


def test_extraction_as_json_with_options(run: Run, zoo: Path) -> None:
    options = ["--energy", "0.5", "--dtype", "bfloat16", "--scale-in-a", "--skip-others", "--exact", "--base-name", "org/base", "--json"]
    chosen = ("--include", "q_proj", "k_proj", "--exclude", "model.layers.0.*")
    found = run("extract-lora", zoo / "a", zoo / "base", zoo / "lora", *chosen, *options)
    assert (found.code, found.err) == (0, "")
    summary = json.loads(found.out)
    decomposed = {one["name"]: one for one in summary["tensors"] if one["rank"]}
    assert decomposed
    assert all(name.endswith(("q_proj.weight", "k_proj.weight")) and ".layers.0." not in name for name in decomposed)
    assert all(one["error"] ** 2 <= 0.51 for one in decomposed.values())
    adapter = open_adapter(zoo / "lora")
    assert sorted(f"{name}.weight" for name in adapter.updates) == sorted(decomposed)
    assert adapter.config.base_model_name_or_path == "org/base"
    assert adapter.info(next(iter(adapter.updates.values())).A).dtype == "BF16"


def test_a_recipe_is_extracted_without_being_written(run: Run, zoo: Path) -> None:
    assert run("extract-lora", zoo / "recipe.yaml", zoo / "base", zoo / "lora", "--quiet").code == 0
    assert run("merge", zoo / "recipe.yaml", zoo / "merged", "--quiet").code == 0
    expected, again = SafetensorsCheckpoint(zoo / "merged"), open_checkpoint(f"{zoo}/base+{zoo}/lora")
    for name in expected.names():
        torch.testing.assert_close(again.tensor(name), expected.tensor(name), rtol=1e-5, atol=1e-6)


def test_adapters_are_combined_and_merged_by_reference(run: Run, zoo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a", "b"):
        assert run("extract-lora", zoo / name, zoo / "base", zoo / f"lora-{name}", "--include", "q_proj", "--quiet").code == 0
    monkeypatch.chdir(zoo)
    found = run("merge-adapters", "lora-a", "lora-b", "--weights", "0.5", "-0.25", "--out", "both")
    assert (found.code, found.out) == (0, "")
    assert found.err.startswith("both: ")
    assert "2 modules of rank 12, " in found.err
    write_recipe(zoo / "plain.yaml", "method: linear\nmodels:\n  - {model: base+both, weight: 1}\n")
    assert run("merge", "plain.yaml", "out", "--quiet").code == 0
    assert "base+../both" in (zoo / "out" / "modelglue_recipe.yaml").read_text()
    base, a, b, out = (SafetensorsCheckpoint(zoo / name) for name in ("base", "a", "b", "out"))
    name = "model.layers.0.self_attn.q_proj.weight"
    expected = base.tensor(name) + 0.5 * (a.tensor(name) - base.tensor(name)) - 0.25 * (b.tensor(name) - base.tensor(name))
    torch.testing.assert_close(out.tensor(name), expected, rtol=1e-4, atol=1e-5)
    summary = json.loads(run("merge-adapters", "lora-a", "lora-b", "--mode", "svd", "--rank", "2", "--out", "svd", "--json").out)
    assert {key: summary[key] for key in ("directory", "rank", "warnings")} == {"directory": "svd", "rank": 2, "warnings": []}
    pruned = run("merge-adapters", "lora-a", "lora-b", "--mode", "dare_ties", "--density", "0.5", "--seed", "3", "--out", "dare", "--quiet")
    assert (pruned.code, pruned.out, pruned.err) == (0, "", "")


def test_what_is_odd_about_an_adapter_is_told_when_it_is_merged(run: Run, zoo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(zoo)
    folder = write_adapter(
        zoo / "lora", {"layers.0.self_attn.q_proj.lora_A.weight": randn(4, 6), "layers.0.self_attn.q_proj.lora_B.weight": randn(6, 4)}
    )
    write_recipe(zoo / "r.yaml", f"method: linear\nmodels:\n  - {{model: base+{folder.name}, weight: 1}}\n")
    warning = "its modules are called otherwise in the base: 'layers.0.self_attn.q_proj' is taken for 'model.layers.0.self_attn.q_proj'."
    assert warning in run("check", "r.yaml").text
    assert warning in run("merge", "r.yaml", "out").err


@pytest.mark.parametrize(
    ("tokens", "reason"),
    [
        (("extract-lora", "a", "nothing", "out"), "'nothing': no such file or folder"),
        (("extract-lora", "a", "base", "b"), "b: exists already."),
        (("extract-lora", "a", "base", "a", "--overwrite"), "a: is the model 'a' (a), which is read here."),
        (("extract-lora", "a", "base", "out", "--include", "nothing"), "the pattern 'nothing' fits no module"),
        (("extract-lora", "base", "base", "out"), "model and base do not differ"),
        (("merge-adapters", "--out", "out"), "there is no adapter to combine."),
        (("merge-adapters", "base", "--out", "out"), "base: holds no adapter_config.json"),
        (("merge-adapters", "lora", "--out", "out", "--weights", "1", "2"), "there are 2 weights for 1 adapters."),
        (("merge-adapters", "lora", "lora", "--out", "out", "--mode", "ties"), "mode ties needs a density"),
        (("merge-adapters", "lora", "--out", "lora/inside"), "lora/inside: lies in the model 'lora' (lora), which is read here."),
        (("merge-adapters", "lora", "--out", "keep", "--overwrite"), "keep: holds 'thesis.tex' and is neither"),
    ],
)
def test_refused_in_plain_words_with_nothing_left_behind(
    run: Run, zoo: Path, tokens: tuple[str, ...], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(zoo)
    write_adapter(zoo / "lora", {"m.lora_A.weight": randn(4, 5), "m.lora_B.weight": randn(6, 4)})
    (zoo / "keep").mkdir()
    (zoo / "keep" / "thesis.tex").write_text("years of work")
    before = tree(zoo)
    found = run(*tokens)
    assert (found.code, found.out) == (2, "")
    assert found.err.removeprefix("error: ").removeprefix(f"{zoo}/").startswith(reason)
    assert tree(zoo) == before
    assert "out" not in names_in(zoo)
