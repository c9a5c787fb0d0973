"""Task sets: what an item is called, what its key depends on, and every task that is refused."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from modelglue.errors import UserError
from modelglue.evaluation import Item, TaskSet, leak_check
from tests.evaluation.task_files import CHOICE, CHOICES, GENERATION, LIKELIHOOD, WORDS, write_lines, write_settings, write_task
from tests.small_zoo import write_tasks

#: the harness's default indexing of its own tasks takes seconds; names with this word are in none of its files
ODD = "zyzzyva"


def items(folder: Path, name: str = "task") -> tuple[Item, ...]:
    (found,) = TaskSet.load([name], folder).skills.values()
    return found


# -- names and keys ---------------------------------------------------------------------------------------------------------------


def test_an_id_is_a_function_of_the_document_alone(tmp_path: Path) -> None:
    """Frozen: results of different runs are paired by it."""
    write_task(tmp_path / "a")
    assert [item.id for item in items(tmp_path / "a")] == ["e61b0b855d4ac567", "6461dad21c8d18fe", "9a7981ea4fc8372b", "5f6df2141780c06c"]
    write_task(tmp_path / "b", "other", documents=WORDS[::-1], doc_to_text="Q: {{prompt}}")
    assert {item.id for item in items(tmp_path / "b", "other")} == {item.id for item in items(tmp_path / "a")}


def test_a_key_does_not_depend_on_order_folder_or_names(tmp_path: Path) -> None:
    write_task(tmp_path / "a")
    write_task(tmp_path / "b" / "deep", "other", documents=[WORDS[2], WORDS[0]], task_alias="skill", metadata={"version": 7})
    keys = [item.key for item in items(tmp_path / "a")]
    assert all(re.fullmatch("[0-9a-f]{64}", key) for key in keys)
    assert len(set(keys)) == 4
    assert [item.key for item in items(tmp_path / "b", "other")] == [keys[2], keys[0]]


def test_a_key_is_the_same_in_every_process(tmp_path: Path) -> None:
    """Functions of a task file are known by name and text, never by address."""
    functions = "def mark(document, results):\n    return {'exact_match': float(results[0] == document['answer'])}\n"
    for name in ("a", "b"):
        write_task(tmp_path / name, process_results="!function utils.mark")
        (tmp_path / name / "utils.py").write_text(functions)
    assert [item.key for item in items(tmp_path / "a")] == [item.key for item in items(tmp_path / "b")]


def marker(text: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        write_task(folder, process_results="!function utils.mark")
        (folder / "utils.py").write_text(f"def mark(document, results):\n    return {{'exact_match': {text}}}\n")

    return change


def tasks(**changes: Any) -> Callable[[Path], Any]:
    return lambda folder: write_task(folder, **changes)


def choices(**changes: Any) -> Callable[[Path], Any]:
    return tasks(kind=CHOICE, documents=CHOICES, **changes)


CASELESS = [{**GENERATION["metric_list"][0], "ignore_case": True}]
CHANGES: dict[str, tuple[Callable[[Path], Any], Callable[[Path], Any]]] = {
    "prompt": (tasks(), tasks(doc_to_text="{{prompt}} ")),
    "description": (tasks(), tasks(description="Answer.\n")),
    "answer": (tasks(), tasks(doc_to_target="{{answer}}!")),
    "filter": (tasks(), tasks(filter_list=None)),
    "metric": (tasks(), tasks(metric_list=CASELESS)),
    "stop": (tasks(), tasks(generation_kwargs={"until": ["."], "max_gen_toks": 10})),
    "length": (tasks(), tasks(generation_kwargs={"until": ["\n"], "max_gen_toks": 9})),
    "examples": (tasks(shots=WORDS[:3]), tasks(shots=WORDS[:3], num_fewshot=1)),
    "marking": (marker("0.5"), marker("0.25")),
    "gold": (choices(), choices(doc_to_target=0)),
    "choices": (choices(), choices(target_delimiter="")),
}


@pytest.mark.parametrize("what", CHANGES)
def test_a_key_changes_with_all_that_the_value_depends_on(tmp_path: Path, what: str) -> None:
    before, after = CHANGES[what]
    before(tmp_path / "before")
    after(tmp_path / "after")
    old, new = items(tmp_path / "before"), items(tmp_path / "after")
    assert [item.id for item in old] == [item.id for item in new]
    if what == "gold":  # one of the three had that answer before
        assert sum(a.key != b.key for a, b in zip(old, new, strict=True)) == 2
    else:
        assert {item.key for item in old} & {item.key for item in new} == set()


def test_a_key_changes_with_the_data_and_the_chosen_metric(tmp_path: Path) -> None:
    write_task(tmp_path, kind=CHOICE, documents=CHOICES)
    assert {item.key for item in items(tmp_path, "task:acc")} & {item.key for item in items(tmp_path, "task:acc_norm")} == set()
    before = items(tmp_path)
    write_lines(tmp_path / "task.jsonl", [{**CHOICES[0], "gold": 1}, *CHOICES[1:]])
    after = items(tmp_path)
    assert [a.key == b.key for a, b in zip(before, after, strict=True)] == [False, True, True]


def test_the_identity_of_a_set(tmp_path: Path) -> None:
    write_task(tmp_path, "a")
    write_task(tmp_path, "b", documents=WORDS[:2])
    both = TaskSet.load(["a", "b"], tmp_path)
    assert both.identity == TaskSet.load(["a", "b"], tmp_path).identity
    assert len({both.identity, *(TaskSet.load([name], tmp_path).identity for name in ("a", "b"))}) == 3


def test_a_document_that_is_there_twice_counts_twice(tmp_path: Path) -> None:
    write_task(tmp_path, documents=[WORDS[0], WORDS[1], WORDS[0], WORDS[0]])
    found = items(tmp_path)
    assert [item.id for item in found] == ["e61b0b855d4ac567", "6461dad21c8d18fe", "e61b0b855d4ac567-2", "e61b0b855d4ac567-3"]
    assert found[0].key == found[2].key == found[3].key != found[1].key


# -- requests and marks -----------------------------------------------------------------------------------------------------------


def test_requests_of_a_generation(tmp_path: Path) -> None:
    write_task(tmp_path, generation_kwargs={"until": "\n", "max_gen_toks": 7})
    item = items(tmp_path)[0]
    assert item.context == "reverse: abcd ="
    (request,) = item.requests
    assert request.generation is not None
    assert (request.continuation, request.generation.until, request.generation.max_new_tokens) == ("", ("\n",), 7)
    assert [item.mark([reply])[0] for reply in (" dcba ", "dcba", "DCBA", "")] == [1.0, 1.0, 0.0, 0.0]


def test_a_generation_without_settings_has_the_harness_defaults(tmp_path: Path) -> None:
    write_task(tmp_path, generation_kwargs=None)
    (request,) = items(tmp_path)[0].requests
    assert request.generation is not None
    assert (request.generation.until, request.generation.max_new_tokens) == (("\n\n",), 256)


def test_requests_of_a_choice(tmp_path: Path) -> None:
    write_task(tmp_path, kind=CHOICE, documents=[{**CHOICES[0], "choices": ["718", "4"]}])
    (item,) = items(tmp_path)
    assert [(request.context, request.continuation) for request in item.requests] == [(item.context, " 718"), (item.context, " 4")]
    assert item.mark([(-2.0, False), (-1.0, True)]) == (0.0, 2.0)
    assert items(tmp_path, "task:acc_norm")[0].mark([(-2.0, False), (-1.0, True)]) == (1.0, 2.0)
    assert item.mark([(-1.0, True), (-2.0, False)]) == (1.0, 1.0)
    value, loss = item.mark([(float("nan"), False), (-1.0, True)])
    assert loss is None
    assert value != value


def test_requests_of_a_likelihood(tmp_path: Path) -> None:
    write_task(tmp_path, kind=LIKELIHOOD)
    item = items(tmp_path, "task:acc")[0]
    assert [(request.context, request.continuation) for request in item.requests] == [("reverse: abcd =", "dcba")]
    assert [item.mark([reply])[0] for reply in ((-0.1, True), (-0.1, False))] == [1.0, 0.0]


def test_examples_before_every_question(tmp_path: Path) -> None:
    write_task(tmp_path, documents=WORDS[:2], shots=WORDS[2:])
    found = [item.context for item in items(tmp_path)]
    assert [sorted(context.split("\n\n")[:2]) for context in found] == [["reverse: tiger = regit", "reverse: zyx = xyz"]] * 2
    assert [context.split("\n\n")[2] for context in found] == ["reverse: abcd =", "reverse: noon ="]


@pytest.mark.parametrize("value", ["numpy.float32(0.5)", "numpy.float64(0.5)", "0.5"])
def test_values_of_any_number_type(tmp_path: Path, value: str) -> None:
    write_task(tmp_path, process_results="!function utils.mark")
    (tmp_path / "utils.py").write_text(f"import numpy\ndef mark(document, results):\n    return {{'exact_match': {value}}}\n")
    found, loss = items(tmp_path)[0].mark(["x"])
    assert loss is None
    assert (found, type(found)) == (0.5, float)


def test_a_metric_that_fails_on_some_answer(tmp_path: Path) -> None:
    write_task(tmp_path, process_results="!function utils.mark")
    (tmp_path / "utils.py").write_text("def mark(document, results):\n    return {'exact_match': int(results[0] or 1)}\n")
    item = items(tmp_path)[1]
    assert item.mark(["0"]) == (0.0, None)
    with pytest.raises(UserError, match=rf"task 'task': its metric fails on item {item.id}: ValueError\(.*'noon'\"\)\. Mend the task"):
        item.mark(["noon"])
    with pytest.raises(UserError, match=rf"its metric 'exact_match' gives 7 for item {item.id}; allowed is a number from 0 to 1"):
        item.mark(["7"])


# -- lists of tasks ---------------------------------------------------------------------------------------------------------------


def test_skills_are_named_by_alias_in_the_order_of_the_list(tmp_path: Path) -> None:
    write_task(tmp_path, "b_proxy", task_alias="b")
    write_task(tmp_path, "a", kind=CHOICE, documents=CHOICES)
    found = TaskSet.load(["b_proxy", "a:acc_norm"], tmp_path)
    assert [(skill, len(items)) for skill, items in found.skills.items()] == [("b", 4), ("a", 3)]
    assert found.contexts("a") == [document["prompt"] for document in CHOICES]


def test_a_group_is_one_skill(tmp_path: Path) -> None:
    """Its data stands beside its tasks, wherever the group's own file is."""
    write_task(tmp_path / "deep", "a")
    write_task(tmp_path / "deep", "b", kind=CHOICE, documents=CHOICES)
    write_settings(tmp_path / "group.yaml", {"group": "both", "task": ["a", "b"]})
    found = TaskSet.load(["both"], tmp_path)
    assert list(found.skills) == ["both"]
    assert [item.id for item in found.skills["both"]] == [item.id for name in ("a", "b") for item in items(tmp_path, name)]


