"""Candidates in memory: what they score is what their saved form scores, under a name that changes with all that matters."""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from modelglue.checkpoint import Checkpoint, open_checkpoint, save
from modelglue.errors import CheckpointError, MergeError, RecipeError, RunError
from modelglue.evaluation import CandidateEvaluator, ResidentModel, ScoreStore, TaskSet, evaluate, members
from modelglue.evaluation import resident as resident_module
from modelglue.recipe import Candidate, Plan, build, linear_recipe
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
    monkeypatch.setattr(members, "build", None)
    monkeypatch.setattr(resident_module, "load_live", None)
    assert CandidateEvaluator(models, tasks, store).evaluate(candidate) == first


# -- identities -------------------------------------------------------------------------------------------------------------------


def identity(models: Mapping[str, Checkpoint], candidate: Candidate, dtype: str | None = None) -> str:
    with ScoreStore(":memory:") as store:
        return CandidateEvaluator(models, TaskSet({}), store, store_dtype=dtype).key(candidate)


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
    monkeypatch.setattr(resident_module, "load_into", None)
    assert resident.holding(models["reverse"], "r") is first


@pytest.mark.parametrize("what", ["larger", "stranger"])
def test_a_failure_while_loading_leaves_nothing_stale(models: Mapping[str, Checkpoint], monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    """Half of the weights have been written when it fails; what was held before is loaded again in full."""
    resident = ResidentModel()
    resident.holding(models["reverse"], "r")
    read, together = type(models["larger"]).read, type(models["larger"]).together
    middle = sorted(models[what].names())[len(models[what].names()) // 2]

    def failing(checkpoint: Any, name: str, *arguments: Any) -> torch.Tensor:
        if checkpoint is models[what] and name == middle:
            raise CheckpointError(f"{name}: cannot be read.")
        found: torch.Tensor = read(checkpoint, name, *arguments)
        return found

    def failing_together(checkpoint: Any, names: Sequence[str]) -> torch.Tensor:
        for name in names:
            failing(checkpoint, name)
        found: torch.Tensor = together(checkpoint, names)
        return found

    with monkeypatch.context() as patch:
        patch.setattr(type(models["larger"]), "read", failing)
        patch.setattr(type(models["larger"]), "together", failing_together)
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
        original = getattr(resident_module, name)

        def counting(*values: Any, original: Any = original, name: str = name, **options: Any) -> Any:
            loads.append(name)
            return original(*values, **options)

        monkeypatch.setattr(resident_module, name, counting)
    resident = ResidentModel()
    parts = [TaskSet({skill: items}) for skill, items in tasks.skills.items()]
    evaluators = [CandidateEvaluator(models, part, store, resident=resident) for part in parts]
    merged = Candidate.linear({"reverse": 1, "generalist": 1})
    found = [evaluator.evaluate(candidate) for candidate in (Candidate.single("reverse"), merged) for evaluator in evaluators]
    assert loads == ["load_live", "load_into"]
    with ScoreStore(":memory:") as other:
        apart = CandidateEvaluator(models, tasks, other).evaluate(merged)
    assert {**found[2].items, **found[3].items} == apart.items


# -- only what has changed is computed --------------------------------------------------------------------------------------------


def layered(weights: Sequence[float], base: str = "reverse", other: str = "larger") -> Candidate:
    """A linear merge whose weights differ from layer to layer: gradients over the layers."""
    rest = [1 - weight for weight in weights]
    return Candidate.of({"method": "linear", "models": [{"model": base, "weight": list(weights)}, {"model": other, "weight": rest}]})


def computed(monkeypatch: pytest.MonkeyPatch) -> list[set[str]]:
    """The tensors that are kept of every load into a live model from now on."""
    kept: list[set[str]] = []
    original = resident_module.load_into

    def load_into(checkpoint: Checkpoint, model: Any, *, keep: set[str], **options: Any) -> None:
        kept.append({name for name in checkpoint.names() if name not in keep})
        original(checkpoint, model, keep=keep, **options)

    monkeypatch.setattr(resident_module, "load_into", load_into)
    return kept


def test_unchanged_layers_are_not_computed_again(
    models: Mapping[str, Checkpoint], tasks: TaskSet, store: ScoreStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    resident = ResidentModel()
    evaluator = CandidateEvaluator(models, tasks, store, resident=resident)
    layers = int(models["reverse"].config["num_hidden_layers"])
    first, second = [0.5] * layers, [0.5] * (layers - 1) + [0.25]
    evaluator.evaluate(layered(first))
    changed = computed(monkeypatch)
    evaluator.evaluate(layered(second))
    assert changed[0]
    assert {name.split(".")[2] for name in changed[0] if ".layers." in name} == {str(layers - 1)}
    assert len(changed[0]) < 15
    assert_holds(resident, evaluator.members.expression(layered(second)))
    evaluator.evaluate(layered(second, other="generalist"))
    assert len(changed[1]) == len(models["reverse"].names()), "another member changes everything"
    assert_holds(resident, evaluator.members.expression(layered(second, other="generalist")))


def test_a_failure_forgets_what_was_there(models: Mapping[str, Checkpoint], monkeypatch: pytest.MonkeyPatch) -> None:
    resident = ResidentModel()
    resident.holding(models["reverse"], "r")

    def failing(*arguments: Any, **options: Any) -> None:
        raise CheckpointError("half-way")

    with monkeypatch.context() as patch:
        patch.setattr(resident_module, "load_into", failing)
        with pytest.raises(CheckpointError, match="half-way"):
            resident.holding(models["larger"], "l")
    changed = computed(monkeypatch)
    resident.holding(models["reverse"], "r")
    assert changed == [set(models["reverse"].names())]


@settings(max_examples=10, deadline=None)
@given(st.lists(st.lists(st.floats(0.01, 1), min_size=2, max_size=3), min_size=1, max_size=4), st.sampled_from([None, "float32"]))
def test_coefficients_that_follow_one_another_give_what_each_gives_alone(
    models: Mapping[str, Checkpoint], series: list[list[float]], dtype: str | None
) -> None:
    """Whatever was built before with the same members."""
    remembering = members.Members(models, dtype)
    for weights in series:
        candidate = Candidate.linear(dict(zip(NAMES, weights, strict=False)))
        made, alone = remembering.expression(candidate), members.Members(models, dtype).expression(candidate)
        assert made.identity == alone.identity
        assert all(torch.equal(made.tensor(name), alone.tensor(name)) for name in list(made.names())[::9])
        assert torch.equal(made.together(made.names()), torch.cat([alone.read(name) for name in made.names()]))


@pytest.mark.parametrize("method", ["linear", "task_arithmetic", "ties", "dare_linear", "slerp"])
def test_tensors_together_are_tensors_one_by_one(models: Mapping[str, Checkpoint], method: str) -> None:
    recipe: dict[str, Any] = {"method": method, "base": "generalist", "models": [{"model": "reverse"}, {"model": "larger"}]}
    if method == "slerp":
        recipe = {"method": method, "base": "reverse", "models": [{"model": "larger"}], "parameters": {"t": 0.3}}
    else:
        recipe["models"] = [{**entry, "weight": [0.2, 0.6]} for entry in recipe["models"]]
    if method == "linear":
        del recipe["base"]
    made = members.Members(models).expression(Candidate.of(recipe))
    names = made.names()
    assert torch.equal(made.together(names), torch.cat([made.read(name) for name in names]))


# -- failures ---------------------------------------------------------------------------------------------------------------------


def failing_with(error: Exception) -> Any:
    def holding(*_: Any) -> Any:
        raise error

    return holding


@pytest.mark.parametrize(
    ("error", "status", "text"),
    [
        (MemoryError(), "failed", "reverse: out of memory"),
        (RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: you tried"), "failed", "out of memory"),
        (RuntimeError("CUDA out of memory. Tried"), "failed", "reverse: out of memory: CUDA"),
        (TimeoutError(), "failed", "reverse: took longer than 9 seconds"),
        (ZeroDivisionError("division by zero"), "failed", "reverse: ZeroDivisionError: division by zero"),
        (CheckpointError("a shard is gone"), "failed", "reverse: a shard is gone"),
        (MergeError("comes out with NaN"), "invalid", "reverse: comes out with NaN"),
        (RecipeError("no such method"), "invalid", "reverse: no such method"),
    ],
)
def test_a_candidate_that_cannot_be_scored(
    models: Mapping[str, Checkpoint],
    tasks: TaskSet,
    store: ScoreStore,
    monkeypatch: pytest.MonkeyPatch,
    error: Exception,
    status: str,
    text: str,
) -> None:
    """It says so, and the next one is scored."""
    evaluator = CandidateEvaluator(models, tasks, store, timeout=9)
    with monkeypatch.context() as patch:
        patch.setattr(ResidentModel, "holding", failing_with(error))
        scores = evaluator.evaluate(Candidate.single("reverse"))
    assert (scores.status, scores.items) == (status, {})
    assert text in scores.error
    assert evaluator.evaluate(Candidate.single("reverse")).status == "ok"


def test_what_no_candidate_could_be_scored_with_is_raised(
    models: Mapping[str, Checkpoint], tasks: TaskSet, store: ScoreStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ResidentModel, "holding", failing_with(RunError("the disk is full")))
    with pytest.raises(RunError, match="the disk is full"):
        CandidateEvaluator(models, tasks, store).evaluate(Candidate.single("reverse"))


def test_whoever_is_strict_is_told(
    models: Mapping[str, Checkpoint], tasks: TaskSet, store: ScoreStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ResidentModel, "holding", failing_with(MemoryError("no room")))
    with pytest.raises(MemoryError, match="no room"):
        CandidateEvaluator(models, tasks, store, strict=True).evaluate(Candidate.single("reverse"))


def test_a_time_out_keeps_what_was_scored(
    models: Mapping[str, Checkpoint], tasks: TaskSet, store: ScoreStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The time is over after the first of two batches."""
    monkeypatch.setattr("modelglue.evaluation.scoring.BATCH_ITEMS", 24)
    now = [0.0]
    monkeypatch.setattr("modelglue.evaluation.candidates.time.monotonic", lambda: now[0])

    def later(*_: Any) -> None:
        now[0] += 6

    evaluator = CandidateEvaluator(models, tasks, store, timeout=5, on_batch=later)
    scores = evaluator.evaluate(Candidate.single("reverse"))
    assert (scores.status, scores.error) == ("failed", "reverse: took longer than 5 seconds")
    assert {task: len(values) for task, values in scores.items.items()} == {"reverse": 24}
    again = evaluator.evaluate(Candidate.single("reverse"))
    assert (again.status, again.cost.computed, again.cost.items) == ("ok", 24, 48)


def test_a_merge_that_is_no_number_is_invalid(models: Mapping[str, Checkpoint], tasks: TaskSet, store: ScoreStore) -> None:
    huge = Candidate.of({"method": "linear", "models": [{"model": "reverse", "weight": 1e38}, {"model": "larger", "weight": 1e38}],
                         "parameters": {"normalize": False}})  # fmt: skip
    scores = CandidateEvaluator(models, tasks, store).evaluate(huge)
    assert scores.status == "invalid"
    assert scores.error != ""


def test_a_model_whose_logits_are_none_is_invalid(
    models: Mapping[str, Checkpoint], tasks: TaskSet, store: ScoreStore, tmp_path: Path
) -> None:
    """In generation and in likelihoods: its final norm multiplies by infinity."""
    shutil.copytree(TINY_ZOO / "models" / "larger", tmp_path / "larger")
    weights = load_file(tmp_path / "larger" / "model.safetensors")
    weights["model.norm.weight"].fill_(math.inf)
    save_file(weights, tmp_path / "larger" / "model.safetensors", metadata={"format": "pt"})
    evaluator = CandidateEvaluator({"larger": open_checkpoint(tmp_path / "larger")}, tasks, store)
    scores = evaluator.evaluate(Candidate.single("larger"))
    assert scores.status == "invalid"
    assert scores.tasks() == {"reverse": 0.0, "larger": 0.0}
    assert [warning.partition(":")[2] for warning in scores.warnings] == [
        f" {task}: the model answers NaN on 24 of 24 items; they count as 0." for task in ("reverse", "larger")
    ]


def test_what_the_evaluator_offers(models: Mapping[str, Checkpoint], tasks: TaskSet, store: ScoreStore) -> None:
    evaluator = CandidateEvaluator(models, tasks, store)
    assert evaluator.levels == {"E0", "E1", "E2", "E3", "E4"}
    generated = TaskSet({"reverse": tasks.skills["reverse"]})
    assert CandidateEvaluator(models, generated, store).levels == {"E0", "E1", "E2", "E3"}
    assert sorted(evaluator.items("larger")) == sorted(item.id for item in tasks.skills["larger"])
    others = [CandidateEvaluator(models, generated, store), CandidateEvaluator(models, tasks, store, store_dtype="float32"),
              CandidateEvaluator({"reverse": models["reverse"]}, tasks, store)]  # fmt: skip
    assert len({evaluator.identity, *(other.identity for other in others)}) == 4
    assert CandidateEvaluator(models, tasks, store).identity == evaluator.identity


def test_a_plan_is_obeyed_and_costs_what_it_says(models: Mapping[str, Checkpoint], tasks: TaskSet, store: ScoreStore) -> None:
    evaluator = CandidateEvaluator(models, tasks, store)
    plan = Plan.prefix(evaluator, {"reverse": 5, "larger": 3})
    scores = evaluator.evaluate(Candidate.single("larger"), plan)
    assert {task: list(values) for task, values in scores.items.items()} == {
        "reverse": list(evaluator.items("reverse")[:5]), "larger": list(evaluator.items("larger")[:3])
    }  # fmt: skip
    assert set(scores.losses) == {"larger"}
    assert (scores.cost.items, scores.cost.computed) == (8, 8)
    assert scores.cost.tokens > 8
    again = evaluator.evaluate(Candidate.single("larger"), plan)
    assert (again, again.cost.computed, again.cost.tokens) == (scores, 0, scores.cost.tokens)
