"""`modelglue stack`: folders, the recipe that it stands for, and what is refused."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest
import torch

from modelglue.checkpoint import SafetensorsCheckpoint
from modelglue.checkpoint.output import journal, plan
from tests.checkpoint.killing import dying, forked, run_in_child
from tests.cli.conftest import Run, tree
from tests.recipe.on_disk import WORDS, write_model
from tests.zoo.models import tensors


@pytest.fixture
def zoo(tmp_path: Path) -> Path:
    """A folder with the models a and b, of two layers whose output projections are known."""
    folder = tmp_path / "zoo"
    for seed, name in enumerate("ab"):
        projections = {f"model.layers.{layer}.self_attn.o_proj.weight": torch.full((6, 6), layer + seed + 1.0) for layer in range(2)}
        write_model(folder / name, weights={**tensors(seed), **projections})
    return folder


def test_a_stack_is_written_and_merged_again_from_its_recipe(run: Run, zoo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(zoo)
    found = run("stack", "a", "b", "--drop", "1", "--out", "deep")
    assert (found.code, found.out) == (0, "")
    assert found.err.startswith("deep: 2 layers; train it further before use; ")
    a, b, deep = (SafetensorsCheckpoint(zoo / name) for name in ("a", "b", "deep"))
    name = "mlp.up_proj.weight"
    assert torch.equal(deep.tensor(f"model.layers.0.{name}"), a.tensor(f"model.layers.0.{name}"))
    assert torch.equal(deep.tensor(f"model.layers.1.{name}"), b.tensor(f"model.layers.1.{name}"))
    mean = (a.tensor("lm_head.weight") + b.tensor("lm_head.weight")) / 2
    torch.testing.assert_close(deep.tensor("lm_head.weight"), mean)
    assert not (zoo / "deep" / "trainable_tensors.json").exists()
    assert run("verify", "deep").code == 0
    assert run("merge", "deep/modelglue_recipe.yaml", "again", "--quiet").code == 0
    assert run("stack", "a", "b", "--drop", "1", "--print").out == run("convert", "deep/modelglue_recipe.yaml").out.replace("../", "")
    ours, theirs = (tree(zoo / name) for name in ("deep", "again"))
    assert ours == theirs
    assert run("stack", "a", "b", "--drop", "1", "--out", "deep").err.endswith("(already complete)\n")


def test_an_expanded_model_names_what_to_train(run: Run, zoo: Path) -> None:
    found = run("stack", zoo / "a", "--every", "1", "--out", zoo / "deep", "--json")
    summary = json.loads(found.out)
    assert (found.code, summary["layers"], summary["new_layers"], summary["already_complete"]) == (0, 4, [1, 3], False)
    named = json.loads((zoo / "deep" / "trainable_tensors.json").read_text())["tensors"]
    deep = SafetensorsCheckpoint(zoo / "deep")
    assert named == [name for name in deep.names() if ".layers.1." in name or ".layers.3." in name]
    assert deep.config["num_hidden_layers"] == 4
    assert not deep.tensor("model.layers.1.mlp.down_proj.weight").any()
    assert run("verify", zoo / "deep").code == 0


def test_layers_in_any_order_and_copies(run: Run, zoo: Path) -> None:
    assert run("stack", zoo / "a", "--layers", "1,0:2,0", "--out", zoo / "listed", "--quiet").code == 0
    assert run("stack", zoo / "a", "--copies", "2", "--out", zoo / "doubled", "--quiet").code == 0
    a, listed, doubled = (SafetensorsCheckpoint(zoo / name) for name in ("a", "listed", "doubled"))
    for found, numbers in ((listed, (1, 0, 1, 0)), (doubled, (0, 1, 0, 1))):
        for at, number in enumerate(numbers):
            name = "self_attn.k_proj.weight"
            assert torch.equal(found.tensor(f"model.layers.{at}.{name}"), a.tensor(f"model.layers.{number}.{name}"))


@forked
def test_a_killed_stack_goes_on(run: Run, zoo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first call dies on the way; the second one finishes, and the bytes are those of a call that was not disturbed."""
    monkeypatch.setattr(plan, "TASK_ELEMENTS", 100)  # small models behave like large ones: many tasks, each in the journal when it is done
    monkeypatch.setattr(journal, "JOURNAL_BYTES", 1)
    add = journal.Flusher.add

    def add_and_wait(self: journal.Flusher, entry: journal.Entry) -> None:
        add(self, entry)
        assert self._thread is not None
        self._thread.join()

    monkeypatch.setattr(journal.Flusher, "add", add_and_wait)
    tokens = ("stack", zoo / "a", zoo / "b", "--identity-start", "--shard-size", "1KB", "--workers", "1", "--json")
    assert run(*tokens, "--out", zoo / "whole").code == 0
    with monkeypatch.context() as patch:
        patch.setattr(journal.Journal, "add", dying(journal.Journal.add, 4))
        assert run_in_child(lambda: run(*tokens, "--out", zoo / "killed")) == -signal.SIGKILL
    assert not (zoo / "killed").exists()
    report = json.loads(run(*tokens, "--out", zoo / "killed").out)
    assert 0 < report["resumed_bytes"] < report["bytes"]
    assert tree(zoo / "killed") == tree(zoo / "whole")