def test_a_tag_is_one_skill_from_several_folders(tmp_path: Path) -> None:
    write_task(tmp_path / "one", "a", tag="both")
    write_task(tmp_path / "two", "b", documents=WORDS[:1], tag="both")
    found = TaskSet.load(["both"], tmp_path)
    assert [(skill, len(items)) for skill, items in found.skills.items()] == [("both", 5)]


def test_data_stands_beside_the_task_file_whatever_the_working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file of the same name in the working folder is another file."""
    write_task(tmp_path / "tasks")
    write_lines(tmp_path / "task.jsonl", WORDS[:1])
    monkeypatch.chdir(tmp_path)
    assert len(items(Path("tasks"))) == 4
    assert Path.cwd() == tmp_path


def test_data_in_the_working_folder_or_at_an_absolute_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, path in (("here", "elsewhere.jsonl"), ("absolute", str(tmp_path / "elsewhere.jsonl"))):
        write_task(tmp_path / "tasks", name, dataset_kwargs={"data_files": {"test": path}})
    write_lines(tmp_path / "elsewhere.jsonl", WORDS[:2])
    monkeypatch.chdir(tmp_path)
    assert [len(items(tmp_path / "tasks", name)) for name in ("here", "absolute")] == [2, 2]


def test_changed_data_is_noticed(tmp_path: Path) -> None:
    """The harness's data library keeps converted copies."""
    write_task(tmp_path)
    assert len(items(tmp_path)) == 4
    write_lines(tmp_path / "task.jsonl", WORDS[:3])
    assert len(items(tmp_path)) == 3


