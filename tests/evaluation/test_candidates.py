"""Candidates in memory: what they score is what their saved form scores, under a name that changes with all that matters."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from modelglue.checkpoint import Checkpoint, open_checkpoint, save
from modelglue.errors import CheckpointError
from modelglue.evaluation import CandidateEvaluator, ResidentModel, ScoreStore, TaskSet, candidates, evaluate
from modelglue.recipe import Candidate, build, linear_recipe
from tests.small_zoo import TINY_ZOO, write_tasks

#: three of one class and size, and a stranger
NAMES = ("reverse", "larger", "generalist", "stranger")


@pytest.fixture(scope="module")
def models() -> Mapping[str, Checkpoint]:
    return {name: open_checkpoint(TINY_ZOO / "models" / name) for name in NAMES}


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> TaskSet:
    return TaskSet.load(["reverse_proxy", "larger_proxy"], write_tasks(tmp_path_factory.mktemp("tasks"), items=24))


@pytest.fixture
def store() -> Iterator[ScoreStore]:
    with ScoreStore(":memory:") as store:
        yield store


def weights_of(resident: ResidentModel) -> dict[str, torch.Tensor]:
    assert resident._model is not None
    return {name: value.clone() for name, value in resident._model.model.state_dict().items()}


def assert_holds(resident: ResidentModel, checkpoint: Checkpoint) -> None:
    held = weights_of(resident)
    for name in checkpoint.names():
        assert torch.equal(held[name], checkpoint.tensor(name).float()), name


# -- scores -----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [None, "float32"])
def test_a_candidate_in_memory_is_its_saved_merge(
    models: Mapping[str, Checkpoint], tasks: TaskSet, store: ScoreStore, tmp_path: Path, dtype: str | None
) -> None:
    """Down to the last bit of every weight, with the rounding to what the members are stored in."""
    candidate = Candidate.linear({"reverse": 0.5, "larger": 0.3, "generalist": 0.2})
    resident = ResidentModel()
    scores = CandidateEvaluator(models, tasks, store, store_dtype=dtype, resident=resident).evaluate(candidate)

    save(build(linear_recipe(candidate.members, candidate.weights, dtype), resolve=models.__getitem__), tmp_path / "merge")
    saved = open_checkpoint(tmp_path / "merge")
    assert {saved.info(name).dtype for name in saved.names()} == {"BF16" if dtype is None else "F32"}
    assert_holds(resident, saved)
    assert evaluate(tmp_path / "merge", tasks) == scores
    assert [len(values) for values in scores.items.values()] == [24, 24]


def test_a_member_by_itself_is_the_model(models: Mapping[str, Checkpoint], tasks: TaskSet, store: ScoreStore) -> None:
    """Its scores are shared with every other use of the same content: the store answers, whoever asks."""
    evaluator = CandidateEvaluator(models, tasks, store, store_dtype="bfloat16")
    scores = evaluator.evaluate(Candidate.single("stranger"))
    before = store.counts()
    assert before == (1, 48)
    assert evaluate(TINY_ZOO / "models" / "stranger", tasks, store=store) == scores
    assert evaluator.evaluate(Candidate.linear({"reverse": 0.0, "stranger": 3.0})) == scores
    assert store.counts() == before


def test_tasks_are_the_skills(models: Mapping[str, Checkpoint], tasks: TaskSet, store: ScoreStore) -> None:
    assert CandidateEvaluator(models, tasks, store).tasks == ["reverse", "larger"]


def test_batches_are_heard_of(models: Mapping[str, Checkpoint], tasks: TaskSet, store: ScoreStore) -> None:
    heard: list[tuple[str, int]] = []
    evaluator = CandidateEvaluator(models, tasks, store, on_batch=lambda *batch: heard.append(batch))
    evaluator.evaluate(Candidate.single("larger"))
    evaluator.evaluate(Candidate.single("larger"))
    assert heard == [("reverse", 24), ("larger", 24)]


def test_asking_twice_builds_nothing(
    models: Mapping[str, Checkpoint], tasks: TaskSet, store: ScoreStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    candidate = Candidate.linear({"reverse": 1, "larger": 1})
    first = CandidateEvaluator(models, tasks, store).evaluate(candidate)
    monkeypatch.setattr(candidates, "build", None)
    monkeypatch.setattr(candidates, "load_live", None)
    assert CandidateEvaluator(models, tasks, store).evaluate(candidate) == first


# -- identities -------------------------------------------------------------------------------------------------------------------


def identity(models: Mapping[str, Checkpoint], candidate: Candidate, dtype: str | None = None) -> str:
    with ScoreStore(":memory:") as store:
        return CandidateEvaluator(models, TaskSet({}), store, store_dtype=dtype).identity(candidate)


HALVES = [{"model": "reverse", "weight": 0.5}, {"model": "larger", "weight": 0.5}]


def test_an_identity_changes_with_everything_that_matters(models: Mapping[str, Checkpoint]) -> None:
    found = {
        identity(models, Candidate.linear({"reverse": 0.5, "larger": 0.5})),
        identity(models, Candidate.linear({"reverse": 0.500002, "larger": 0.499998})),
        identity(models, Candidate.linear({"larger": 0.5, "reverse": 0.5})),  # the first gives config and tokenizer
        identity(models, Candidate.linear({"reverse": 0.5, "generalist": 0.5})),
        identity(models, Candidate.linear({"reverse": 1, "larger": 1, "generalist": 1})),
        identity(models, Candidate.linear({"reverse": 0.5, "larger": 0.5}), "float32"),
        identity(models, Candidate.linear({"reverse": 0.5, "larger": 0.5}), "bfloat16"),
        identity(models, Candidate.of({"method": "ties", "models": HALVES})),
        identity(models, Candidate.of({"method": "linear", "models": HALVES, "parameters": {"normalize": False}})),
        *(identity(models, Candidate.single(name)) for name in NAMES),
    }
    assert len(found) == 13


def test_an_identity_does_not_change_with_what_does_not_matter(models: Mapping[str, Checkpoint]) -> None:
    plain = identity(models, Candidate.linear({"reverse": 0.5, "larger": 0.5}))
    assert identity(models, Candidate.linear({"reverse": 2, "generalist": 0, "larger": 2})) == plain
    assert identity(models, Candidate.linear({"reverse": 0.5 + 1e-8, "larger": 0.5})) == plain
    renamed = {"a": models["reverse"], "b": models["larger"]}
    assert identity(renamed, Candidate.linear({"a": 1, "b": 1})) == plain
    for dtype in (None, "float32"):
        assert identity(models, Candidate.single("reverse"), dtype) == models["reverse"].identity


def test_an_identity_changes_with_the_content_of_a_member(models: Mapping[str, Checkpoint], tmp_path: Path) -> None:
    """One bit in the middle of one tensor, under the same name."""
    shutil.copytree(TINY_ZOO / "models" / "larger", tmp_path / "larger")
    weights = load_file(tmp_path / "larger" / "model.safetensors")
    name = sorted(weights)[len(weights) // 2]
    weights[name].view(torch.int16).flatten()[weights[name].numel() // 2] ^= 1
    save_file(weights, tmp_path / "larger" / "model.safetensors", metadata={"format": "pt"})
    changed = {**models, "larger": open_checkpoint(tmp_path / "larger")}
    for candidate in (Candidate.single("larger"), Candidate.linear({"reverse": 1, "larger": 1})):
        assert identity(changed, candidate) != identity(models, candidate)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.floats(0.01, 1), min_size=2, max_size=3), st.lists(st.floats(0.01, 1), min_size=2, max_size=3))
def test_identities_are_those_of_the_rounded_coefficients(models: Mapping[str, Checkpoint], a: list[float], b: list[float]) -> None:
    first, second = (Candidate.linear(dict(zip(NAMES, weights, strict=False))) for weights in (a, b))
    assert (identity(models, first) == identity(models, second)) == (first.key == second.key)


# -- the resident model -----------------------------------------------------------------------------------------------------------


def test_equal_shapes_go_through_one_module(models: Mapping[str, Checkpoint]) -> None:
    resident = ResidentModel()
    first = resident.holding(models["reverse"], "r")
    parameter = next(first.model.parameters())
    assert_holds(resident, models["reverse"])
    second = resident.holding(models["larger"], "l")
    assert second is first
    assert next(second.model.parameters()) is parameter
    assert_holds(resident, models["larger"])


def test_another_architecture_takes_its_room(models: Mapping[str, Checkpoint]) -> None:
    resident = ResidentModel()
    first = resident.holding(models["reverse"], "r")
    second = resident.holding(models["stranger"], "s")
    assert second is not first
    assert_holds(resident, models["stranger"])
    assert second.tokenizer.get_vocab() != first.tokenizer.get_vocab()
    resident.holding(models["reverse"], "r")
    assert_holds(resident, models["reverse"])


def test_another_tokenizer_is_another_model(models: Mapping[str, Checkpoint], tmp_path: Path) -> None:
    """Equal shapes with other words: the text model is made anew."""
    shutil.copytree(TINY_ZOO / "models" / "larger", tmp_path / "larger")
    text = (tmp_path / "larger" / "tokenizer.json").read_text()
    (tmp_path / "larger" / "tokenizer.json").write_text(text.replace('"a":', '"\u00e4":'))
    resident = ResidentModel()
    first = resident.holding(models["larger"], "l")
    second = resident.holding(open_checkpoint(tmp_path / "larger"), "o")
    assert "\u00e4" in second.tokenizer.get_vocab()
    assert "\u00e4" not in first.tokenizer.get_vocab()


def test_what_is_held_is_not_loaded_again(models: Mapping[str, Checkpoint], monkeypatch: pytest.MonkeyPatch) -> None:
    resident = ResidentModel()
    first = resident.holding(models["reverse"], "r")
    monkeypatch.setattr(candidates, "load_into", None)
    assert resident.holding(models["reverse"], "r") is first


@pytest.mark.parametrize("what", ["larger", "stranger"])
def test_a_failure_while_loading_leaves_nothing_stale(models: Mapping[str, Checkpoint], monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    """Half of the weights have been written when it fails; what was held before is loaded again in full."""
    resident = ResidentModel()
    resident.holding(models["reverse"], "r")
    read = type(models["larger"]).read
    middle = sorted(models[what].names())[len(models[what].names()) // 2]

    def failing(checkpoint: Any, name: str, *arguments: Any) -> torch.Tensor:
        if checkpoint is models[what] and name == middle:
            raise CheckpointError(f"{name}: cannot be read.")
        found: torch.Tensor = read(checkpoint, name, *arguments)
        return found

    with monkeypatch.context() as patch:
        patch.setattr(type(models["larger"]), "read", failing)
        with pytest.raises(CheckpointError, match=middle):
            resident.holding(models[what], what)
    resident.holding(models["reverse"], "r")
    assert_holds(resident, models["reverse"])
    resident.holding(models[what], what)
    assert_holds(resident, models[what])


def test_evaluators_share_a_resident_model(
    models: Mapping[str, Checkpoint], tasks: TaskSet, store: ScoreStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Proxy and confirmation items of one candidate: one model is made, and its weights are loaded once."""
    loads: list[str] = []
    for name in ("load_live", "load_into"):
        original = getattr(candidates, name)
        monkeypatch.setattr(candidates, name, lambda *values, original=original, name=name: (loads.append(name), original(*values))[1])
    resident = ResidentModel()
    parts = [TaskSet({skill: items}) for skill, items in tasks.skills.items()]
    evaluators = [CandidateEvaluator(models, part, store, resident=resident) for part in parts]
    merged = Candidate.linear({"reverse": 1, "generalist": 1})
    found = [evaluator.evaluate(candidate) for candidate in (Candidate.single("reverse"), merged) for evaluator in evaluators]
    assert loads == ["load_live", "load_into"]
    with ScoreStore(":memory:") as other:
        apart = CandidateEvaluator(models, tasks, other).evaluate(merged)
    assert {**found[2].items, **found[3].items} == apart.items
