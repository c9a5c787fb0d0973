"""Tasks whose answers are programs: what the model writes is put together with the tests and run."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from modelglue.errors import UserError
from modelglue.evaluation import ScoreStore, TaskSet, program_items, score_text_model
from modelglue.evaluation.sandbox import Verdict, isolation_here
from tests.evaluation.task_files import write_lines, write_settings
from tests.evaluation.test_scoring import Oracle

PROBLEMS = [{"prompt": f"def add{number}(a):\n", "test": f"assert add{number}(1) == {1 + number}", "number": number} for number in range(4)]
SETTINGS: Mapping[str, Any] = {
    "task": "sums", "task_alias": "code", "kind": "program", "data": {"test": "sums"},
    "prompt": "{{prompt}}", "before": "{{prompt}}", "after": "\n{{test}}\n", "until": ["\ndef "], "max_new_tokens": 40, "seconds": 5,
}  # fmt: skip


def write(folder: Path, problems: Sequence[Mapping[str, Any]] = PROBLEMS, **changes: Any) -> Path:
    write_lines(folder / "sums.jsonl", problems)
    write_settings(folder / "sums.yaml", {**SETTINGS, **changes})
    return folder


ANSWERS = {
    "def add0(a):\n": "    return a",
    "def add1(a):\n": "    return a - 1",
    "def add2(a):\n": "    return a + 2",
    "def add3(a):\n": "    raise SystemExit",
}


def test_a_program_that_passes_its_tests_is_worth_one(tmp_path: Path) -> None:
    tasks = TaskSet.load(["sums"], write(tmp_path))
    model = Oracle(ANSWERS)
    with ScoreStore(":memory:") as store:
        scores = score_text_model(model, "m", tasks, store)
        assert score_text_model(Oracle(), "m", tasks, store) == scores
    assert list(scores.items["code"].values()) == [1.0, 0.0, 1.0, 0.0]
    assert scores.losses == {}
    assert model.calls == [("generate ['\\ndef '] 40", *ANSWERS)]


def test_programs_are_run_several_at_once_and_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two wait for one another, so one after the other would wait for ever."""
    monkeypatch.setenv("MODELGLUE_WORKERS", "2")
    meeting = threading.Barrier(2, timeout=30)

    def run(source: str, *_: Any) -> Verdict:
        meeting.wait()
        return Verdict("add2" in source, "", "")

    monkeypatch.setattr(program_items, "run_program", run)
    with ScoreStore(":memory:") as store:
        scores = score_text_model(Oracle(), "m", TaskSet.load(["sums"], write(tmp_path)), store)
    assert list(scores.items["code"].values()) == [0.0, 0.0, 1.0, 0.0]


def test_keys_change_with_all_that_a_value_depends_on(tmp_path: Path) -> None:
    def key(name: str, **changes: Any) -> str:
        (tmp_path / name).mkdir()
        return TaskSet.load(["sums"], write(tmp_path / name, **changes)).skills["code"][0].key

    plain = key("plain")
    assert key("again", task_alias="code", source="elsewhere", sample=4) == plain
    changed = [
        key("prompt", prompt="{{prompt}} "), key("before", before=""), key("after", after="\n{{test}}"), key("until", until=[]),
        key("tokens", max_new_tokens=41), key("seconds", seconds=6), key("memory", memory_mb=100), key("language", language="javascript"),
    ]  # fmt: skip
    assert len({plain, *changed}) == 9


def test_a_sample_is_chosen_by_the_ids(tmp_path: Path) -> None:
    problems = [{**PROBLEMS[0], "number": number} for number in range(50)]
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    first = TaskSet.load(["sums"], write(tmp_path / "a", problems, sample=20)).skills["code"]
    second = TaskSet.load(["sums"], write(tmp_path / "b", problems[::-1], sample=20)).skills["code"]
    assert len(first) == 20
    assert {item.id for item in first} == {item.id for item in second}
    every = [item.id for item in TaskSet.load(["sums"], write(tmp_path / "a", problems)).skills["code"]]
    places = [every.index(item.id) for item in first]
    assert places == sorted(places)
    assert places != list(range(20))


@pytest.mark.skipif(shutil.which("node") is None or isolation_here() != "jail", reason="needs Node.js and a jail")
def test_programs_in_javascript(tmp_path: Path) -> None:
    problems = [{"prompt": "const f = (a) => {\n", "test": f"console.assert(f(1) === {number});"} for number in (1, 2)]
    tasks = TaskSet.load(["sums"], write(tmp_path, problems, language="javascript"))
    with ScoreStore(":memory:") as store:
        scores = score_text_model(Oracle({"const f = (a) => {\n": "  return a;\n}"}), "m", tasks, store)
    assert list(scores.items["code"].values()) == [1.0, 0.0]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"language": "cobol"}, "language is 'cobol'; allowed are python, javascript"),
        ({"after": "{{tests}}"}, "after cannot be made of document 0: 'tests' is undefined. Correct the template."),
        ({"prompt": "{{prompt"}, "prompt cannot be made of document 0"),
        ({"seconds": "ten"}, "seconds is 'ten'; allowed is a int or float"),
        ({"promt": "x"}, "unknown key 'promt'. Did you mean 'prompt'"),
        ({"data": {"test": "sums", "more": "sums"}}, "data names several splits"),
        ({"data": None}, "data is missing; allowed is a dict"),
        ({"data": {"test": "gone"}, "source": "a shop"}, "its data is not there: gone(.jsonl, .json or .parquet) is not in"),
        ({"kind": "programme"}, "kind is 'programme'; allowed are harness, program, bits_per_byte and group. Did you mean 'program'"),
    ],
)
def test_what_is_wrong_is_said(tmp_path: Path, changes: Mapping[str, Any], said: str) -> None:
    with pytest.raises(UserError) as caught:
        TaskSet.load(["sums"], write(tmp_path, **changes))
    assert said in str(caught.value)
    assert str(tmp_path / "sums.yaml") in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("sums.jsonl", '{"a": 1}\n{"a": \n', "sums.jsonl:2: is not valid JSON"),
        ("sums.jsonl", "[1]\n", "sums.jsonl:1: is '[1]'; allowed is one JSON object per line"),
        ("sums.json", "{", "sums.json:1: is not valid JSON"),
        ("sums.json", '{"rows": [1]}', "sums.json: allowed is a list of JSON objects"),
        ("sums.parquet", "no table", "sums.parquet: is no Parquet file that can be read"),
    ],
)
def test_files_of_documents_that_are_none(tmp_path: Path, name: str, content: str, said: str) -> None:
    write(tmp_path)
    (tmp_path / "sums.jsonl").unlink()
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError) as caught:
        TaskSet.load(["sums"], tmp_path)
    assert said in str(caught.value)


def test_all_faults_of_a_list_are_said_together(tmp_path: Path) -> None:
    write(tmp_path, language="cobol")
    write_settings(tmp_path / "other.yaml", {**SETTINGS, "task": "other", "data": {"test": "gone"}})
    with pytest.raises(UserError, match=r"(?s)task 'sums' .*cobol.*\n.*task 'other' .*gone"):
        TaskSet.load(["sums", "other"], tmp_path)
    with pytest.raises(UserError, match="is of kind program, which has one metric; leave ':acc' out"):
        TaskSet.load(["sums:acc"], tmp_path)