# -- refused ----------------------------------------------------------------------------------------------------------------------


def broken(text: str) -> Callable[[Path], Any]:
    def make(folder: Path) -> None:
        write_task(folder, "reverse")
        (folder / "broken.yaml").write_text(text)

    return make


def without_data(folder: Path) -> None:
    write_task(folder)
    (folder / "task.jsonl").unlink()


def with_data(text: str) -> Callable[[Path], Any]:
    def make(folder: Path) -> None:
        write_task(folder)
        (folder / "task.jsonl").write_text(text)

    return make


def twins(folder: Path) -> None:
    write_task(folder, "a", task_alias="same")
    write_task(folder, "b", task_alias="same")


def with_other_results(folder: Path) -> None:
    write_task(folder, process_results="!function utils.mark")
    (folder / "utils.py").write_text("def mark(document, results):\n    return {'other': 1.0}\n")


def group_of_nothing(folder: Path) -> None:
    write_settings(folder / "g.yaml", {"group": ODD, "task": []})


F1 = [{"metric": "f1", "aggregation": "f1", "higher_is_better": True}]
SAMPLING = {"until": ["\n"], "do_sample": True, "temperature": 0.7}
WARM = {"until": ["\n"], "temperature": 0.7}
ROLLING = {"output_type": "loglikelihood_rolling", "doc_to_text": "", "metric_list": None, "filter_list": None}