@pytest.mark.parametrize(
    ("tokens", "fault"),
    [
        (("a",), "one model is no stack"),
        (("a", "b", "--drop", "2"), "drop 2: model 1 has 2 layers and loses so many at the top; allowed are 0 to 1."),
        (("a", "--every", "3"), "every 3: the model has 2 layers"),
        (("a", "--layers", "0:3"), "layers: 2: the model has the layers 0 to 1."),
        (("a", "wide"), "wide: its layers do not fit those of a:"),
        (("a", "neox"), "is a GPTNeoXForCausalLM"),
        (("a", "foreign"), "A stack takes `vocabulary` for that"),
        (("a", "missing"), "missing"),
    ],
)
def test_refused(run: Run, zoo: Path, monkeypatch: pytest.MonkeyPatch, tokens: tuple[str, ...], fault: str) -> None:
    monkeypatch.chdir(zoo)
    weights = {name: torch.zeros(tensor.shape[0] + 2, *tensor.shape[1:]) for name, tensor in _tensors(zoo / "a").items()}
    write_model(zoo / "wide", weights=weights)
    write_model(zoo / "neox", 1, architectures=["GPTNeoXForCausalLM"])
    write_model(zoo / "foreign", 1, words=[*WORDS[:-1], "z"])
    before = sorted(path.name for path in zoo.iterdir())
    found = run("stack", *tokens, "--out", "deep")
    assert (found.code, found.out) == (2, "")
    assert found.err.count("error: ") == 1
    assert fault in found.err
    assert sorted(path.name for path in zoo.iterdir()) == before


def _tensors(folder: Path) -> dict[str, torch.Tensor]:
    model = SafetensorsCheckpoint(folder)
    return {name: model.tensor(name) for name in model.names()}


def test_print_and_out_exclude_each_other(run: Run, zoo: Path) -> None:
    assert run("stack", zoo / "a", "--every", "1").err == "error: where to? Say --out FOLDER, or --print.\n"
    assert run("stack", zoo / "a", "--every", "1", "--print", "--out", zoo / "deep").code == 2
    recipe = json.loads(run("stack", zoo / "a", "--every", "1", "--print", "--json").out)
    assert (recipe["method"], len(recipe["slices"])) == ("passthrough", 4)


def test_warnings_are_refused_where_they_are_errors(run: Run, zoo: Path) -> None:
    write_model(zoo / "far", 1, rope_theta=5.0)
    write_model(zoo / "near", 1, rope_theta=1.0)
    tokens = ("stack", zoo / "near", zoo / "far", "--out", zoo / "deep", "--strict")
    found = run(*tokens)
    assert found.code == 2
    assert "has rope_theta = 5.0" in found.err
    assert not (zoo / "deep").exists()
