"""`modelglue eval`: the numbers of the library, of models, mixtures and recipes, remembered in a store."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from modelglue.evaluation import ResidentModel, ScoreStore, evaluate, score_text_model
from modelglue.evaluation.tasks import TaskSet
from modelglue.mixture import ExpertSpec, Mixture, RouterSpec, write_mixture
from modelglue.recipe import Scores, interval, paired_interval
from tests.cli.conftest import Run, tree
from tests.small_zoo import TINY_ZOO, write_tasks

REVERSE, STRANGER = (str(TINY_ZOO / "models" / name) for name in ("reverse", "stranger"))
TASKS = ("--tasks", "reverse_proxy", "larger_proxy")


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tasks(tmp_path_factory.mktemp("tasks"), items=12)


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`reverse` and `stranger` behind a router that knows what both are for."""
    folder = tmp_path_factory.mktemp("mixture") / "mixture"
    prompts = {skill: tuple(f"{skill}: {word} =" for word in ("abcd", "xyz", "moon", "lamp")) for skill in ("reverse", "double")}
    experts = [ExpertSpec("reverse", Path(REVERSE), prompts["reverse"]), ExpertSpec("stranger", Path(STRANGER), prompts["double"])]
    write_mixture(folder, experts, RouterSpec(gate_mode="hidden_avg", router_layer=2), encoder=Path(REVERSE))
    return folder


def expected(scores: Scores) -> dict[str, object]:
    return {
        "mean": scores.mean, "interval": list(interval(scores)), "tasks": scores.tasks(),
        "items": {task: dict(values) for task, values in scores.items.items()}, "warnings": list(scores.warnings),
    }  # fmt: skip


def refused(run: Run, *tokens: str | Path) -> str:
    found = run("eval", *tokens)
    assert (found.code, found.out) == (2, "")
    assert found.err.startswith("error: ")
    assert "Traceback" not in found.err
    return found.err.removeprefix("error: ").removesuffix("\n")


# -- values -----------------------------------------------------------------------------------------------------------------------


def test_json(run: Run, tasks: Path) -> None:
    """Values of every item, equal to the library's."""
    found = run("eval", REVERSE, STRANGER, *TASKS, "--include", tasks, "--json")
    assert (found.code, found.err) == (0, "")
    value = json.loads(found.out)
    assert list(value) == [REVERSE, STRANGER]
    for model in (REVERSE, STRANGER):
        scores = evaluate(model, ["reverse_proxy", "larger_proxy"], include=tasks)
        assert value[model] == expected(scores)
        assert [len(items) for items in value[model]["items"].values()] == [12, 12]
    assert value[REVERSE]["tasks"]["reverse"] > value[STRANGER]["tasks"]["reverse"] == 0.0


def test_table(run: Run, tasks: Path) -> None:
    """Percent, one line per model, and the paired difference to the first."""
    found = run("eval", REVERSE, STRANGER, *TASKS, "--include", tasks, "--quiet")
    assert (found.code, found.err) == (0, "")
    head, first, second = (re.split(r"\s{2,}", line.strip()) for line in found.out.splitlines())
    assert head == ["model", "reverse", "larger", "mean", "95 % interval", "against the first"]
    scores = {model: evaluate(model, ["reverse_proxy", "larger_proxy"], include=tasks) for model in (REVERSE, STRANGER)}
    for line, model in ((first, REVERSE), (second, STRANGER)):
        low, high = interval(scores[model])
        numbers = [f"{100 * value:.1f}" for value in (*scores[model].tasks().values(), scores[model].mean)]
        assert line[:5] == [model, *numbers, f"{100 * low:.1f} to {100 * high:.1f}"]
    gap, low, high = paired_interval(scores[STRANGER], scores[REVERSE])
    assert first[5:] == []
    assert second[5:] == [f"{100 * gap:+.1f} ({100 * low:+.1f} to {100 * high:+.1f})"]


def test_one_model_is_compared_with_nothing(run: Run, tasks: Path) -> None:
    found = run("eval", STRANGER, "--tasks", "double_proxy", "--include", tasks)
    assert found.out.splitlines()[0].split() == ["model", "double", "mean", "95", "%", "interval"]
    assert "against" not in found.out