#: what is wrong -> (files, task list, what the message must hold; PLACE stands for the task and its file, FOLDER for its folder)
REFUSED: dict[str, tuple[Callable[[Path], Any], list[str], list[str]]] = {
    "unknown task": (
        tasks(name=f"{ODD}_proxy"),
        [f"{ODD}_prxy"],
        [f"task '{ODD}_prxy': no YAML file in FOLDER defines it", f"Did you mean '{ODD}_proxy'?"],
    ),
    "unknown metric": (tasks(), ["task:exact_mach"], ["PLACE: has no metric 'exact_mach'", "Did you mean 'exact_match'?"]),
    "not YAML": (broken(f"task: {ODD}\n  output_type: ["), [ODD], [f"task '{ODD}': FOLDER/broken.yaml:2: is not valid YAML: mapping"]),
    "missing include": (broken(f"task: {ODD}\ninclude: gone.yaml\n"), [ODD], ["FOLDER/broken.yaml: names it, but is no valid task file"]),
    "missing function": (
        tasks(process_results="!function gone.mark"),
        ["task"],
        ["PLACE: cannot be loaded", "Cannot import module 'gone'"],
    ),
    "missing data": (without_data, ["task"], ["PLACE: cannot be loaded: Unable to find 'FOLDER/task.jsonl'. Is its data there?"]),
    "data that is no JSON": (with_data('{"prompt": \n'), ["task"], ["PLACE: cannot be loaded", "JSON parse error"]),
    "no data": (with_data(""), ["task"], ["PLACE: cannot be loaded: there is not one item"]),
    "missing field": (tasks(doc_to_text="{{promt}}"), ["task"], ["PLACE: cannot be loaded: 'promt' is undefined"]),
    "empty group": (group_of_nothing, [ODD], ["(FOLDER/g.yaml): is a group without tasks"]),
    "one alias twice": (twins, ["a", "b"], ["tasks: 'b' has the alias 'same', which another task of the list has too", "task_alias"]),
    "one task twice": (tasks(), ["task", "task"], ["tasks: 'task' has the alias 'task'"]),
    "sampling": (tasks(generation_kwargs=SAMPLING), ["task"], ["PLACE: asks for sampling", "do_sample: false"]),
    "temperature": (tasks(generation_kwargs=WARM), ["task"], ["PLACE: asks for sampling"]),
    "repeats": (tasks(repeats=3), ["task"], ["PLACE: asks for 3 repeats", "Set repeats: 1."]),
    "rolling": (tasks(**ROLLING), ["task"], ["PLACE: output_type is loglikelihood_rolling; allowed are multiple_choice, loglikelihood,"]),
    "lower is better": (tasks(kind=LIKELIHOOD), ["task"], ["PLACE: lower is better for its metric 'perplexity'", "as TASK:METRIC"]),
    "programs": (tasks(unsafe_code=True), ["task"], ["PLACE: runs generated programs"]),
    "no metric": (tasks(metric_list=[]), ["task"], ["PLACE: has no metric. Give it a metric_list."]),
    "metric of the whole set": (
        choices(metric_list=F1),
        ["task"],
        ["task 'task': its metric 'f1' gives (0, ", "allowed is a number from 0 to 1 per item"],
    ),
    "other results": (
        with_other_results,
        ["task"],
        ["task 'task': gives no 'exact_match', but other. Name one as TASK:METRIC"],
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_refused(tmp_path: Path, what: str) -> None:
    make, names, parts = REFUSED[what]
    make(tmp_path)
    with pytest.raises(UserError) as caught:
        TaskSet.load(names, tmp_path)
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert part.replace("PLACE:", "task 'task' (FOLDER/task.yaml):").replace("FOLDER", str(tmp_path)) in message


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"{tmp_path}/gone: no such folder; tasks.include names a folder with task YAML files"):
        TaskSet.load(["task"], tmp_path / "gone")


def test_without_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    write_task(tmp_path)
    with pytest.raises(UserError, match=r'needs the extra "eval": pip install "modelglue\[eval\]"'):
        TaskSet.load(["task"], tmp_path)


# -- disjoint sets ----------------------------------------------------------------------------------------------------------------


def test_sets_that_share_a_document(tmp_path: Path) -> None:
    write_task(tmp_path, "proxy", documents=WORDS[:2])
    write_task(tmp_path, "test", documents=[*WORDS[1:3], WORDS[1]], doc_to_text="Q: {{prompt}}")
    write_task(tmp_path, "apart", documents=WORDS[2:])
    proxy, test, apart = (TaskSet.load([name], tmp_path) for name in ("proxy", "test", "apart"))
    leak_check({"proxy": proxy, "test": apart})
    with pytest.raises(
        UserError,
        match=r"tasks: test and proxy share 1 items \(one of them is 6461dad21c8d18fe of 'test': 'Q: reverse: noon ='\)\. The sets must be",
    ):
        leak_check({"proxy": proxy, "test": test})
    with pytest.raises(UserError, match="tasks: test and confirmation share 1 items"):
        leak_check({"proxy": proxy, "confirmation": apart, "test": TaskSet.load(["test"], write_again(tmp_path / "again"))})


def test_sets_that_ask_the_same_question(tmp_path: Path) -> None:
    """A number that only one of the documents carries does not make another question."""
    write_task(tmp_path, "proxy", documents=[{**document, "number": 0} for document in WORDS[:2]])
    write_task(tmp_path, "test", documents=[{**document, "number": 7} for document in WORDS[1:3]])
    proxy, test = (TaskSet.load([name], tmp_path) for name in ("proxy", "test"))
    assert not {item.id for item in proxy.skills["proxy"]} & {item.id for item in test.skills["test"]}
    with pytest.raises(UserError, match=r"tasks: test and proxy share 1 items .*'reverse: noon ='"):
        leak_check({"proxy": proxy, "test": test})


def write_again(folder: Path) -> Path:
    write_task(folder, "test", documents=WORDS[3:])
    return folder


def test_the_committed_sets_are_disjoint(tmp_path: Path) -> None:
    write_tasks(tmp_path, items=400)
    skills = ("reverse", "larger")
    leak_check({split: TaskSet.load([f"{skill}_{split}" for skill in skills], tmp_path) for split in ("proxy", "confirmation", "test")})


# -- losses and order -------------------------------------------------------------------------------------------------------------


def test_the_loss_is_that_of_the_right_answer(tmp_path: Path) -> None:
    """Nats; of a choice, of a continuation, of nothing where text is generated."""
    write_task(tmp_path, "choice", CHOICE, CHOICES)
    write_task(tmp_path, "likely", LIKELIHOOD)
    write_task(tmp_path, "words")
    write_task(tmp_path, "named", CHOICE, [{"prompt": "x", "choices": ["no", "yes"], "gold": "yes"}], doc_to_target="{{gold}}")
    replies = [(-1.5, False), (-0.25, True)]
    assert [item.mark(replies)[1] for item in items(tmp_path, "choice")] == [1.5 if c["gold"] == 0 else 0.25 for c in CHOICES]
    assert items(tmp_path, "likely:acc")[0].mark(replies[:1])[1] == 1.5
    assert items(tmp_path, "named")[0].mark(replies) == (1.0, 0.25)
    assert items(tmp_path, "words")[0].mark(["x"])[1] is None
    assert [items(tmp_path, name)[0].marker.gives_loss for name in ("choice", "likely:acc", "words")] == [True, True, False]


def test_the_order_is_a_function_of_the_ids(tmp_path: Path) -> None:
    """Whatever the order in the file, and whoever else is there."""
    documents = [{"prompt": f"{number}", "answer": "x"} for number in range(40)]
    write_task(tmp_path, "all", documents=documents)
    write_task(tmp_path, "reversed", documents=documents[::-1])
    write_task(tmp_path, "some", documents=documents[:20])
    every, turned, some = (TaskSet.load([name], tmp_path).order[name] for name in ("all", "reversed", "some"))
    ids = [item.id for item in items(tmp_path, "all")]
    assert sorted(every) == sorted(ids)
    assert list(every) != ids
    assert every == turned
    assert [name for name in every if name in some] == list(some)
    places = [ids.index(name) for name in every]
    assert 10 < sum(places[:20]) / 20 < 29, "a prefix is from everywhere"


def test_items_are_chosen_by_name(tmp_path: Path) -> None:
    write_task(tmp_path)
    tasks = TaskSet.load(["task"], tmp_path)
    first, second = tasks.order["task"][:2]
    assert [item.id for item in tasks.chosen({"task": [second, first, second]})["task"]] == [second, first]
    assert tasks.chosen(None) == dict(tasks.skills)
    with pytest.raises(UserError, match=r"unknown task 'tasc'; the tasks are task\. Did you mean 'task'"):
        tasks.chosen({"tasc": []})
    with pytest.raises(UserError, match=r"task 'task' has no item 'nobody' \(1 of 2 are unknown\)"):
        tasks.chosen({"task": [first, "nobody"]})
