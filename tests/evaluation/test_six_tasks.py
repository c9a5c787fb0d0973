"""The six tasks of the paper and their proxies, on a few documents of the published form."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from modelglue.errors import UserError
from modelglue.evaluation import Item, ScoreStore, TaskSet, leak_check, score_text_model
from modelglue.evaluation.definitions import shipped_names
from tests.evaluation.task_files import write_lines
from tests.evaluation.test_scoring import Oracle

SKILLS = ["arc", "winogrande", "mmlu", "gsm8k", "mbpp", "humaneval"]


def arc(number: int) -> dict[str, Any]:
    labels = "ABCD" if number % 2 else "1234"
    choices = {"text": [f"stone {number}", "rain", "wind", "the sun's light"], "label": list(labels)}
    return {"id": f"Mercury_{number}", "question": f"What warms lake {number}?", "choices": choices, "answerKey": labels[3]}


def winogrande(number: int) -> dict[str, Any]:
    sentence = f"Box {number} did not fit into the case because the _ wasn't large enough."
    return {"sentence": sentence, "option1": "box", "option2": "case", "answer": str(1 + number % 2)}


def mmlu(number: int, subject: str = "high_school_biology") -> dict[str, Any]:
    return {"question": f"How many legs has ant {number}? ", "subject": subject, "choices": ["2", "4", "6", "8"], "answer": 2}


def tiny_mmlu(number: int) -> dict[str, Any]:
    head = "The following are multiple choice questions (with answers) about  high school biology.\n\nQ\nAnswer: A\n\n"
    return {**mmlu(number), "input_formatted": f"{head}How many legs has ant {number}?\nA. 2\nB. 4\nC. 6\nD. 8\nAnswer:"}


def gsm8k(number: int) -> dict[str, Any]:
    return {"question": f"Ann has {number} nuts and finds 1,000 more. How many?", "answer": f"{number}+1000\n#### {number + 1000:,}"}


def mbpp(number: int) -> dict[str, Any]:
    tests = [f"assert add_{number}(1) == {1 + number}", f"assert add_{number}(2) == {2 + number}"]
    return {
        "task_id": number, "text": f"Write a function to add {number}.", "code": "", "test_list": tests, "test_setup_code": "",
        "challenge_test_list": [],
    }  # fmt: skip


def humaneval(number: int) -> dict[str, Any]:
    return {
        "task_id": f"HumanEval/{number}", "prompt": f'def add_{number}(a):\n    """Add {number}."""\n', "entry_point": f"add_{number}",
        "canonical_solution": f"    return a + {number}\n", "test": f"def check(candidate):\n    assert candidate(1) == {1 + number}\n",
    }  # fmt: skip


def humanevalpack(number: int) -> dict[str, Any]:
    prompt = f"/* Add {number}. */\nconst add{number} = (a) => {{\n"
    return {
        "task_id": f"JavaScript/{number}",
        "prompt": prompt,
        "test": f"console.assert(add{number}(1) === {1 + number});",
        "declaration": "",
    }


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Some files as JSON lines, some as the hub's Parquet."""
    folder = tmp_path / "data"
    monkeypatch.setenv("MODELGLUE_DATA", str(folder))
    files: Mapping[str, Sequence[Mapping[str, Any]]] = {
        "arc_challenge/train": [arc(number) for number in range(100, 130)],
        "arc_challenge/test": [arc(number) for number in range(6)],
        "tiny_arc/test": [arc(number) for number in range(2)],
        "winogrande_xl/train": [winogrande(number) for number in range(100, 110)],
        "winogrande_xl/validation": [winogrande(number) for number in range(6)],
        "tiny_winogrande/validation": [winogrande(number) for number in range(2)],
        "mmlu/dev": [mmlu(number, subject) for subject in ("high_school_biology", "virology") for number in range(100, 105)],
        "mmlu/test": [mmlu(number, subject) for subject in ("virology", "high_school_biology") for number in range(3)],
        "tiny_mmlu/test": [tiny_mmlu(number) for number in range(2)],
        "gsm8k/train": [gsm8k(number) for number in range(100, 110)],
        "gsm8k/test": [gsm8k(number) for number in range(6)],
        "tiny_gsm8k/test": [gsm8k(number) for number in range(2)],
        "mbpp/test": [mbpp(number) for number in range(3)],
        "mbpp/validation": [mbpp(number) for number in range(10, 12)],
        "humaneval/test": [humaneval(number) for number in range(3)],
        "humanevalpack_js/test": [humanevalpack(number) for number in range(40)],
    }
    for name, documents in files.items():
        place = folder / name
        place.parent.mkdir(parents=True, exist_ok=True)
        if name in ("arc_challenge/test", "mmlu/test"):
            from pyarrow import Table, parquet

            half = len(documents) // 2
            for part, rows in enumerate((documents[:half], documents[half:])):
                parquet.write_table(Table.from_pylist(list(rows)), place.parent / f"test-0000{part}-of-00002.parquet")
        elif name == "mbpp/test":
            place.with_suffix(".json").write_text(json.dumps(list(documents)))
        else:
            write_lines(place.with_suffix(".jsonl"), documents)
    return folder


