"""Items through a model: each is asked once, in batches that are always the same, and every reply reaches its own item."""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from modelglue.errors import UserError
from modelglue.evaluation import ScoreStore, TaskSet, score_text_model
from modelglue.evaluation.scoring import BATCH_ITEMS
from modelglue.models import Unanswered
from modelglue.recipe import Plan
from tests.evaluation.task_files import CHOICE, CHOICES, LIKELIHOOD, WORDS, write_task


class Interrupted(Exception):  # noqa: N818 - what Ctrl-C and kills are here
    """The run stops."""


@dataclass
class Oracle:
    """A text model that knows some answers; keeps every call, and stops at call number `until`."""

    answers: dict[str, str] = field(default_factory=dict)
    until: int | None = None
    calls: list[tuple[str, ...]] = field(default_factory=list)
    nan: str | None = None

    def _called(self, *call: str) -> None:
        if len(self.calls) == self.until:
            raise Interrupted
        self.calls.append(call)

    def loglikelihood(self, pairs: Sequence[tuple[str, str]]) -> list[tuple[float, bool]]:
        self._called("loglikelihood", *(context + continuation for context, continuation in pairs))
        return [(math.nan if context == self.nan else -float(len(continuation)), continuation == "dcba") for context, continuation in pairs]

    def generate(self, prompts: Sequence[str], *, until: Sequence[str], max_new_tokens: int) -> list[str]:
        self._called(f"generate {list(until)} {max_new_tokens}", *prompts)
        return [self.answers.get(prompt, "") for prompt in prompts]


ANSWERS = {document["prompt"]: document["answer"] for document in WORDS}
WORDLIST = ["".join(random.Random(seed).choices("abcdefgh", k=8)) for seed in range(300)]


@pytest.fixture(scope="module")
def long(tmp_path_factory: pytest.TempPathFactory) -> TaskSet:
    """300 items that an oracle of `EVERYTHING` answers rightly, and 150 of which it answers half: two batches and a bit, one and a bit."""
    folder = tmp_path_factory.mktemp("tasks")
    write_task(folder, "right", documents=[{"prompt": f"{word}?", "answer": word} for word in WORDLIST])
    choices = [{"prompt": f"{word}!", "choices": ["x", "yy"], "gold": number % 2} for number, word in enumerate(WORDLIST[:150])]
    write_task(folder, "choice", CHOICE, choices)
    return TaskSet.load(["right", "choice"], folder)


EVERYTHING = {f"{word}?": word for word in WORDLIST}


@pytest.fixture
def mixed(tmp_path: Path) -> TaskSet:
    """Skills of every kind, one with two settings of generation."""
    write_task(tmp_path, "words")
    write_task(tmp_path, "more", documents=WORDS[:2], tag="both")
    write_task(tmp_path, "other", documents=WORDS[2:], tag="both", generation_kwargs={"until": ["."], "max_gen_toks": 3})
    write_task(tmp_path, "likely", LIKELIHOOD)
    write_task(tmp_path, "choice", CHOICE, CHOICES)
    return TaskSet.load(["words", "choice", "both", "likely:acc"], tmp_path)


# -- values -----------------------------------------------------------------------------------------------------------------------


def test_values_reach_their_items(mixed: TaskSet) -> None:
    model = Oracle({**ANSWERS, "reverse: noon =": "wrong"})
    with ScoreStore(":memory:") as store:
        scores = score_text_model(model, "m", mixed, store)
    assert {skill: list(values.values()) for skill, values in scores.items.items()} == {
        "words": [1.0, 0.0, 1.0, 1.0],
        "choice": [1.0, 0.0, 0.0],  # the first of equally long ones
        "both": [1.0, 0.0, 1.0, 1.0],
        "likely": [1.0, 0.0, 0.0, 0.0],
    }
    assert [list(values) for values in scores.items.values()] == [[item.id for item in items] for items in mixed.skills.values()]
    assert scores.warnings == ()
    assert scores.mean == pytest.approx((0.75 + 1 / 3 + 0.75 + 0.25) / 4, abs=1e-15)


