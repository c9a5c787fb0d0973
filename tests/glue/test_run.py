"""A finished run: its files agree with each other, and every number in them with a direct measurement."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from modelglue.checkpoint import open_checkpoint
from modelglue.evaluation import ScoreStore, evaluate, score_text_model
from modelglue.glue import glue
from modelglue.mixture import Mixture, load_report
from modelglue.recipe import Candidate, Scores, interval, merge, paired_interval
from modelglue.zoo import Similarity
from tests.glue.conftest import Finished, state, stored
from tests.glue_runs import assert_no_half_model, committed_items, computed_items
from tests.small_zoo import SKILLS, SPLITS, glue_file, write_lines_of, write_yaml, write_zoo

MEMBERS = ["reverse", "reverse-b", "stranger"]
TWINS = {"reverse": 0.5, "reverse-b": 0.5}


@pytest.fixture(scope="module")
def measured(finished: Finished) -> dict[str, dict[str, Scores]]:
    """Name in results.json -> split -> scores, measured directly: models and merge from disk, the mixture as it was written."""
    places = {name: finished.zoo.parent / "models" / name for name in ("base", *MEMBERS)}
    places |= dict.fromkeys(("family-0", "average of family 0"), finished.run / "representatives" / "family-0")
    mixture = Mixture.load(finished.run / "mixture")
    found: dict[str, dict[str, Scores]] = {}
    for split in SPLITS:
        tasks = finished.tasks(split)
        for name, place in places.items():
            found.setdefault(name, {})[split] = evaluate(place, tasks)
        with ScoreStore(":memory:") as store:
            found.setdefault("mixture", {})[split] = score_text_model(mixture, mixture.identity, tasks, store)
    return found


# -- files ------------------------------------------------------------------------------------------------------------------------


def test_files(finished: Finished) -> None:
    assert sorted(path.name for path in finished.run.iterdir()) == [
        ".lock", "decisions.json", "families.json", "log.jsonl", "mixture", "recipe.yaml", "representatives", "results.json",
        "router.json", "run.json", "scores.sqlite", "similarity.safetensors", "zoo.json",
    ]  # fmt: skip
    assert [path.name for path in (finished.run / "representatives").iterdir()] == ["family-0"]
    assert sorted(path.name for path in (finished.run / "mixture").iterdir()) == ["mixture.json", "router.safetensors"]
    assert_no_half_model(finished.run)
    assert finished.read("run.json")["complete"] is True


def test_the_result_is_what_the_files_say(finished: Finished) -> None:
    result = finished.result
    assert (result.run, result.already_complete) == (finished.run, False)
    assert result.outcome == finished.read("decisions.json")["outcome"]
    assert result.results == finished.read("results.json")


def test_zoo(finished: Finished) -> None:
    """The base is measured at the end, and is no member."""
    found = finished.read("zoo.json")
    assert (found["name"], found["base"], found["warnings"]) == ("small", "base", [])
    assert [model["alias"] for model in found["models"]] == MEMBERS
    for model in found["models"]:
        checkpoint = open_checkpoint(finished.zoo.parent / "models" / model["alias"])
        assert model["reference"] == f"models/{model['alias']}"
        assert model["identity"] == checkpoint.identity
        assert model["architecture"] == checkpoint.config["architectures"][0]
        assert model["parameters"] == sum(checkpoint.info(name).numel for name in checkpoint.names())
        assert model["bytes"] == 2 * model["parameters"]


def test_similarity_and_families(finished: Finished) -> None:
    found = Similarity.load(finished.run / "similarity.safetensors")
    assert found.labels == tuple(MEMBERS)
    assert found.matrix[0, 1] == pytest.approx(1, abs=1e-12)  # embeddings are not compared
    assert found.matrix[0, 2] != found.matrix[0, 2]
    families = finished.read("families.json")["families"]
    assert [(family["id"], family["members"]) for family in families] == [(0, ["reverse", "reverse-b"]), (1, ["stranger"])]


def test_log(finished: Finished) -> None:
    """Times are here and nowhere else; what was scored was scored once."""
    lines = [json.loads(line) for line in (finished.run / "log.jsonl").read_text().splitlines()]
    named = [line["event"] for line in lines if line["event"] != "batch"]
    assert named == ["zoo.json", "similarity", "families.json", "ranking", "selection", "write family-0", "router.json", "mixture", "test"]
    assert computed_items(finished.run) == (committed_items(finished.run), 8)


def test_events(finished: Finished) -> None:
    steps = [fields["name"] for event, fields in finished.events if event == "step"]
    assert steps == ["zoo", "similarity", "ranking", "selection", "writing", "mixture", "test"]
    assert sum(fields["items"] for event, fields in finished.events if event == "batch") == committed_items(finished.run)
    last = dict(finished.events)
    for event in ("families", "decisions", "results"):
        assert last[event] == finished.read(f"{event}.json")


# -- decisions --------------------------------------------------------------------------------------------------------------------


def test_ranking(finished: Finished, measured: dict[str, dict[str, Scores]]) -> None:
    rows = finished.read("decisions.json")["ranking"]
    assert sorted(row["alias"] for row in rows) == MEMBERS
    assert [row["score"] for row in rows] == sorted((row["score"] for row in rows), reverse=True)
    assert [row["alias"] for row in rows if row["alias"] != "stranger"] == ["reverse", "reverse-b"]  # equal scores: the zoo's order
    for row in rows:
        scores = measured[row["alias"]]["proxy"]
        assert (row["score"], row["tasks"], row["interval"]) == (scores.mean, scores.tasks(), list(interval(scores)))


def test_families_decisions(finished: Finished, measured: dict[str, dict[str, Scores]]) -> None:
    twins, stranger = finished.read("decisions.json")["families"]
    merged, single = twins["representative"], stranger["representative"]
    assert (merged["name"], merged["kind"], merged["strategy"], merged["weights"]) == ("family-0", "merge", "average", TWINS)
    assert (single["name"], single["kind"], single["strategy"], single["weights"]) == ("stranger", "single", None, {"stranger": 1.0})
    assert (twins["rejected"], stranger["rejected"], stranger["strategies"]) == ([], [], [])
    for representative, name in ((merged, "family-0"), (single, "stranger")):
        assert representative["proxy"] == measured[name]["proxy"].mean
        assert representative["tasks"] == measured[name]["proxy"].tasks()
    assert merged["interval_vs_best_member"] == [0.0, 0.0, 0.0]
    assert [one["strategy"] for one in twins["strategies"]] == ["average", "coefficient", "similarity_highest", "similarity_lowest"]
    for one in twins["strategies"]:
        assert one["weights"] == TWINS
        assert one["score"] == measured["family-0"]["proxy"].mean
        assert one["confirmation"] == measured["family-0"]["confirmation"].mean
        assert one["evaluations"] == 1
        assert one["warnings"] == [f"proxy cannot tell these models apart: every candidate scores {one['score']:.4f}."]


def test_experts(finished: Finished, measured: dict[str, dict[str, Scores]]) -> None:
    experts = {expert["name"]: expert for expert in finished.read("decisions.json")["experts"]}
    assert list(experts) == ["family-0", "stranger"]
    assert [expert["kept"] for expert in experts.values()] == [True, True]
    assert "reverse" in experts["family-0"]["won"]
    assert "double" in experts["stranger"]["won"]
    proxy = {name: measured[name]["proxy"] for name in experts}
    best = max(proxy, key=lambda name: (proxy[name].tasks()["larger"], proxy[name].mean))
    assert "larger" in experts[best]["won"]
    manifest = json.loads((finished.run / "mixture" / "mixture.json").read_text())
    for expert in manifest["experts"]:
        contexts = [text for skill in experts[expert["name"]]["won"] for text in finished.tasks("proxy").contexts(skill)]
        assert expert["prompts"] == {"positive": contexts, "negative": []}


def test_router(finished: Finished) -> None:
    router = finished.read("decisions.json")["router"]
    mixture = Mixture.load(finished.run / "mixture")
    proxy = finished.tasks("proxy")
    load = load_report(mixture, {skill: proxy.contexts(skill) for skill in SKILLS}).load
    assert router["load"] == load
    assert {sum(row.values()) for row in load.values()} == {8}
    assert router["self_test"]["accuracy"] == mixture.self_test().accuracy
    assert router["router_layer"] == 2
    assert router["gate_mode"] in ("hidden", "hidden_avg")


def test_outcome(finished: Finished, measured: dict[str, dict[str, Scores]]) -> None:
    outcome = finished.read("decisions.json")["outcome"]
    final = measured["mixture"]["confirmation"]
    best = max(MEMBERS, key=lambda name: measured[name]["confirmation"].mean)
    assert (outcome["kind"], outcome["name"], outcome["split"], outcome["score"]) == ("mixture", "mixture", "confirmation", final.mean)
    assert outcome["best_single"] == best
    assert outcome["interval_vs_best_single"] == list(paired_interval(final, measured[best]["confirmation"]))
    representatives = {name: measured[name]["proxy"].tasks() for name in ("family-0", "stranger")}
    oracle = [max(scores[skill] for scores in representatives.values()) for skill in SKILLS]
    gap = sum(oracle) / 3 - measured["mixture"]["proxy"].mean
    assert finished.read("decisions.json")["router"]["oracle_gap"] == pytest.approx(gap, abs=1e-12)


# -- results ----------------------------------------------------------------------------------------------------------------------


def test_results(finished: Finished, measured: dict[str, dict[str, Scores]]) -> None:
    results = finished.read("results.json")
    assert (results["split"], results["skills"]) == ("test", list(SKILLS))
    assert [(row["name"], row["kind"], row["family"]) for row in results["models"]] == [
        ("base", "base", None),
        ("reverse", "single", 0),
        ("reverse-b", "single", 0),
        ("stranger", "single", 1),
        ("average of family 0", "average", 0),
        ("family-0", "representative", 0),
        ("mixture", "mixture", None),
    ]
    final = measured["mixture"]["test"]
    for row in results["models"]:
        scores = measured[row["name"]]["test"]
        assert (row["mean"], row["interval"]) == (scores.mean, list(interval(scores)))
        assert row["result_minus"] == list(paired_interval(final, scores))
        for skill, task in row["tasks"].items():
            assert (task["score"], task["items"]) == (scores.tasks()[skill], 8)
            assert task["interval"] == list(interval(scores.only([skill])))
            assert task["result_minus"] == list(paired_interval(final.only([skill]), scores.only([skill])))


def test_comparisons(finished: Finished, measured: dict[str, dict[str, Scores]]) -> None:
    test = {name: scores["test"] for name, scores in measured.items()}
    won = {expert["name"]: expert["won"] for expert in finished.read("decisions.json")["experts"]}["family-0"]
    best = max(MEMBERS, key=lambda name: test[name].mean)
    first, *rest = finished.read("results.json")["comparisons"]
    assert (first["a"], first["b"], first["skills"]) == ("result", best, list(SKILLS))
    assert [first["difference"], *first["interval"]] == list(paired_interval(test["mixture"], test[best]))
    assert [(one["a"], one["b"], one["skills"]) for one in rest] == [
        ("family-0", "reverse", won), ("family-0", "average of family 0", won),
    ]  # fmt: skip
    assert [[one["difference"], *one["interval"]] for one in rest] == [[0.0, 0.0, 0.0]] * 2


def test_routing_of_the_test_items(finished: Finished) -> None:
    test = finished.tasks("test")
    load = load_report(Mixture.load(finished.run / "mixture"), {skill: test.contexts(skill) for skill in SKILLS}).load
    assert finished.read("results.json")["routing"] == load
    assert load["reverse"] == {"family-0": 8, "stranger": 0}
    assert load["double"] == {"family-0": 0, "stranger": 8}


def test_cost(finished: Finished) -> None:
    """Four models and their merge, and the mixture: the three splits for all but the base, which only the report needs."""
    cost = finished.read("results.json")["cost"]
    read = sum((finished.zoo.parent / "models" / name / "model.safetensors").stat().st_size for name in ("base", *MEMBERS))
    assert (cost["candidates"], cost["items_scored"]) == stored(finished.run) == (6, 5 * 3 * 3 * 8 + 3 * 8)
    assert 0.98 * read < cost["weights_bytes"] < read


# -- artefacts --------------------------------------------------------------------------------------------------------------------


def test_the_representative(finished: Finished) -> None:
    """The average of the twins, and a recipe that makes it again from where it stands."""
    folder = finished.run / "representatives" / "family-0"
    written = load_file(folder / "model.safetensors")
    twins = [load_file(finished.zoo.parent / "models" / name / "model.safetensors") for name in TWINS]
    for name, value in written.items():
        expected = sum(twin[name].double() for twin in twins) / 2
        assert torch.equal(value, expected.to(torch.bfloat16)), name
    again = merge(folder / "modelglue_recipe.yaml")
    assert all(torch.equal(again.tensor(name), value) for name, value in written.items())
    for name in ("config.json", "tokenizer.json"):
        assert (folder / name).exists()
    assert (folder / "tokenizer.json").read_bytes() == (finished.zoo.parent / "models" / "reverse" / "tokenizer.json").read_bytes()


def test_the_recipe(finished: Finished) -> None:
    replay = yaml.safe_load((finished.run / "recipe.yaml").read_text())["replay"]
    decisions = finished.read("decisions.json")
    assert replay["outcome"] == decisions["outcome"]
    recipe = replay["representatives"]["family-0"]
    found = {entry["model"]: entry["weight"] for entry in recipe["models"]}
    assert found == {f"../zoo/models/{name}": weight for name, weight in TWINS.items()}
    assert [expert["model"] for expert in replay["mixture"]["experts"]] == ["representatives/family-0", "../zoo/models/stranger"]
    assert replay["mixture"]["gate_mode"] == decisions["router"]["gate_mode"]  # what was left open is decided
    identities = {model["alias"]: model["identity"] for model in finished.read("zoo.json")["models"]}
    assert replay["contents"] == {f"../zoo/models/{name}": identity for name, identity in identities.items()}


# -- again ------------------------------------------------------------------------------------------------------------------------


def test_a_second_call_does_nothing(finished: Finished) -> None:
    before = state(finished.run)
    events: list[Any] = []
    again = glue(finished.zoo, finished.run, listener=lambda *event: events.append(event))
    assert again.already_complete is True
    assert (again.outcome, again.results) == (finished.result.outcome, finished.result.results)
    assert events == []
    assert state(finished.run) == before


def test_the_public_name_is_a_function_and_stays_one(finished: Finished) -> None:
    """Whether the package of the same name has been imported or not."""
    import modelglue.glue.schema

    for _ in range(2):
        assert modelglue.glue(finished.zoo, finished.run).outcome == finished.result.outcome
    assert modelglue.glue.schema.GlueFile is modelglue.glue.GlueFile


def test_no_decision_sees_the_test_items(finished: Finished, tmp_path: Path) -> None:
    """Other test items: other results, the same decisions, byte for byte, and the same artefacts."""
    zoo = tmp_path / "zoo"
    shutil.copytree(finished.zoo.parent / "models", zoo / "models")
    shutil.copy(finished.zoo, zoo)
    write_lines_of(finished.zoo.parent / "tasks", zoo / "tasks", "test", start=100)
    glue(zoo / "zoo.yaml", tmp_path / "run")
    for name in ("decisions.json", "families.json", "mixture/mixture.json", "representatives/family-0/model.safetensors"):
        assert (tmp_path / "run" / name).read_bytes() == (finished.run / name).read_bytes(), name
    assert (tmp_path / "run" / "results.json").read_bytes() != (finished.run / "results.json").read_bytes()


@pytest.mark.parametrize("strategy", ["coefficient", "all"])
def test_as_many_candidates_as_the_strategies_need(tmp_path: Path, strategy: str) -> None:
    """n models of one family and g coefficients: n - 1 averages, g (n - 1) blends for each of the others; what coincides is scored once."""
    models, grid = ("reverse", "larger", "generalist"), [0.3, 0.5, 0.8]
    zoo = write_zoo(tmp_path / "zoo", models, ["larger"], items=6)
    value = glue_file(models, ["larger"], select={"strategy": strategy, "coefficients": grid})
    del value["tasks"]["confirmation"]
    glue(write_yaml(zoo, value), tmp_path / "run")
    (family,) = json.loads((tmp_path / "run" / "decisions.json").read_text())["families"]
    counts = {"average": 2, "coefficient": 6, "similarity_highest": 6, "similarity_lowest": 6}
    found = {one["strategy"]: one["evaluations"] for one in family["strategies"]}
    assert found == (counts if strategy == "all" else {"coefficient": 6})

    expected = {Candidate.single(name).key for name in (*models, "base")} | {Candidate.linear(dict.fromkeys(models, 1)).key}
    for one in family["strategies"]:
        asked, final = walked(one, models)
        assert len(asked) == one["evaluations"]
        assert final == pytest.approx(one["weights"], abs=1e-12)
        expected |= asked
    assert stored(tmp_path / "run")[0] == len(expected)


def walked(strategy: dict[str, Any], models: Sequence[str]) -> tuple[set[str], dict[str, float]]:
    """Keys of all candidates that a strategy's trace says it asked for, and the coefficients that it must end with."""
    current = {name: float(name == strategy["order"][0]) for name in models}
    asked = set()
    for one in strategy["rounds"]:
        if one["scores"] is None:
            members = [name for name in models if current[name] or name == one["candidate"]]
            trials = [{name: (name in members) / len(members) for name in models}]
            accepted = trials[0] if one["accepted"] else current
        else:
            blends = {
                float(c): {name: float(c) * weight + (1 - float(c)) * (name == one["candidate"]) for name, weight in current.items()}
                for c in one["scores"]
            }
            trials = list(blends.values())
            accepted = blends.get(one["coefficient"], current)
        asked |= {Candidate.linear(trial).key for trial in trials}
        current = accepted
    return asked, current