def contexts(items: Sequence[Item]) -> list[str]:
    return [item.context for item in items]


def test_the_six_tasks(data: Path) -> None:
    tasks = TaskSet.load(["modelglue_six"])
    assert list(tasks.skills) == SKILLS
    assert [len(items) for items in tasks.skills.values()] == [6, 6, 6, 6, 3, 3]
    examples = [context.count("Answer:") for skill in ("arc", "mmlu", "gsm8k") for context in contexts(tasks.skills[skill])]
    assert examples == [26] * 6 + [6] * 6 + [6] * 6
    assert [len(context.split("\n\n")) for context in contexts(tasks.skills["winogrande"])] == [6] * 6
    first = tasks.skills["arc"][0]
    assert first.context.endswith("\n\nQuestion: What warms lake 0?\nAnswer:")
    assert [request.continuation for request in first.requests] == [" stone 0", " rain", " wind", " the sun's light"]
    one, other = tasks.skills["winogrande"][0].requests
    assert one.context.endswith("Box 0 did not fit into the case because the box")
    assert other.context.endswith("Box 0 did not fit into the case because the case")
    assert {one.continuation, other.continuation} == {" wasn't large enough."}
    heads = [context.split("\n\n")[0].split(" about ")[1] for context in contexts(tasks.skills["mmlu"])]
    assert heads == ["virology."] * 3 + ["high school biology."] * 3
    assert tasks.skills["mbpp"][0].context == '"""\nWrite a function to add 0.\nassert add_0(1) == 1\n"""\n'


def test_right_answers_are_worth_one(data: Path) -> None:
    """A model that knows all answers, and one that knows none."""

    class Knowing(Oracle):
        def loglikelihood(self, pairs: Sequence[tuple[str, str]]) -> list[tuple[float, bool]]:
            return [(0.0 if self._right(*pair) else -50.0, False) for pair in pairs]

        def _right(self, context: str, continuation: str) -> bool:
            question = context.rpartition("\n\n")[2]
            if "Box" in question:
                number = int(question.split()[1])
                return question.endswith("box" if number % 2 == 0 else "case")
            return continuation in (" C", " the sun's light")

        def generate(self, prompts: Sequence[str], *, until: Sequence[str], max_new_tokens: int) -> list[str]:
            return [self._text(prompt) for prompt in prompts]

        def _text(self, prompt: str) -> str:
            if "nuts" in prompt:
                number = int(prompt.rpartition("Ann has ")[2].split()[0])
                return f" So it is\n#### {number + 1000}."
            number = int("".join(filter(str.isdigit, prompt.partition("dd ")[2][:3].split("(")[0])) or 0)
            return f"def add_{number}(a):\n    return a + {number}" if prompt.startswith('"""') else f"    return a + {number}"

    for names in (
        ["modelglue_six"],
        ["modelglue_arc_proxy", "modelglue_winogrande_proxy", "modelglue_mmlu_proxy", "modelglue_gsm8k_proxy"],
    ):
        tasks = TaskSet.load(names)
        with ScoreStore(":memory:") as store:
            right = score_text_model(Knowing(), "right", tasks, store)
            wrong = score_text_model(Oracle(), "wrong", tasks, store)
        assert right.tasks() == dict.fromkeys(tasks.skills, 1.0)
        assert {skill for skill, value in wrong.tasks().items() if value == 0} >= {"gsm8k"}
        assert set(right.losses) == {"arc", "winogrande", "mmlu"}