def test_on_a_device(run: Run, tasks: Path, mixture: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The processor as a device answers as the processor; it is where the model is sent."""
    sent: list[str | None] = []
    make = ResidentModel.__init__

    def noting(self: ResidentModel, device: str | None = None) -> None:
        sent.append(device)
        make(self, device)

    monkeypatch.setattr(ResidentModel, "__init__", noting)
    plain, there = (run("eval", REVERSE, *TASKS, "--include", tasks, "--json", *more).out for more in ((), ("--device", "cpu:sim")))
    assert plain == there != ""
    assert sent == [None, "cpu"]
    assert "sees no such device here" in run("eval", REVERSE, *TASKS, "--include", tasks, "--device", "cuda:9").err
    assert (
        "is a mixture, and mixtures are scored on the processor" in run("eval", mixture, *TASKS, "--include", tasks, "--device", "cuda").err
    )


def test_a_named_metric(run: Run, tasks: Path) -> None:
    found = run("eval", STRANGER, "--tasks", "double_proxy:exact_match", "--include", tasks, "--json")
    assert json.loads(found.out)[STRANGER] == expected(evaluate(STRANGER, ["double_proxy"], include=tasks))


def test_a_mixture(run: Run, tasks: Path, mixture: Path) -> None:
    found = run("eval", mixture, "--tasks", "reverse_proxy", "double_proxy", "--include", tasks, "--json")
    opened = Mixture.load(mixture)
    with ScoreStore(":memory:") as store:
        scores = score_text_model(opened, opened.identity, TaskSet.load(["reverse_proxy", "double_proxy"], tasks), store)
    value = json.loads(found.out)[str(mixture)]
    assert value == expected(scores)
    alone = [evaluate(model, [task], include=tasks).mean for model, task in ((REVERSE, "reverse_proxy"), (STRANGER, "double_proxy"))]
    assert list(value["tasks"].values()) == alone


def test_a_recipe_is_merged_in_memory(run: Run, tasks: Path, tmp_path: Path) -> None:
    larger = TINY_ZOO / "models" / "larger"
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"method: linear\nmodels:\n  - {{model: {REVERSE}, weight: 0.5}}\n  - {{model: {larger}, weight: 0.5}}\n")
    before = tree(tmp_path)
    found = run("eval", recipe, *TASKS, "--include", tasks, "--json")
    assert tree(tmp_path) == before
    assert run("merge", recipe, tmp_path / "out", "--quiet").code == 0
    assert json.loads(found.out)[str(recipe)] == expected(evaluate(tmp_path / "out", ["reverse_proxy", "larger_proxy"], include=tasks))


# -- the store --------------------------------------------------------------------------------------------------------------------


def test_a_second_call_scores_nothing(run: Run, tasks: Path, mixture: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = ("eval", STRANGER, mixture, "--tasks", "larger_proxy", "--include", tasks, "--store", tmp_path / "s.sqlite", "--json")
    first = run(*command)
    with ScoreStore(tmp_path / "s.sqlite") as store:
        assert store.counts() == (2, 24)
    monkeypatch.setattr("modelglue.evaluation.resident.load_live", None)
    monkeypatch.setattr("modelglue.mixture.runtime.load_live", None)
    assert run(*command) == first
    assert run(*command[:1], *command[2:]).code == 0


# -- warnings and the terminal ----------------------------------------------------------------------------------------------------


def test_a_model_that_answers_nan(run: Run, tasks: Path, tmp_path: Path) -> None:
    """It is named, and so is what was made of it."""
    folder = Path(shutil.copytree(STRANGER, tmp_path / "[bold]broken"))
    weights = load_file(folder / "model.safetensors")
    weights["gpt_neox.final_layer_norm.weight"][:] = float("nan")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    found = run("eval", folder, "--tasks", "larger_proxy", "--include", tasks)
    assert found.code == 0
    assert found.out.splitlines()[-1] == f"warning: {folder}: larger: the model answers NaN on 12 of 12 items; they count as 0."
    assert found.out.splitlines()[1].split()[1:3] == ["0.0", "0.0"]


def test_progress_on_a_terminal(run: Run, tasks: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bar on standard error while it scores; what is printed stays the same but for the colours."""
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "200")
    found = run("eval", STRANGER, "--tasks", "larger_proxy", "--include", tasks)
    assert found.code == 0
    assert "12/12 items" in re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", found.err)
    assert "larger" in found.out
    assert run("eval", STRANGER, "--tasks", "larger_proxy", "--include", tasks, "--quiet").err == ""


