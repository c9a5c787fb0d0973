"""CMA-ES over spaces of many dimensions, and over spaces with whole numbers and choices."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from modelglue.errors import UserError
from modelglue.recipe import Candidate, Scores
from modelglue.search import SearchReport, SearchSettings, SyntheticEvaluator, run_study
from modelglue.search.cma import CmaSearch
from modelglue.search.distributions import Mixed, Numbers
from modelglue.search.randomness import rng
from modelglue.search.searcher import Outcome, Proposal
from modelglue.search.space import Bool, Choice, Float, Int, Params, Simplex, Space, When


class Spaced:
    """A space whose candidates say nothing: only parameters count."""

    def __init__(self, *parameters: Any) -> None:
        self.space = Space(parameters)

    def candidate(self, params: Params) -> Candidate:
        return Candidate.of({"method": "none", **params})


def searched(space: Spaced, value: Callable[[Params], float], **options: Any) -> tuple[float, Params, list[Params], Mapping[str, Any]]:
    """(best value, its parameters, all that was asked, report)."""
    search = CmaSearch(space, **options)
    seen: list[tuple[float, int, Params]] = []
    while not search.done():
        batch = search.ask(1)
        if not batch:
            break
        values = [value(proposal.params) for proposal in batch]
        seen += [(v, -len(seen) - n, proposal.params) for n, (v, proposal) in enumerate(zip(values, batch, strict=True))]
        search.tell([_told(proposal, v, n) for n, (proposal, v) in enumerate(zip(batch, values, strict=True))])
    best = max(seen, key=lambda one: one[:2])
    return best[0], best[2], [params for _, _, params in seen], search.report()


def _told(proposal: Proposal, value: float, number: int) -> Outcome:
    return Outcome(number, proposal, "ok", value, {"t": value}, Scores({"t": {"a": value}}))


MIXED = Spaced(Float("x", -1.0, 3.0), Int("n", 0, 20), Choice("word", ("a", "b", "c", "d")), Bool("yes"), Simplex("share", 3))


def hidden(params: Params) -> float:
    """0 at x = 1.5, n = 17, word = c, yes = True, share = (1, 0, 0)."""
    return -(
        (params["x"] - 1.5) ** 2 + ((params["n"] - 17) / 10) ** 2 + (params["word"] != "c") + (not params["yes"]) * 0.5
        + (1 - params["share"][0])
    )  # fmt: skip


def test_numbers_whole_numbers_and_choices_are_searched_together() -> None:
    for seed in range(2):
        best, params, everything, report = searched(MIXED, hidden, seed=seed, trials=700)
        assert (params["word"], params["yes"]) == ("c", True)
        assert abs(params["n"] - 17) <= 1
        assert best > -0.03
        assert report["distribution"] == "mixed"
        generator = rng(seed, "chance")
        by_chance = max(hidden(MIXED.space.from_unit_cube(generator.random(MIXED.space.dimensions))) for _ in range(700))
        assert best > by_chance
        assert searched(MIXED, hidden, seed=seed, trials=40)[2] == everything[:40], "a function of seed and scores"


def test_a_start_is_asked_first_and_its_choices_are_likely() -> None:
    start = {"x": 0.0, "n": 5, "word": "b", "yes": False, "share": [0.2, 0.3, 0.5]}
    _, _, everything, _ = searched(MIXED, hidden, seed=1, trials=49, population=48, start=start)
    assert everything[0] == start
    assert sum(params["word"] == "b" for params in everything[1:]) > 24
    assert sum(abs(params["n"] - 5) <= 6 for params in everything[1:]) > 36


def test_spaces_of_choices_alone_and_with_one_value() -> None:
    words = Spaced(Choice("word", tuple("abcdefgh")), Choice("only", ("x",)), Int("two", 3, 4), Int("one", 7, 7))
    best, params, _, _ = searched(words, lambda params: float(params["word"] == "g") + params["two"], trials=200, population=8)
    assert params == {"word": "g", "only": "x", "two": 4, "one": 7}
    assert best == 5.0


def test_conditions_hold() -> None:
    space = Spaced(Bool("scaled"), Float("scale", 1.0, 2.0, when=When("scaled", (True,))))
    best, params, everything, _ = searched(space, lambda params: params.get("scale", 0.0), trials=120, population=8)
    assert best > 1.99
    assert params["scaled"] is True
    assert all(("scale" in params) == params["scaled"] for params in everything)


def test_many_dimensions_are_searched_without_covariances() -> None:
    many = Spaced(*(Float(f"x{number:03d}", 0.0, 1.0) for number in range(110)))
    target = rng(3, "target").random(110)

    def value(params: Params) -> float:
        return -float(((np.array(list(params.values())) - target) ** 2).mean())

    best, _, _, report = searched(many, value, trials=600)
    full, _, _, other = searched(many, value, trials=600, covariance="full")
    assert (report["distribution"], other["distribution"]) == ("diagonal", "full")
    assert best > full > value(many.space.from_unit_cube(np.full(110, 0.5)))
    few = Spaced(*(Float(f"x{number:03d}", 0.0, 1.0) for number in range(100)))
    assert searched(few, lambda params: 0.0, trials=20)[3]["distribution"] == "full"
    assert searched(few, lambda params: 0.0, trials=20, covariance="diagonal")[3]["distribution"] == "diagonal"
    with pytest.raises(UserError, match="covariance is 'none'; allowed are auto, full, diagonal"):
        CmaSearch(few, covariance="none")  # type: ignore[arg-type]


def test_points_stay_in_the_cube() -> None:
    for made in (Numbers(3, np.array([0.0, 1.0, 0.5]), 0.5, 6), Numbers(3, None, 0.5, 6, diagonal=True), Mixed(MIXED.space, None, 0.5, 6)):
        made.reseed(7)
        points = np.stack([made.ask().point for _ in range(50)])
        assert points.min() >= 0
        assert points.max() <= 1
        assert points.std() > 0.1


def test_a_mixed_search_goes_on_where_its_budget_ended(tmp_path: Path) -> None:
    """Replayed from what it was told: whole numbers, choices and weights alike."""
    evaluator = SyntheticEvaluator(3, 1, 40)

    said = {"normalize": [False, True], "agreeing": {"choices": ["sum", "largest"]}, "density": 0.5}

    def run(folder: Path | None, candidates: int) -> SearchReport:
        settings = SearchSettings(
            members=("m0", "m1", "m2"), base="o", budget={"candidates": candidates}, fitness={"kind": "everything"},  # type: ignore[arg-type]
            space={"method": "ties", "parameters": said},  # type: ignore[arg-type]
        )  # fmt: skip
        return run_study(settings, evaluator, folder)

    whole = run(None, 40)
    run(tmp_path, 17)
    found = run(tmp_path, 40)
    assert [(one.id, dict(one.proposal.params), one.value) for one in found.outcomes] == [
        (one.id, dict(one.proposal.params), one.value) for one in whole.outcomes
    ]
    assert found.searcher["distribution"] == "mixed"
    assert {one.proposal.params["normalize"] for one in found.outcomes} == {False, True}
