"""A Python function as an evaluator: one number, numbers by task, numbers by item; remembered, and judged like every other evaluator."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from modelglue.checkpoint import Checkpoint, open_checkpoint
from modelglue.errors import MergeError, RunError, UserError
from modelglue.evaluation import FunctionEvaluator, ScoreStore
from modelglue.evaluation.function import load_function
from modelglue.recipe import WHOLE, Candidate, Plan
from tests.small_zoo import TINY_ZOO

NAMES = ("reverse", "larger")
HALF = Candidate.linear({"reverse": 1, "larger": 1})


@pytest.fixture(scope="module")
def models() -> Mapping[str, Checkpoint]:
    return {name: open_checkpoint(TINY_ZOO / "models" / name) for name in NAMES}


@pytest.fixture
def store() -> Iterator[ScoreStore]:
    with ScoreStore(":memory:") as store:
        yield store


def mean_of_norm(model: Checkpoint) -> float:
    return float(model.tensor("model.norm.weight").float().mean())


def test_one_number(models: Mapping[str, Checkpoint], store: ScoreStore) -> None:
    """Of the merged model, computed once."""
    calls: list[Checkpoint] = []

    def score(model: Checkpoint) -> float:
        calls.append(model)
        return mean_of_norm(model)

    evaluator = FunctionEvaluator(score, models, store, store_dtype="float32")
    assert (evaluator.tasks, evaluator.levels, evaluator.items("score")) == (["score"], {"E0", "E1"}, (WHOLE,))
    scores = evaluator.evaluate(HALF)
    expected = sum(mean_of_norm(model) for model in models.values()) / 2
    assert scores.items == {"score": {WHOLE: pytest.approx(expected, abs=1e-6)}}
    assert evaluator.evaluate(HALF) == scores
    assert [number for number, _ in evaluator.evaluate_many([(HALF, Plan()), (Candidate.single("larger"), Plan())])] == [0, 1]
    assert len(calls) == 2


def test_numbers_by_task(models: Mapping[str, Checkpoint], store: ScoreStore) -> None:
    def score(model: Checkpoint, factor: float) -> dict[str, float]:
        return {"a": factor, "b": -2 * factor, "more": 9}

    evaluator = FunctionEvaluator(score, models, store, tasks=["b", "a"], settings={"factor": 1.5})
    assert evaluator.evaluate(HALF).tasks() == {"b": -3.0, "a": 1.5}
    assert evaluator.evaluate(HALF, Plan({"a": (WHOLE,)})).tasks() == {"a": 1.5}
    other = FunctionEvaluator(score, models, store, tasks=["b", "a"], settings={"factor": 2.0})
    assert other.evaluate(HALF).tasks() == {"b": -4.0, "a": 2.0}
    assert other.identity != evaluator.identity


class ByItem:
    """Numbers by item, and every call."""

    items: Mapping[str, Sequence[str]] = {"letters": list("abcdefgh"), "digits": ["1", "2"]}

    def __init__(self) -> None:
        self.calls: list[dict[str, list[str]]] = []

    def __call__(self, model: Checkpoint, items: Mapping[str, Sequence[str]]) -> dict[str, dict[str, float]]:
        self.calls.append({task: list(names) for task, names in items.items()})
        return {task: {name: ord(name) / 200 for name in names} for task, names in items.items()}


def test_numbers_by_item(models: Mapping[str, Checkpoint], store: ScoreStore) -> None:
    """Any items, and only those that are not known."""
    function = ByItem()
    evaluator = FunctionEvaluator(function, models, store)
    assert evaluator.levels == {"E0", "E1", "E2", "E3"}
    order = list(evaluator.items("letters"))
    assert sorted(order) == list("abcdefgh")
    assert order != sorted(order)
    first = evaluator.evaluate(HALF, Plan.prefix(evaluator, {"letters": 3}))
    second = evaluator.evaluate(HALF, Plan.prefix(evaluator, {"letters": 5, "digits": 1}))
    assert function.calls == [{"letters": order[:3]}, {"letters": order[3:5], "digits": [evaluator.items("digits")[0]]}]
    assert first.items == {"letters": {name: ord(name) / 200 for name in order[:3]}}
    assert (second.cost.items, second.cost.computed) == (6, 3)
    assert {task: len(values) for task, values in evaluator.evaluate(HALF).items.items()} == {"letters": 8, "digits": 2}


@pytest.mark.parametrize(
    ("error", "status", "text"),
    [
        (ZeroDivisionError("division by zero"), "failed", "ZeroDivisionError: division by zero"),
        (MemoryError(), "failed", "out of memory"),
        (TimeoutError("too slow"), "failed", "too slow"),
        (MergeError("no model"), "invalid", "no model"),
    ],
)
def test_a_function_that_fails(models: Mapping[str, Checkpoint], store: ScoreStore, error: Exception, status: str, text: str) -> None:
    def score(model: Checkpoint) -> float:
        raise error

    scores = FunctionEvaluator(score, models, store).evaluate(HALF)
    assert (scores.status, scores.items, scores.error) == (status, {}, f"{HALF.describe()}: {text}")
    assert store.counts() == (0, 0)


def test_numbers_that_are_none(models: Mapping[str, Checkpoint], store: ScoreStore) -> None:
    evaluator = FunctionEvaluator(lambda model: {"a": float("nan"), "b": float("inf"), "c": 1}, models, store, tasks=["a", "b", "c"])
    for _ in range(2):
        scores = evaluator.evaluate(HALF)
        assert (scores.status, scores.tasks()) == ("invalid", {"a": 0.0, "b": 0.0, "c": 1.0})
        assert "returned 2 numbers that are none" in scores.error


def test_what_a_function_must_not_do(models: Mapping[str, Checkpoint], store: ScoreStore) -> None:
    def raises(function: Any, said: str, plan: Plan = Plan(), **options: Any) -> None:  # noqa: B008
        with pytest.raises(UserError, match=said):
            FunctionEvaluator(function, models, store, **options).evaluate(HALF, plan)

    raises(lambda model: "good", "returned 'good' for task 'score'; allowed is a number")
    raises(lambda model: {"b": 1.0}, "returned None for task 'a'; allowed is a number", tasks=["a"])
    raises(lambda model: 1.0, "there is no task 'scores'. Did you mean 'score'", Plan({"scores": (WHOLE,)}))
    raises(lambda model: 1.0, "task 'score' has no item 'x'", Plan({"score": ("x",)}))
    raises(ByItem(), "its items are of the tasks letters, digits, but the tasks given are letters", tasks=["letters"])
    with pytest.raises(RunError, match="the disk is full"):
        FunctionEvaluator(raising(RunError("the disk is full")), models, store).evaluate(HALF)


def raising(error: Exception) -> Any:
    def score(model: Checkpoint) -> float:
        raise error

    return score


# -- by name ----------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    (tmp_path / "my_own_scores.py").write_text("LIST = []\ndef taste(model): return 0.5\ndef broken(model): return 1 / 0\n")
    (tmp_path / "my_own_fault.py").write_text("import a_module_that_is_not_there\n")
    yield tmp_path
    sys.modules.pop("my_own_scores", None)


def test_a_function_is_named_by_its_module(models: Mapping[str, Checkpoint], store: ScoreStore, folder: Path) -> None:
    before = list(sys.path)
    evaluator = FunctionEvaluator("my_own_scores:taste", models, store, relative_to=folder)
    assert evaluator.evaluate(HALF).tasks() == {"score": 0.5}
    assert sys.path == before
    same = FunctionEvaluator("my_own_scores:taste", models, store, relative_to=folder)
    assert same.identity == evaluator.identity
    assert same.evaluate(HALF).cost.computed == 0
    (folder / "my_own_scores.py").write_text("def taste(model): return 0.25\n")
    sys.modules.pop("my_own_scores")
    changed = FunctionEvaluator("my_own_scores:taste", models, store, relative_to=folder)
    assert changed.identity != evaluator.identity
    assert changed.evaluate(HALF).cost.computed == 1, "another text is another function"


@pytest.mark.parametrize(
    ("reference", "said"),
    [
        ("my_own_scores", "'my_own_scores' is no function; allowed is module:function, such as my_scores:taste"),
        ("my_own_scores:", "is no function; allowed is module:function"),
        ("../scores:taste", "is no function; allowed is module:function"),
        ("my_own_nothing:taste", "the module my_own_nothing cannot be imported (ModuleNotFoundError: No module named 'my_own_nothing')"),
        (
            "my_own_fault:taste",
            "cannot be imported (ModuleNotFoundError: No module named 'a_module_that_is_not_there')",
        ),
        ("my_own_scores:tastes", "my_own_scores has no function 'tastes'. Did you mean 'taste'"),
        ("my_own_scores:LIST", "my_own_scores has no function 'LIST'"),
    ],
)
def test_names_of_no_function(folder: Path, reference: str, said: str) -> None:
    with pytest.raises(UserError) as caught:
        load_function(reference, folder)
    assert said in str(caught.value)
