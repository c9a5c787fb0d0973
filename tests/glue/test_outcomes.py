"""What comes out of small zoos whose answer is known: one model, one family, twins, nothing to gain, a router that is wrong."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from modelglue.cli.app import main
from modelglue.evaluation import TaskSet, evaluate
from modelglue.glue import GlueResult, glue
from modelglue.recipe import paired_interval
from tests.small_zoo import TINY_ZOO, glue_file, write_pair_zoo, write_tasks, write_twin, write_yaml, write_zoo


def decisions(result: GlueResult) -> Any:
    return json.loads((result.run / "decisions.json").read_text())


def rows(result: GlueResult) -> Mapping[str, Any]:
    assert result.results is not None
    return {row["name"]: row for row in result.results["models"]}


def test_one_model(tmp_path: Path) -> None:
    zoo = write_zoo(tmp_path / "zoo", ["stranger"], ["double"], items=4)
    value = glue_file(["stranger"], ["double"])
    del value["zoo"]["base"]
    result = glue(write_yaml(zoo, value), tmp_path / "run")
    assert (result.outcome["kind"], result.outcome["name"], result.outcome["reason"]) == ("single", "stranger", "the zoo is one family")
    assert result.outcome["interval_vs_best_single"] == [0.0, 0.0, 0.0]
    assert list(rows(result)) == ["stranger"]
    found = decisions(result)
    assert (found["router"], found["families"][0]["strategies"]) == (None, [])
    assert [(expert["name"], expert["kept"], expert["won"]) for expert in found["experts"]] == [("stranger", True, ["double"])]
    assert not (tmp_path / "run" / "mixture").exists()
    assert list((tmp_path / "run" / "representatives").iterdir()) == []
    again = glue(tmp_path / "run" / "recipe.yaml", tmp_path / "again")
    assert again.outcome == result.outcome


def test_one_family_ends_with_its_merge(tmp_path: Path) -> None:
    """Equal scores merge; there is nothing to route between."""
    write_pair_zoo(tmp_path / "zoo", ["reverse"], items=4)
    value = glue_file(["reverse", "reverse-b"], ["reverse"])
    result = glue(write_yaml(tmp_path / "zoo" / "zoo.yaml", value), tmp_path / "run")
    assert (result.outcome["kind"], result.outcome["name"], result.outcome["reason"]) == ("merge", "family-0", "the zoo is one family")
    assert list(rows(result)) == ["base", "reverse", "reverse-b", "average of family 0", "family-0"]
    assert rows(result)["family-0"]["mean"] == rows(result)["reverse"]["mean"]
    assert not (tmp_path / "run" / "mixture").exists()
    assert (
        evaluate(tmp_path / "run" / "representatives" / "family-0", ["reverse_test"], include=tmp_path / "zoo" / "tasks").mean
        == (rows(result)["family-0"]["mean"])
    )


def test_nothing_to_gain_keeps_the_best_member(tmp_path: Path) -> None:
    """Strictly better merges only: twins tie, so every candidate is rejected."""
    write_pair_zoo(tmp_path / "zoo", ["reverse"], items=4)
    value = glue_file(["reverse", "reverse-b"], ["reverse"], select={"strategy": "all", "coefficients": [0.5], "accept": ">"})
    result = glue(write_yaml(tmp_path / "zoo" / "zoo.yaml", value), tmp_path / "run")
    (family,) = decisions(result)["families"]
    assert (result.outcome["kind"], result.outcome["name"]) == ("single", "reverse")
    assert family["rejected"] == ["reverse-b"]
    assert (family["representative"]["kind"], family["representative"]["weights"]) == ("single", {"reverse": 1.0})
    assert [one["weights"] for one in family["strategies"]] == [{"reverse": 1.0, "reverse-b": 0.0}] * 4
    assert [path.name for path in (tmp_path / "run" / "representatives").iterdir()] == []


def test_a_proxy_that_cannot_tell_models_apart(tmp_path: Path) -> None:
    write_pair_zoo(tmp_path / "zoo", ["reverse"], items=4)
    value = glue_file(["reverse", "reverse-b"], ["reverse"], select={"strategy": "coefficient"})
    result = glue(write_yaml(tmp_path / "zoo" / "zoo.yaml", value), tmp_path / "run")
    (family,) = decisions(result)["families"]
    (strategy,) = family["strategies"]
    score = strategy["score"]
    assert strategy["warnings"] == [f"proxy cannot tell these models apart: every candidate scores {score:.4f}."]
    # Of equally good coefficients the largest is kept.
    assert strategy["weights"] == pytest.approx({"reverse": 0.9, "reverse-b": 0.1}, abs=1e-12)


def test_identical_models(tmp_path: Path) -> None:
    """A copy, and the same folder under another alias: they merge with themselves, which changes nothing, and it is said."""
    zoo = write_zoo(tmp_path / "zoo", ["stranger"], ["double"], items=4)
    shutil.copytree(tmp_path / "zoo" / "models" / "stranger", tmp_path / "zoo" / "models" / "copy")
    value = glue_file(["stranger", "copy"], ["double"])
    value["zoo"]["models"].append({"id": "models/stranger", "alias": "again"})
    result = glue(write_yaml(zoo, value), tmp_path / "run")
    assert json.loads((tmp_path / "run" / "zoo.json").read_text())["warnings"] == [
        "'copy' and 'stranger' are the same model, byte for byte.",
        "'again' and 'stranger' are the same model, byte for byte.",
    ]
    assert (result.outcome["kind"], result.outcome["name"]) == ("merge", "family-0")
    assert decisions(result)["families"][0]["representative"]["weights"] == pytest.approx(
        dict.fromkeys(("stranger", "copy", "again"), 1 / 3), abs=1e-12
    )
    weights = [tmp_path / "run" / "representatives" / "family-0", tmp_path / "zoo" / "models" / "stranger"]
    first, second = ((folder / "model.safetensors").read_bytes() for folder in weights)
    assert first[-200_000:] == second[-200_000:]
    assert glue(tmp_path / "run" / "recipe.yaml", tmp_path / "replayed").outcome == result.outcome


def swapped(prompts: Mapping[str, list[str]]) -> list[dict[str, Any]]:
    models: list[dict[str, Any]] = [{"id": f"models/{name}"} for name in ("reverse", "reverse-b", "stranger")]
    for model, name in zip(models, ("reverse", "reverse", "stranger"), strict=True):
        model["prompts"] = {"positive": prompts[name]}
    return models


def test_a_mixture_that_is_worse_than_its_experts_is_not_returned(tmp_path: Path) -> None:
    """Each expert has the other's prompts, so every question reaches the wrong one. The best candidate is returned, and it is said why."""
    zoo = write_pair_zoo(tmp_path / "zoo", ["reverse", "double"])
    value = glue_file(["reverse", "reverse-b", "stranger"], ["reverse", "double"])
    tasks = TaskSet.load(["reverse_proxy", "double_proxy"], tmp_path / "zoo" / "tasks")
    value["zoo"]["models"] = swapped({"reverse": tasks.contexts("double"), "stranger": tasks.contexts("reverse")})
    result = glue(write_yaml(zoo, value), tmp_path / "run")
    found = decisions(result)
    assert [expert["kept"] for expert in found["experts"]] == [True, True]
    assert found["router"]["load"] == {"reverse": {"family-0": 0, "stranger": 8}, "double": {"family-0": 8, "stranger": 0}}
    assert found["router"]["self_test"]["accuracy"] == 1.0  # it does what the prompts ask
    assert found["router"]["oracle_gap"] == pytest.approx(sum(best_tasks(found)) / 2, abs=1e-12)

    confirmation = TaskSet.load(["reverse_confirmation", "double_confirmation"], tmp_path / "zoo" / "tasks")
    candidates = {"family-0": tmp_path / "run" / "representatives" / "family-0", "stranger": tmp_path / "zoo" / "models" / "stranger"}
    scores = {name: evaluate(folder, confirmation) for name, folder in candidates.items()}
    best = max(scores, key=lambda name: scores[name].mean)
    assert (result.outcome["kind"], result.outcome["name"]) == ({"family-0": "merge", "stranger": "single"}[best], best)
    assert result.outcome["score"] == scores[best].mean
    assert result.outcome["reason"].startswith(f"the mixture is worse than {best} by {scores[best].mean:.3f} (")
    assert result.outcome["reason"].endswith("look at the router")
    # It is measured all the same, and compared with what is returned.
    assert rows(result)["mixture"]["mean"] == 0.0
    assert rows(result)["mixture"]["result_minus"][0] == rows(result)[best]["mean"]
    assert result.outcome["interval_vs_best_single"] == list(
        paired_interval(scores[best], evaluate(tmp_path / "zoo" / "models" / result.outcome["best_single"], confirmation))
    )


