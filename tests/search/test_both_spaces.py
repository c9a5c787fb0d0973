"""Parameter space, then data-flow space: the best merge joins the models; and what is found is an ordinary recipe."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from modelglue.checkpoint import Checkpoint, open_checkpoint
from modelglue.errors import UserError
from modelglue.evaluation.members import Members
from modelglue.recipe import Candidate, Plan, Scores, merge
from modelglue.search import Facts, SearchSettings, run_study
from modelglue.search.dataflow import MERGED, after_parameters
from modelglue.search.searcher import Outcome, Proposal
from modelglue.studies import best_of, recipe_of, run_search, write_candidate
from tests.search.doubles import Plain
from tests.small_zoo import TINY_ZOO, write_tasks, write_yaml

DEPTHS = {"reverse": 8, "larger": 8}
BLEND = Candidate.linear({"reverse": 0.25, "larger": 0.75})


def outcome(candidate: Candidate | None, value: float) -> Outcome:
    status = "ok" if math.isfinite(value) else "invalid"
    return Outcome(0, Proposal(candidate), status, value, {}, Scores({}))  # type: ignore[arg-type]


def first_of(outcomes: list[Outcome]) -> Candidate:
    found = after_parameters(outcomes, DEPTHS, trials=5).ask(1)[0].candidate
    assert found is not None
    return found


def test_the_search_of_paths_starts_at_the_best_merge_itself() -> None:
    models: Mapping[str, Checkpoint] = {name: open_checkpoint(TINY_ZOO / "models" / name) for name in DEPTHS}
    start = first_of([outcome(Candidate.single("larger"), 0.3), outcome(BLEND, 0.5), outcome(None, -math.inf)])
    assert start.aliases == ("reverse", "larger")
    assert len(start.recipe["hops"]) == 8
    found, blend = (Members(models).expression(one) for one in (start, BLEND))
    assert found.names() == blend.names()
    assert all(torch.equal(found.tensor(name), blend.tensor(name)) for name in blend.names())


def test_a_member_that_no_merge_beat_is_the_start() -> None:
    start = first_of([outcome(Candidate.single("larger"), 0.6), outcome(BLEND, 0.5)])
    assert {hop["model"] for hop in start.recipe["hops"]} == {"larger"}
    assert start.recipe["base"] == "larger"
    start = first_of([outcome(Candidate.single("base"), 0.9), outcome(Candidate.single("larger"), 0.6)])
    assert start.recipe["base"] == "larger", "a merge without any member is the base, whose layers are not searched"
    with pytest.raises(UserError, match="no merge could be scored"):
        first_of([outcome(BLEND, -math.inf)])


class Paths(Plain):
    """Scores merges by a weight and paths by their length."""

    def evaluate(self, candidate: Candidate, plan: Plan = Plan()) -> Scores:  # noqa: B008 - immutable
        if candidate.method != "data_flow":
            return super().evaluate(candidate, plan)
        return Scores({task: {item: float(len(candidate.recipe["hops"])) for item in self.items(task)} for task in self.tasks})


def test_both_spaces_are_two_stages_of_one_search() -> None:
    def searched(**options: Any) -> Any:
        said = {"name": "dataflow", "space": "both", "parameter_trials": 9, "trials": 6, "repeats": 1, "population": 4, **options}
        settings = SearchSettings(members=("a", "b"), searcher=said)  # type: ignore[arg-type]
        return run_study(settings, Paths(lambda weights: weights.get("a", 0.0)), None, facts=Facts(depths={"a": 2, "b": 2}))

    report = searched()
    kinds = [one.proposal.candidate.method for one in report.outcomes if one.proposal.candidate]
    assert kinds[:9] == ["linear"] * 9
    assert set(kinds[9:]) == {"data_flow"}
    assert len(report.outcomes) == 15
    paths = [one.proposal.candidate.recipe for one in report.outcomes[9:] if one.proposal.candidate]
    assert any(isinstance(hop["model"], dict) for path in paths for hop in path["hops"])
    assert MERGED not in json.dumps(paths)
    assert [one.proposal for one in searched().outcomes] == [one.proposal for one in report.outcomes]
    with pytest.raises(UserError, match="space is 'ps'; allowed are dfs and both"):
        searched(space="ps")


def test_the_recipe_of_a_path_is_merged_again_to_the_same_model(tmp_path: Path) -> None:
    """Also where a member is itself a merge, and where paths go through a merge that the search made."""
    write_tasks(tmp_path / "tasks", ["reverse"], items=4)
    places = [str(TINY_ZOO / "models" / name) for name in ("reverse", "larger")]
    blend = {"method": "linear", "models": [{"model": places[0], "weight": 0.5}, {"model": places[1], "weight": 0.5}]}
    file: dict[str, Any] = {
        "zoo": {"models": [places[0], {"recipe": blend, "alias": "blend"}]}, "tasks": {"include": "tasks", "proxy": ["reverse_proxy"]},
        "searcher": {"name": "dataflow", "space": "both", "parameter_trials": 3, "trials": 4, "repeats": 1, "population": 4},
        "fitness": {"kind": "everything"},
    }  # fmt: skip
    report = run_search(write_yaml(tmp_path / "s.yaml", file), tmp_path / "out").report
    paths = [one.id for one in report.outcomes if one.proposal.candidate and one.proposal.candidate.method == "data_flow"]
    assert paths
    for number in (paths[0], paths[-1]):
        recipe = recipe_of(tmp_path / "out", best_of(tmp_path / "out", number))
        write_candidate(tmp_path / "out", tmp_path / f"model-{number}", number)
        again = merge(write_yaml(tmp_path / f"recipe-{number}.yaml", recipe))
        there = open_checkpoint(tmp_path / f"model-{number}")
        assert recipe["method"] == "data_flow"
        assert again.names() == there.names()
        assert all(torch.equal(again.tensor(name), there.tensor(name)) for name in there.names())