def test_requests_of_one_kind_and_setting_go_together(mixed: TaskSet) -> None:
    """And an item that another skill asks as well is not asked again."""
    model = Oracle(ANSWERS)
    with ScoreStore(":memory:") as store:
        score_text_model(model, "m", mixed, store)
    prompts = [str(document["prompt"]) for document in WORDS]
    assert model.calls == [
        ("generate ['\\n'] 10", *prompts),
        ("loglikelihood", *(f"{document['prompt']} {choice}" for document in CHOICES for choice in document["choices"])),
        ("generate ['.'] 3", *prompts[2:]),
        ("loglikelihood", *(f"{document['prompt']}{document['answer']}" for document in WORDS)),
    ]


def test_two_settings_in_one_batch(tmp_path: Path) -> None:
    for name, documents, length in (("a", WORDS[:1], 4), ("b", WORDS[1:3], 5), ("c", WORDS[3:], 4)):
        write_task(tmp_path, name, documents=documents, tag="all", generation_kwargs={"until": ["\n"], "max_gen_toks": length})
    model = Oracle(ANSWERS)
    with ScoreStore(":memory:") as store:
        scores = score_text_model(model, "m", TaskSet.load(["all"], tmp_path), store)
    prompts = [str(document["prompt"]) for document in WORDS]
    assert model.calls == [("generate ['\\n'] 4", prompts[0], prompts[3]), ("generate ['\\n'] 5", prompts[1], prompts[2])]
    assert list(scores.items["all"].values()) == [1.0] * 4


def test_a_document_that_is_there_twice_is_asked_once(tmp_path: Path) -> None:
    write_task(tmp_path, documents=[WORDS[0], WORDS[1], WORDS[0]])
    model, batches = Oracle({"reverse: abcd =": "dcba"}), []
    with ScoreStore(":memory:") as store:
        scores = score_text_model(model, "m", TaskSet.load(["task"], tmp_path), store, on_batch=lambda *batch: batches.append(batch))
        assert store.counts() == (1, 2)
    assert [len(call) - 1 for call in model.calls] == [2]
    assert batches == [("task", 2)]
    assert list(scores.items["task"].values()) == [1.0, 0.0, 1.0]


def test_nan_counts_as_nothing_and_is_said(mixed: TaskSet) -> None:
    with ScoreStore(":memory:") as store:
        first = score_text_model(Oracle(ANSWERS, nan=str(CHOICES[0]["prompt"])), "m", mixed, store)
        second = score_text_model(Oracle(), "m", mixed, store)
    assert first == second
    assert list(first.items["choice"].values()) == [0.0, 0.0, 0.0]
    assert first.warnings == ("choice: the model answers NaN on 1 of 3 items; they count as 0.",)


# -- nothing twice ----------------------------------------------------------------------------------------------------------------


def test_a_second_run_asks_nothing_and_needs_no_model(long: TaskSet, tmp_path: Path) -> None:
    def no_model() -> Oracle:
        raise AssertionError("everything is known")

    with ScoreStore(tmp_path / "s") as store:
        first = score_text_model(Oracle(EVERYTHING), "m", long, store)
    with ScoreStore(tmp_path / "s") as store:
        assert score_text_model(no_model, "m", long, store) == first
    assert first.tasks() == {"right": 1.0, "choice": 0.5}


def test_another_model_is_asked_everything(long: TaskSet) -> None:
    with ScoreStore(":memory:") as store:
        score_text_model(Oracle(EVERYTHING), "m", long, store)
        other = Oracle()
        assert score_text_model(other, "n", long, store).tasks() == {"right": 0.0, "choice": 0.5}
        assert sum(len(call) - 1 for call in other.calls) == 300 + 2 * 150
        assert store.counts() == (2, 900)