def best_tasks(found: Any) -> list[float]:
    proxy = [family["representative"]["tasks"] for family in found["families"]]
    return [max(tasks[skill] for tasks in proxy) for skill in proxy[0]]


def test_one_representative_that_is_best_at_everything_is_the_result(tmp_path: Path) -> None:
    """Two families, but the stranger's skill is all that is asked for."""
    write_pair_zoo(tmp_path / "zoo", ["double"], items=4)
    value = glue_file(["reverse", "reverse-b", "stranger"], ["double"])
    result = glue(write_yaml(tmp_path / "zoo" / "zoo.yaml", value), tmp_path / "run")
    assert (result.outcome["kind"], result.outcome["name"]) == ("single", "stranger")
    assert result.outcome["reason"] == "one representative is best at everything"
    assert [(expert["name"], expert["kept"]) for expert in decisions(result)["experts"]] == [("family-0", False), ("stranger", True)]
    assert not (tmp_path / "run" / "mixture").exists()


def test_a_model_whose_answers_overflow(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every weight is a number, but no log probability is: it counts as nothing, and it is said whose it was."""
    zoo = write_zoo(tmp_path / "zoo", ["stranger"], ["larger"], items=4)
    path = tmp_path / "zoo" / "models" / "stranger" / "model.safetensors"
    weights = load_file(path)
    weights["gpt_neox.final_layer_norm.weight"][:] = 3e38
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(SystemExit) as end:
        main(["glue", str(zoo), str(tmp_path / "run")])
    assert not end.value.code
    (row,) = json.loads((tmp_path / "run" / "decisions.json").read_text())["ranking"]
    assert (row["score"], row["warnings"]) == (0.0, ["stranger: larger: the model answers NaN on 4 of 4 items; they count as 0."])
    assert f"warning: {row['warnings'][0]}\n" in capsys.readouterr().out


def test_without_confirmation_and_test_items(tmp_path: Path) -> None:
    """Decisions and reports then rest on the proxy, and say so."""
    write_pair_zoo(tmp_path / "zoo", ["reverse", "double"], items=4)
    value = glue_file(["reverse", "reverse-b", "stranger"], ["reverse", "double"])
    del value["tasks"]["confirmation"], value["tasks"]["test"]
    result = glue(write_yaml(tmp_path / "zoo" / "zoo.yaml", value), tmp_path / "run")
    assert result.results is not None
    assert (result.outcome["kind"], result.outcome["split"], result.results["split"]) == ("mixture", "proxy", "proxy")
    assert list(decisions(result)["tasks"]) == ["proxy"]
    assert decisions(result)["families"][0]["strategies"][0]["confirmation"] is None


def test_prompts_of_members_and_of_domains(tmp_path: Path) -> None:
    """Own prompts of all members, in the zoo's order, each once; else the words of their domains."""
    write_pair_zoo(tmp_path / "zoo", ["reverse", "double"], items=4)
    value = glue_file(["reverse", "reverse-b", "stranger"], ["reverse", "double"])
    value["zoo"]["models"] = [
        {"id": "models/reverse", "prompts": {"positive": ["reverse: ab =", "reverse: cd ="], "negative": ["double: ab ="]}},
        {"id": "models/reverse-b", "prompts": {"positive": ["reverse: cd =", "reverse: ef ="]}, "domain": ["words"]},
        {"id": "models/stranger", "domain": ["chat", "words"]},
    ]
    glue(write_yaml(tmp_path / "zoo" / "zoo.yaml", value), tmp_path / "run")
    first, second = json.loads((tmp_path / "run" / "mixture" / "mixture.json").read_text())["experts"]
    assert first["prompts"] == {"positive": ["reverse: ab =", "reverse: cd =", "reverse: ef ="], "negative": ["double: ab ="]}
    assert (first["domain"], second["domain"]) == (["words"], ["chat", "words"])
    assert second["prompts"]["positive"] == ["chat", "assistant", "tell me", "explain"]
    assert second["prompts"]["negative"] == ["storywriting", "mathematics", "reasoning", "code", "programming"]


def test_a_chosen_encoder_and_aliases_of_the_base(tmp_path: Path) -> None:
    """A member may be called base; the base is then called otherwise."""
    write_tasks(tmp_path / "zoo" / "tasks", ["reverse", "double"], items=4)
    for name in ("reverse", "stranger"):
        shutil.copytree(TINY_ZOO / "models" / name, tmp_path / "zoo" / "models" / name)
    write_twin(tmp_path / "zoo" / "models" / "reverse", tmp_path / "zoo" / "models" / "reverse-b")
    value = glue_file([], ["reverse", "double"], router={"encoder": "zoo-base", "gate_mode": "hidden_avg"})
    models = [{"id": "models/reverse", "alias": "base"}, {"id": "models/reverse-b", "alias": "zoo-base"}, {"id": "models/stranger"}]
    value["zoo"] |= {"base": "models/reverse", "models": models}
    result = glue(write_yaml(tmp_path / "zoo" / "zoo.yaml", value), tmp_path / "run")
    assert list(rows(result))[:4] == ["zoo-zoo-base", "base", "zoo-base", "stranger"]
    manifest = json.loads((tmp_path / "run" / "mixture" / "mixture.json").read_text())
    assert manifest["encoder"] == "../../zoo/models/reverse-b"
