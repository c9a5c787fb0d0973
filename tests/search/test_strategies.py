"""Searchers by hand: ask, tell, and nothing else; no tensor anywhere."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import modelglue.search
from modelglue.recipe import Candidate, Scores
from modelglue.search import AverageSearch, CoefficientSearch, Ranking, Rule
from modelglue.search.ranking import outcome_of
from modelglue.search.searcher import Outcome
from modelglue.search.strategies import Strategy, in_order


def scores(value: float) -> Outcome:
    return outcome_of(Candidate.single("x"), Scores({"task": {"0": value}}))


RANKING = Ranking({"a": scores(0.4), "b": scores(0.6), "c": scores(0.5)})


def test_ranking() -> None:
    assert RANKING.order == ("b", "c", "a")
    assert RANKING.start().weights == {"a": 0.0, "b": 1.0, "c": 0.0}


def test_average_asks_one_at_a_time_and_keeps_the_zoo_order() -> None:
    searcher: Strategy = AverageSearch(RANKING, Rule())
    assert searcher.ask() == [Candidate.linear({"b": 1, "c": 1})]
    assert searcher.ask() == searcher.ask()
    searcher.tell([scores(0.6)])
    assert searcher.ask()[0].members == ("a", "b", "c")
    searcher.tell([scores(0.59)])
    assert searcher.ask() == []
    assert searcher.current.weights == {"a": 0.0, "b": 0.5, "c": 0.5}
    assert [(one.candidate, one.accepted, one.current) for one in searcher.rounds] == [
        ("c", True, 0.6),
        ("a", False, 0.6),
    ]


def test_coefficient_asks_for_a_whole_grid() -> None:
    searcher: Strategy = CoefficientSearch(RANKING, Rule(), [0.8, 0.5], in_order)
    asked = searcher.ask()
    assert [candidate.members for candidate in asked] == [("b", "c"), ("b", "c")]
    assert [candidate.weights for candidate in asked] == [pytest.approx((0.5, 0.5)), pytest.approx((0.8, 0.2))]
    searcher.tell([scores(0.7), scores(0.65)])
    asked = searcher.ask()
    assert [candidate.weights for candidate in asked] == [
        pytest.approx((0.5, 0.25, 0.25)),
        pytest.approx((0.2, 0.4, 0.4)),
    ]
    searcher.tell([scores(0.1), scores(0.2)])
    assert searcher.ask() == []
    assert searcher.current.weights == pytest.approx({"a": 0.0, "b": 0.5, "c": 0.5})
    assert searcher.rounds[1].coefficient == 1.0
    assert searcher.rounds[0].scores == {"0.5": 0.7, "0.8": 0.65}


def test_search_never_touches_a_tensor() -> None:
    folder = Path(modelglue.search.__file__).parent
    for path in sorted(folder.glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            modules += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            if isinstance(node, ast.ImportFrom) and [alias.name for alias in node.names] == ["write_bytes_atomic"]:
                continue  # a file, whole or not at all
            for module in modules:
                assert not module.startswith(("torch", "safetensors", "transformers", "modelglue.checkpoint")), path