def test_a_model_is_made_once_and_only_when_it_is_needed(long: TaskSet) -> None:
    made = []

    def make() -> Oracle:
        made.append(Oracle(EVERYTHING))
        return made[-1]

    with ScoreStore(":memory:") as store:
        score_text_model(make, "m", long, store)
        score_text_model(make, "m", long, store)
    assert len(made) == 1


def batches_of(calls: Sequence[tuple[str, ...]]) -> list[list[str]]:
    return [list(call[1:]) for call in calls]


def test_batches(long: TaskSet) -> None:
    model, heard = Oracle(EVERYTHING), []
    with ScoreStore(":memory:") as store:
        score_text_model(
            model, "m", long, store, description="the model", on_batch=lambda *batch: heard.append((*batch, store.counts()[1]))
        )
    assert BATCH_ITEMS == 128
    assert [len(call) for call in batches_of(model.calls)] == [128, 128, 44, 256, 44]
    assert [prompt for call in batches_of(model.calls)[:3] for prompt in call] == [f"{word}?" for word in WORDLIST]
    # A batch is heard of when it has been committed.
    assert heard == [("right", 128, 128), ("right", 128, 256), ("right", 44, 300), ("choice", 128, 428), ("choice", 22, 450)]


@pytest.mark.parametrize("after", [0, 1, 2, 3, 4])
def test_an_interrupted_run_asks_exactly_the_rest_in_the_same_batches(long: TaskSet, tmp_path: Path, after: int) -> None:
    undisturbed = Oracle(EVERYTHING)
    with ScoreStore(":memory:") as store:
        expected = score_text_model(undisturbed, "m", long, store)
    first, second = Oracle(EVERYTHING, until=after), Oracle(EVERYTHING)
    with ScoreStore(tmp_path / "s") as store, pytest.raises(Interrupted):
        score_text_model(first, "m", long, store)
    with ScoreStore(tmp_path / "s") as store:
        assert store.counts()[1] == [0, 128, 256, 300, 428][after]
        assert score_text_model(second, "m", long, store) == expected
        assert store.counts() == (1, 450)
    assert batches_of([*first.calls, *second.calls]) == batches_of(undisturbed.calls)
    assert len(first.calls) == after


def test_a_wrong_number_of_replies_is_an_error(mixed: TaskSet) -> None:
    """Never are replies shifted onto other items."""

    class Short(Oracle):
        def generate(self, prompts: Sequence[str], *, until: Sequence[str], max_new_tokens: int) -> list[str]:
            return super().generate(prompts, until=until, max_new_tokens=max_new_tokens)[:-1]

    with ScoreStore(":memory:") as store, pytest.raises(ValueError, match="zip"):
        score_text_model(Short(), "m", mixed, store)


def test_a_metric_that_fails_loses_no_earlier_batch(tmp_path: Path) -> None:
    write_task(tmp_path, "fine", documents=[{"prompt": f"{word}?", "answer": word} for word in WORDLIST[:BATCH_ITEMS]])
    write_task(tmp_path, "fails", process_results="!function utils.mark")
    (tmp_path / "utils.py").write_text("def mark(document, results):\n    return {'exact_match': {'': 1.0}[results[0]]}\n")
    with ScoreStore(":memory:") as store:
        with pytest.raises(UserError, match="task 'fails': its metric fails on item"):
            score_text_model(Oracle(ANSWERS), "m", TaskSet.load(["fine", "fails"], tmp_path), store)
        assert store.counts() == (1, BATCH_ITEMS)


def test_scores_are_those_of_the_items_whatever_the_store_holds(long: TaskSet, tmp_path: Path) -> None:
    """A store that knows items here and there gives the same result as an empty one."""
    keys = [item.key for items in long.skills.values() for item in items]
    with ScoreStore(":memory:") as empty:
        expected = score_text_model(Oracle(EVERYTHING), "m", long, empty)
        values = empty.known("m", keys)
        for seed in range(3):
            with ScoreStore(tmp_path / str(seed)) as store:
                some = random.Random(seed).sample(keys, 170)
                store.add("m", "", {key: values[key] for key in some})
                model = Oracle(EVERYTHING)
                assert score_text_model(model, "m", long, store) == expected
                assert store.counts() == (1, 450)
                asked = sum(1 for key in keys[:300] if key not in some) + 2 * sum(1 for key in keys[300:] if key not in some)
                assert sum(len(call) - 1 for call in model.calls) == asked
                assert store.known("m", keys) == values


