"""Configurations of mergenetic, read as its scripts mean them; and item parameters that a search file names."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from modelglue.errors import UserError
from modelglue.evaluation import ScoreStore, TaskSet
from modelglue.evaluation.items import Mark
from modelglue.recipe import canonical, read_recipe
from modelglue.search import Facts, SearchSettings
from modelglue.search.settings import FitnessSettings, make_fitness, make_space
from modelglue.studies import Imported, read_search, run_search
from modelglue.studies.item_facts import item_facts, read_item_parameters
from tests.small_zoo import TINY_ZOO, write_tasks, write_yaml

#: the shipped example, with other names
ROMANIAN = {
    "pop_size": 1, "n_iter": 1, "models": {"ro": "org/math-7b"}, "base_model": "org/ro-7b", "path_to_store_merged_model": "merged/",
    "path_to_store_config": "runs/", "dtype": "float16", "run_id": "ro_math", "bench": "gsm8k", "mode": "gmpirt", "seed": 420,
    "langs": ["ro"], "tasks": {"search": {"ro": "gsm8k-ro", "base": "gsm8k-ro"}, "test": {"ro": "gsm8k-ro"}}, "metric": "exact_match",
    "device": "cuda:2", "n_samples": 10, "task_type": "FG_MATH", "eval_batch_size": 64, "additional_templates_folder": "lm_tasks",
}  # fmt: skip


def read(folder: Path, **changes: Any) -> Imported:
    plan = {key: value for key, value in {**ROMANIAN, **changes}.items() if value is not None}
    return read_search(write_yaml(folder / "mergenetic.yaml", plan))


def recipe_of(found: Imported, values: Mapping[str, float]) -> dict[str, Any]:
    file = found.file
    base = None if isinstance(file.zoo, str) else file.zoo.base
    space = make_space(SearchSettings(members=tuple(file.members or ()), base=base, space=file.space), Facts(layers=32))
    assert {parameter.name for parameter in space.space.parameters} == set(values)
    candidate = space.candidate(space.space.canonical(values))
    assert candidate is not None
    return dict(candidate.recipe)


def test_a_model_and_its_base_are_eleven_slerp_genes(tmp_path: Path) -> None:
    """Five points over the layers for attention, five for feed-forward, one number for the rest; the base stands at t = 0."""
    genes = np.random.default_rng(0).integers(0, 11, 11) / 10
    names = [*(f"g{n}/self_attn/t" for n in range(5)), *(f"g{n}/mlp/t" for n in range(5)), "rest/t"]
    ours = recipe_of(read(tmp_path), dict(zip(names, genes.tolist(), strict=True)))
    theirs = {
        "merge_method": "slerp", "base_model": "ro-7b", "dtype": "float16", "models": [{"model": "ro-7b"}, {"model": "math-7b"}],
        "parameters": {"t": [{"filter": "self_attn", "value": genes[:5].tolist()}, {"filter": "mlp", "value": genes[5:10].tolist()},
                             {"value": float(genes[10])}]},
    }  # fmt: skip
    assert canonical(read_recipe({**ours, "dtype": {"store": "float16"}})) == canonical(read_recipe(theirs))


@pytest.mark.parametrize("models", [{"it": "org/ita", "de": "org/deu"}, ["org/ita", "org/deu"], ["org/ita"]])
def test_several_models_or_a_list_of_them_are_dare_ties(tmp_path: Path, models: Any) -> None:
    names = [model.rpartition("/")[2] for model in (models.values() if isinstance(models, dict) else models)]
    found = read(tmp_path, models=models, tasks=["arc_it", "arc_de"])
    values = {f"{name}/{alias}": 0.25 * (n + 1) for n, alias in enumerate(names) for name in ("weight", "density")}
    recipe = recipe_of(found, values)
    assert recipe["method"] == "dare_ties"
    assert recipe["base"] == "ro-7b"
    assert recipe["models"] == [{"model": alias, "weight": 0.25 * (n + 1), "density": 0.25 * (n + 1)} for n, alias in enumerate(names)]
    assert found.file.searcher.options == {"population": 2, "generations": 1, "objectives": "all"}


def test_what_is_not_honoured_is_named(tmp_path: Path) -> None:
    notes = {note.partition(":")[0] for note in read(tmp_path).notes}
    assert notes == {
        "the method is not in the file but in mergenetic's script", "mode gmpirt", "pop_size 1", "tasks.test", "device", "eval_batch_size",
        "path_to_store_config, path_to_store_merged_model",
    }  # fmt: skip
    assert read(tmp_path).file.fitness.kind == "everything"
    assert read(tmp_path).file.tasks.proxy_items == 10
    assert "mode mean" not in " ".join(read(tmp_path, mode="mean").notes)


@pytest.mark.parametrize("mode", ["mpirt", "gmpirt"])
def test_item_parameters_beside_the_file_give_the_estimate(tmp_path: Path, mode: str) -> None:
    (tmp_path / "item_parameters.json").write_text("{}")
    found = read(tmp_path, mode=mode)
    fitness = found.file.fitness
    assert (fitness.kind, fitness.mode, fitness.items) == ("item_response", mode, 10)
    assert fitness.item_parameters == "item_parameters.json"
    assert found.file.tasks.proxy_items is None, "members are scored on every item, candidates on ten"
    assert not any(note.startswith("mode") for note in found.notes)


# -- item parameters ----------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> TaskSet:
    return TaskSet.load(["reverse_proxy"], write_tasks(tmp_path_factory.mktemp("items"), ["reverse"], items=6))


def test_item_parameters_by_document_and_by_id(tasks: TaskSet, tmp_path: Path) -> None:
    """Both forms end up in the order in which items are visited."""
    ids = [item.id for item in tasks.skills["reverse"]]
    a, b = [[float(n), n + 0.5] for n in range(6)], [float(-n) for n in range(6)]
    lists, mapping = tmp_path / "lists.json", tmp_path / "mapping.json"
    lists.write_text(json.dumps({"reverse": {"a": a, "b": b}, "other": {}}))
    mapping.write_text(json.dumps({"reverse": {id_: {"a": a[n], "b": b[n]} for n, id_ in enumerate(ids)}}))
    order = [ids.index(id_) for id_ in tasks.order["reverse"]]
    assert order != sorted(order)
    for path in (lists, mapping):
        found = read_item_parameters(path, tasks)["reverse"]
        assert found.discrimination.tolist() == [a[n] for n in order]
        assert found.difficulty.tolist() == [[b[n]] for n in order]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[1]", "no mapping from tasks"),
        ("{", "is no JSON"),
        ('{"sort": {}}', "no item parameters for task 'reverse', but for sort"),
        ('{"reverse": {"a": [1], "b": [2]}}', "1 values of a and 1 of b for 6 items"),
        ('{"reverse": {"x": {"a": 1, "b": 2}}}', "6 of 6 items have no parameters"),
        ('{"reverse": {"a": [1, 1, 1, 1, 1, NaN], "b": [0, 0, 0, 0, 0, 0]}}', "NaN or infinity"),
        ('{"reverse": {"a": [1, 1, 1, 1, 1, "x"], "b": [0, 0, 0, 0, 0, 0]}}', "task 'reverse'"),
        ('{"reverse": {"a": [1, 1, 1, 1, 1, [1, 2]], "b": [0, 0, 0, 0, 0, 0]}}', "task 'reverse'"),
        ('{"reverse": 3}', "allowed are"),
    ],
)
def test_faulty_item_parameters(tasks: TaskSet, tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "i.json").write_text(content)
    with pytest.raises(UserError, match=message):
        read_item_parameters(tmp_path / "i.json", tasks)


def test_a_store_of_many_models_gives_item_parameters(tasks: TaskSet, tmp_path: Path) -> None:
    """Models that lack an item are no rows; forty complete ones are enough for the estimate."""
    generator = np.random.default_rng(0)
    items = {item.id: item.key for item in tasks.skills["reverse"]}
    keys = [items[id_] for id_ in tasks.order["reverse"]]
    answers = generator.integers(0, 2, (41, 6)).astype(float)
    with ScoreStore(tmp_path / "scores.sqlite") as store:
        for number in reversed(range(41)):
            store.add(
                f"model-{number:02d}",
                "",
                {key: Mark(value) for key, value in zip(keys, answers[number], strict=True) if number or key != keys[0]},
            )
    settings = FitnessSettings(kind="item_response", responses="scores.sqlite", items=3)
    parameters, responses = item_facts(settings, tasks, tmp_path)
    assert parameters == {}
    assert responses["reverse"].tolist() == answers[1:].tolist()
    fitness = make_fitness(SearchSettings(members=("a",), fitness=settings), Facts(responses=responses))
    assert getattr(fitness, "mode", None) == "gmpirt"
    with pytest.raises(UserError, match="there is no such file"):
        item_facts(FitnessSettings(responses="nowhere.sqlite"), tasks, tmp_path)


def test_a_search_with_item_parameters_runs_and_resumes(tmp_path: Path) -> None:
    write_tasks(tmp_path / "tasks", ["reverse"], items=12)
    loaded = TaskSet.load(["reverse_proxy"], tmp_path / "tasks")
    (tmp_path / "items.json").write_text(json.dumps({"reverse": {"a": [1.0] * 12, "b": np.linspace(-1, 1, 12).tolist()}}))
    file = {
        "zoo": {"models": [str(TINY_ZOO / "models" / name) for name in ("reverse", "larger")]},
        "tasks": {"include": "tasks", "proxy": ["reverse_proxy"]}, "searcher": {"name": "random", "trials": 3},
        "fitness": {"kind": "item_response", "items": 4, "item_parameters": "items.json"}, "budget": {"candidates": 4},
    }  # fmt: skip
    path = write_yaml(tmp_path / "s.yaml", file)
    report = run_search(path, tmp_path / "out").report
    assert len(loaded.skills["reverse"]) == 12
    assert report.spent["items"] == 2 * 12 + 2 * 4, "members on everything, two candidates on four items"
    again = run_search(write_yaml(path, {**yaml.safe_load(path.read_text()), "budget": {"candidates": 5}}), tmp_path / "out").report
    assert again.spent["items"] == 2 * 12 + 3 * 4
