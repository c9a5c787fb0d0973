"""Our runner against lm-evaluation-harness's own run on the same model: every reply, and every item's value, must be the same."""

from __future__ import annotations

import contextlib
import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from modelglue.checkpoint import open_checkpoint
from modelglue.evaluation import TaskSet, evaluate
from modelglue.models import LiveTextModel, load_live, load_tokenizer
from tests.evaluation.task_files import CHOICE, GENERATION, LIKELIHOOD, write_task
from tests.small_zoo import TINY_ZOO

MODEL = TINY_ZOO / "models" / "generalist"
#: task -> the metrics that are compared
TASKS = {
    "generated": ["exact_match"],
    "generated_shots": ["exact_match"],
    "choice": ["acc", "acc_norm"],
    "choice_shots": ["acc", "acc_norm"],
    "likely": ["acc"],
    "likely_shots": ["acc"],
}


def documents(skill: str, split: str, count: int) -> list[dict[str, Any]]:
    lines = (TINY_ZOO / "tasks" / "data" / skill / f"{split}.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines[:count]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tasks")
    words, more_words = documents("reverse", "proxy", 12), documents("sort", "proxy", 12)
    choices = documents("larger", "proxy", 12)
    # The wrong choices are cut to one letter, so that likelihood and likelihood per letter disagree.
    for document in choices:
        wrong = 1 - document["gold"]
        document["choices"][wrong] = document["choices"][wrong][0]
    write_task(folder, "generated", GENERATION, words)
    write_task(folder, "generated_shots", GENERATION, words, shots=more_words[:5])
    write_task(folder, "choice", CHOICE, choices)
    write_task(folder, "choice_shots", CHOICE, choices, shots=documents("larger", "confirmation", 5))
    write_task(folder, "likely", LIKELIHOOD, [*words, *more_words])
    write_task(folder, "likely_shots", LIKELIHOOD, words, shots=more_words[:5])
    return folder


@pytest.fixture(scope="module")
def theirs(folder: Path) -> Mapping[str, list[dict[str, Any]]]:
    """Task -> the harness's samples, in the order of the documents."""
    pytest.importorskip("accelerate")
    with warnings.catch_warnings(), contextlib.chdir(folder):
        warnings.simplefilter("ignore")
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
        from transformers import AutoModelForCausalLM, AutoTokenizer

        model = AutoModelForCausalLM.from_pretrained(MODEL, dtype="float32")
        runner = HFLM(pretrained=model, tokenizer=AutoTokenizer.from_pretrained(MODEL), batch_size=5, device="cpu")
        manager = TaskManager(include_path=str(folder), include_defaults=False)
        found = simple_evaluate(model=runner, tasks=list(TASKS), task_manager=manager, bootstrap_iters=0, log_samples=True)
    return {task: sorted(samples, key=lambda sample: sample["doc_id"]) for task, samples in found["samples"].items()}


@pytest.fixture(scope="module")
def ours() -> LiveTextModel:
    checkpoint = open_checkpoint(MODEL)
    return LiveTextModel(load_live(checkpoint), load_tokenizer(checkpoint))


@pytest.mark.parametrize("task", TASKS)
def test_replies(folder: Path, theirs: Mapping[str, Any], ours: LiveTextModel, task: str) -> None:
    items = TaskSet.load([f"{task}:{TASKS[task][0]}"], folder).skills[task]
    assert len(items) == len(theirs[task]) >= 12
    for item, sample in zip(items, theirs[task], strict=True):
        if task.startswith("generated"):
            (request,) = item.requests
            assert request.generation is not None
            assert request.context == sample["arguments"][0][0]
            written = ours.generate([request.context], until=request.generation.until, max_new_tokens=request.generation.max_new_tokens)
            assert written == sample["resps"][0]
        else:
            pairs = [(request.context, request.continuation) for request in item.requests]
            assert pairs == [tuple(pair) for pair in sample["arguments"]]
            found = ours.loglikelihood(pairs)
            expected = [reply[0] for reply in sample["resps"]]
            assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
            assert [value for value, _ in found] == pytest.approx([value for value, _ in expected], abs=2e-5)


@pytest.mark.parametrize(("task", "metric"), [(task, metric) for task, metrics in TASKS.items() for metric in metrics])
def test_values(folder: Path, theirs: Mapping[str, Any], task: str, metric: str) -> None:
    scores = evaluate(MODEL, [f"{task}:{metric}"], include=folder)
    expected = [float(sample[metric]) for sample in theirs[task]]
    assert list(scores.items[task].values()) == expected
    assert scores.mean == pytest.approx(sum(expected) / len(expected), abs=1e-12)


def test_the_comparison_can_fail(theirs: Mapping[str, Any]) -> None:
    """Right and wrong answers, prompts with examples, and choices on which the metrics differ: all are among what is compared."""
    values = {task: [[float(sample[metric]) for sample in theirs[task]] for metric in metrics] for task, metrics in TASKS.items()}
    everything = [value for metrics in values.values() for metric in metrics for value in metric]
    assert {0.0, 1.0} == set(everything)
    assert theirs["generated_shots"][0]["arguments"][0][0].count("sort:") == 2
    assert values["choice"][0] != values["choice"][1]