# -- parts of the items -----------------------------------------------------------------------------------------------------------


def prefix(tasks: TaskSet, count: int) -> Plan:
    return Plan({skill: tasks.order[skill][:count] for skill in tasks.skills})


def test_a_prefix_costs_what_it_lacks(long: TaskSet) -> None:
    """50 items after 25 are 25 more, and the values are those of the whole."""
    model = Oracle(EVERYTHING)
    with ScoreStore(":memory:") as store:
        everything = score_text_model(Oracle(EVERYTHING), "other", long, store)
        first = score_text_model(model, "m", long, store, plan=prefix(long, 25))
        second = score_text_model(model, "m", long, store, plan=prefix(long, 50))
        third = score_text_model(model, "m", long, store, plan=prefix(long, 50))
    assert [found.cost.items for found in (first, second, third)] == [50, 100, 100]
    assert [found.cost.computed for found in (first, second, third)] == [50, 50, 0]
    assert second == third
    for skill, values in second.items.items():
        assert list(values) == list(long.order[skill][:50])
        assert values == {name: everything.items[skill][name] for name in values}
    assert sum(len(call) - 1 for call in model.calls) == 50 + 2 * 50


def test_losses_come_with_the_scores_and_stay(long: TaskSet) -> None:
    with ScoreStore(":memory:") as store:
        scores = score_text_model(Oracle(EVERYTHING), "m", long, store)
        assert score_text_model(Oracle(), "m", long, store) == scores
    assert set(scores.losses) == {"choice"}, "what is generated has no loss"
    losses = list(scores.losses["choice"].values())
    assert losses == [2.0 if number % 2 == 0 else 3.0 for number in range(150)]  # a blank and one or two letters, by the oracle
    assert scores.loss == 2.5


def test_numbers_that_are_none_make_an_outcome_invalid(mixed: TaskSet) -> None:
    class Nonsense(Oracle):
        def generate(self, prompts: Sequence[str], *, until: Sequence[str], max_new_tokens: int) -> list[str]:
            return [Unanswered() if "tiger" in prompt else "x" for prompt in prompts]

    with ScoreStore(":memory:") as store:
        scores = score_text_model(Nonsense(), "m", mixed, store)
        assert score_text_model(Oracle(ANSWERS), "n", mixed, store).status == "ok"
    assert scores.status == "invalid"
    assert scores.warnings[0] == "words: the model answers NaN on 1 of 4 items; they count as 0."
    assert scores.error == scores.warnings[0]


def test_answers_are_kept_by_their_digest(mixed: TaskSet) -> None:
    with ScoreStore(":memory:") as store:
        score_text_model(Oracle(ANSWERS), "m", mixed, store)
        words = [store.known("m", [item.key])[item.key].answer for item in mixed.skills["words"]]
        (choice,) = {store.known("m", [item.key])[item.key].answer for item in mixed.skills["choice"]}
    assert words == [hashlib.sha256(str(document["answer"]).encode()).hexdigest()[:16] for document in WORDS]
    assert choice is None


def test_a_few_items_of_each_skill_are_asked_together(long: TaskSet) -> None:
    model, heard = Oracle(EVERYTHING), []
    with ScoreStore(":memory:") as store:
        score_text_model(model, "m", long, store, plan=prefix(long, 100), on_batch=lambda *batch: heard.append(batch))
    assert [(call[0].split()[0], len(call) - 1) for call in model.calls] == [
        ("loglikelihood", 56),
        ("generate", 100),
        ("loglikelihood", 144),
    ]
    assert heard == [("right", 100), ("choice", 28), ("choice", 72)]