# -- refused ----------------------------------------------------------------------------------------------------------------------


def test_nothing_to_score(run: Run, tasks: Path) -> None:
    assert refused(run, *TASKS) == "give at least one model: a folder, a hub id, a mixture folder, or a recipe."
    assert refused(run, STRANGER, "--tasks") == "give at least one task: --tasks NAME, or --tasks NAME:METRIC."
    assert run("eval", STRANGER).code != 0


def test_a_wrong_model_costs_no_scoring(run: Run, tasks: Path, tmp_path: Path) -> None:
    """All models are opened before the first one is scored."""
    message = refused(run, STRANGER, f"{STRANGER}s", *TASKS, "--include", tasks, "--store", tmp_path / "s")
    assert message.startswith(f"'{STRANGER}s': no such file or folder. Did you mean 'stranger'?")
    assert not (tmp_path / "s").exists()


def test_folders_that_are_no_model(run: Run, tasks: Path, tmp_path: Path) -> None:
    (tmp_path / "run" / "mixture").mkdir(parents=True)
    (tmp_path / "run" / "mixture" / "mixture.json").write_text("{}")
    message = refused(run, str(tmp_path / "run"), *TASKS, "--include", str(tasks))
    assert message.startswith(f"{tmp_path}/run: is the folder of a run. Give its mixture, {tmp_path}/run/mixture")
    (tmp_path / "empty").mkdir()
    message = refused(run, str(tmp_path / "empty"), *TASKS, "--include", str(tasks))
    assert message.startswith(f"{tmp_path}/empty: is neither a model (it holds no .safetensors file) nor a mixture")


def test_wrong_tasks(run: Run, tasks: Path) -> None:
    message = refused(run, STRANGER, "--tasks", "double_prox", "--include", tasks)
    assert message.startswith(f"task 'double_prox': no YAML file in {tasks} defines it")
    assert "Did you mean 'double_proxy'" in message
    message = refused(run, STRANGER, "--tasks", "double_proxy:acc", "--include", tasks)
    assert message.startswith(f"task 'double_proxy' ({tasks}/double_proxy.yaml): has no metric 'acc', but exact_match.")
    assert refused(run, STRANGER, *TASKS, "--include", f"{tasks}x").startswith(f"{tasks}x: no such folder")


def test_a_store_that_is_none(run: Run, tasks: Path, tmp_path: Path) -> None:
    (tmp_path / "s").write_text("scores: many\n" * 100)
    assert refused(run, STRANGER, *TASKS, "--include", tasks, "--store", tmp_path / "s").startswith(
        f"{tmp_path}/s: cannot be used as a store"
    )
    assert (tmp_path / "s").read_text() == "scores: many\n" * 100


def test_a_recipe_with_a_fault(run: Run, tasks: Path, tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(f"method: linaer\nmodels:\n  - {{model: {STRANGER}, weight: 1}}\n")
    message = refused(run, tmp_path / "r.yaml", *TASKS, "--include", tasks)
    assert message.startswith(f"{tmp_path}/r.yaml:1: ")
    assert "Did you mean 'linear'?" in message


def test_a_mixture_whose_expert_has_changed(run: Run, tasks: Path, mixture: Path, tmp_path: Path) -> None:
    shutil.copytree(mixture, tmp_path / "mixture")
    manifest = json.loads((tmp_path / "mixture" / "mixture.json").read_text())
    manifest["experts"][1]["reference"] = manifest["experts"][0]["reference"] = REVERSE
    manifest["encoder"] = REVERSE
    (tmp_path / "mixture" / "mixture.json").write_text(json.dumps(manifest))
    message = refused(run, tmp_path / "mixture", *TASKS, "--include", tasks)
    assert message.startswith(f"{tmp_path}/mixture: the expert 'stranger' ({REVERSE}) has changed since the mixture was made")


def test_a_model_without_tokenizer(run: Run, tasks: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(STRANGER, tmp_path / "model"))
    (folder / "tokenizer.json").unlink()
    assert refused(run, folder, *TASKS, "--include", tasks).startswith(f"SafetensorsCheckpoint('{folder}'): has no tokenizer")