def test_the_proxies(data: Path) -> None:
    tasks = TaskSet.load(["modelglue_six_proxy"])
    assert list(tasks.skills) == SKILLS
    assert [len(items) for items in tasks.skills.values()] == [2, 2, 2, 2, 2, 33]
    assert contexts(tasks.skills["arc"])[0].endswith("What warms lake 0?\nAnswer:")
    assert tasks.skills["humaneval"][0].context.startswith("/* Add ")


def test_proxies_that_are_test_items_are_found_and_left_out(data: Path) -> None:
    """Those of tinyBenchmarks, MMLU's among them, whose documents are of another form."""
    proxy, test = TaskSet.load(["modelglue_six_proxy"]), TaskSet.load(["modelglue_six"])
    with pytest.raises(UserError, match="tasks: test and proxy share "):
        leak_check({"proxy": proxy, "test": test})
    apart, dropped = test.apart_from([proxy])
    leak_check({"proxy": proxy, "test": apart})
    assert dropped == {"arc": 2, "winogrande": 2, "mmlu": 4, "gsm8k": 2, "mbpp": 0, "humaneval": 0}  # both subjects ask the same here
    assert [len(items) for items in apart.skills.values()] == [4, 4, 2, 4, 3, 3]
    with pytest.raises(UserError, match="every item of 'arc' is in the other item sets"):
        proxy.apart_from([test])


def test_what_is_missing_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of it at once, by file, with where it was looked for and where it can be had."""
    monkeypatch.delenv("MODELGLUE_DATA", raising=False)
    with pytest.raises(UserError) as caught:
        TaskSet.load(["modelglue_six"])
    lines = str(caught.value).splitlines()
    assert len(lines) == 6
    assert "its data is not there: gsm8k/test(.jsonl, .json or .parquet) is not in any folder that is named; gsm8k/train" in lines[3]
    assert lines[3].endswith(
        "It is published as openai/gsm8k, configuration main (splits test and train). "
        "Name the folder that has it in the environment variable MODELGLUE_DATA."
    )
    monkeypatch.setenv("MODELGLUE_DATA", str(tmp_path))
    with pytest.raises(UserError, match=rf"humaneval/test\(.*\) is not in {tmp_path}\. .* Put it there\."):
        TaskSet.load(["modelglue_humaneval"])


def test_documents_of_another_form_are_refused(data: Path) -> None:
    write_lines(data / "gsm8k" / "test.jsonl", [{"problem": "?"}])
    with pytest.raises(UserError, match=r"task 'modelglue_gsm8k' .*cannot be loaded: .*Are its documents of the form that it expects"):
        TaskSet.load(["modelglue_gsm8k"])
    (data / "mmlu" / "dev.jsonl").write_text('{"question": "?"}\n')
    with pytest.raises(UserError, match="a document has no field 'subject', by which the task is divided"):
        TaskSet.load(["modelglue_mmlu"])


def test_every_shipped_name_is_loaded_here() -> None:
    tests = [f"modelglue_{skill}" for skill in SKILLS]
    assert shipped_names() == sorted([*tests, *(f"{name}_proxy" for name in tests), "modelglue_six", "modelglue_six_proxy"])


def test_a_metric_of_a_shipped_task_can_be_named(data: Path) -> None:
    chosen = TaskSet.load(["modelglue_arc:acc"]).skills["arc"][0]
    plain = TaskSet.load(["modelglue_arc"]).skills["arc"][0]
    assert chosen.id == plain.id
    assert chosen.key != plain.key
    replies = [(-3.5, False), (-3.0, False), (-4.0, False), (-9.0, False)]
    assert [item.mark(replies) for item in (chosen, plain)] == [(0.0, 9.0), (0.0, 9.0)]
    replies = [(-6.0, False), (-5.0, False), (-5.5, False), (-6.5, False)]
    assert [item.mark(replies)[0] for item in (chosen, plain)] == [0.0, 1.0], "a long answer is forgiven its length"
