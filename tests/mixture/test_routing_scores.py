"""Routers from scores: what is learned, from which values, and what a held-out check says of it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from modelglue.errors import CheckpointError, UserError
from modelglue.mixture import ExpertSpec, Mixture, Reader, RouterSpec, read_manifest, write_mixture
from modelglue.mixture.gates import LinearGate, MlpGate, gate_from
from modelglue.mixture.levels import LevelSpec
from modelglue.mixture.routing import (
    Fit,
    Frame,
    LearnedRouter,
    ScoredItem,
    ScoredItems,
    fit_gate,
    learn_layer_gates,
    learn_router,
    temperature_of,
)
from modelglue.recipe import Scores, paired_interval
from tests.mixture.levels_making import mixture, model
from tests.mixture.making import two_experts
from tests.models.tiny import letters

KINDS = ["linear", "mlp"]


def items_of(*rows: tuple[str, str, Sequence[float]]) -> ScoredItems:
    """(task, text, values) of every item; experts are called e0, e1, ..."""
    made = [ScoredItem(task, f"{number}", text, tuple(values)) for number, (task, text, values) in enumerate(rows)]
    return ScoredItems(tuple(f"e{number}" for number in range(len(rows[0][2]))), tuple(made))


# -- scored items -----------------------------------------------------------------------------------------------------------------


def test_scores_are_joined_item_by_item() -> None:
    texts = {"x": {"1": "one", "2": "two"}, "y": {"1": "three"}}
    first = Scores({"x": {"2": 0.5, "1": 1.0, "3": 0.0}, "y": {"1": 0.0}}, losses={"x": {"1": 2.0, "2": 3.0}, "y": {"1": 1.5}})
    second = Scores({"x": {"1": 0.0, "2": 0.25}, "y": {"1": 1.0}}, losses={"x": {"1": 1.0, "2": 4.0}, "y": {"1": 0.5}})
    found = ScoredItems.of(texts, {"a": first, "b": second})
    assert found.experts == ("a", "b")
    assert [(item.task, item.id, item.text, item.values) for item in found.items] == [
        ("x", "1", "one", (1.0, 0.0)), ("x", "2", "two", (0.5, 0.25)), ("y", "1", "three", (0.0, 1.0)),
    ]  # fmt: skip
    assert [item.values for item in ScoredItems.of(texts, {"a": first, "b": second}, by_loss=True).items] == [
        (-2.0, -1.0), (-3.0, -4.0), (-1.5, -0.5),
    ]  # fmt: skip
    assert found.weights().tolist() == [0.25, 0.25, 0.5]
    with pytest.raises(UserError, match=r"1 items have no score, the first is b: x/3\. Score every expert"):
        ScoredItems.of({"x": {"3": "?"}}, {"a": first, "b": second})
    with pytest.raises(UserError, match=r"scored item '1' of 'x': has the values \[nan, 0.0\]; allowed is one finite number for each"):
        ScoredItems.of({"x": {"1": "?"}}, {"a": Scores({"x": {"1": math.nan}}), "b": second})


def test_oracles_by_hand() -> None:
    found = items_of(("x", "", (1, 0)), ("x", "", (0, 1)), ("x", "", (1, 0)), ("y", "", (0, 1)))
    assert found.oracle() == [0, 0, 0, 1]
    assert found.outcome(found.oracle()).tasks() == {"x": pytest.approx(2 / 3), "y": 1.0}
    assert found.best_for_everything() == 1  # (1/3 + 1) / 2 against (2/3 + 0) / 2
    assert found.telling == 4
    assert items_of(("x", "", (1, 1)), ("x", "", (0, 1))).telling == 1


@settings(max_examples=25, deadline=None)
@given(st.lists(st.sampled_from("xyz"), min_size=1, max_size=40), st.integers(2, 5), st.randoms(use_true_random=False))
def test_folds_are_even_in_every_task_and_do_not_depend_on_order(tasks: list[str], count: int, random_: object) -> None:
    made = [ScoredItem(task, str(number), "", (0.0, 1.0)) for number, task in enumerate(tasks)]
    shuffled = list(made)
    random_.shuffle(shuffled)  # type: ignore[attr-defined]
    folds = dict(zip([item.id for item in made], ScoredItems(("a", "b"), tuple(made)).folds(count, 3).tolist(), strict=True))
    again = dict(zip([item.id for item in shuffled], ScoredItems(("a", "b"), tuple(shuffled)).folds(count, 3).tolist(), strict=True))
    assert folds == again
    for task in set(tasks):
        sizes = [sum(folds[item.id] == fold for item in made if item.task == task) for fold in range(count)]
        assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize("each", [1, 2, 3])
def test_many_tasks_of_few_items_are_in_all_folds(each: int) -> None:
    made = items_of(*[(f"task {number // each}", "", (number % 2, 1 - number % 2)) for number in range(24 * each)])
    sizes = made.folds(5, 0).bincount(minlength=5).tolist()
    assert max(sizes) - min(sizes) <= 1


# -- fitting ----------------------------------------------------------------------------------------------------------------------


def _weights(count: int) -> torch.Tensor:
    return torch.full((count,), 1 / count, dtype=torch.float64)


def test_best_without_ties_is_multinomial_regression() -> None:
    """The gradient of penalised cross-entropy vanishes at what is found: p - y against the inputs balances the penalty."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(60, 4, generator=generator, dtype=torch.float64)
    values = torch.randn(60, 3, generator=generator, dtype=torch.float64)
    ((weight, bias),) = fit_gate(inputs, values, _weights(60), Fit(penalty=0.05)).layers
    wrong = torch.softmax(inputs @ weight.T + bias, dim=-1) - torch.nn.functional.one_hot(values.argmax(dim=1), 3)
    torch.testing.assert_close(wrong.T @ inputs / 60, -0.05 * weight, atol=1e-5, rtol=0)
    torch.testing.assert_close(wrong.mean(dim=0), torch.zeros(3, dtype=torch.float64), atol=1e-5, rtol=0)


def test_expected_minds_what_is_at_stake() -> None:
    """The same state, three times a little better with expert 0 and once much better with expert 1."""
    inputs = torch.ones(4, 1, dtype=torch.float64)
    values = torch.tensor([[0.1, 0.0], [0.1, 0.0], [0.1, 0.0], [0.0, 1.0]], dtype=torch.float64)
    for objective, chosen in (("best", 0), ("expected", 1)):
        found = fit_gate(inputs, values, _weights(4), Fit(objective=objective, penalty=1e-3))  # type: ignore[arg-type]
        assert found.logits(inputs).argmax(dim=1).tolist() == [chosen] * 4


def test_items_on_which_all_do_alike_teach_nothing() -> None:
    inputs = torch.randn(12, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    values = (inputs[:, :2] > 0).double()
    telling = values.min(dim=1).values < values.max(dim=1).values
    tied = torch.where(telling, 1.0, 0.0).double()
    all_, some = (
        fit_gate(inputs, values, weights / weights.sum(), Fit(penalty=penalty))
        for weights, penalty in ((_weights(12), 1e-2 * float(tied.mean())), (tied, 1e-2))
    )
    torch.testing.assert_close(all_.logits(inputs), some.logits(inputs), atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("width", [6, 400])
def test_the_gate_does_on_plain_states_what_was_fitted_in_the_frame(kind: str, width: int) -> None:
    generator = torch.Generator().manual_seed(2)
    states = torch.randn(40, width, generator=generator) * torch.linspace(0.1, 30, width) + 5
    states[:, 3] = 7.0  # never varies: nothing can be told from it
    values = torch.stack([states[:, 0] > 5, states[:, 0] <= 5], dim=1).double()
    frame = Frame.of(states)
    found = fit_gate(frame.apply(states), values, _weights(40), Fit(kind=kind, hidden=5))  # type: ignore[arg-type]
    gate = found.gate(frame)
    assert isinstance(gate, LinearGate if kind == "linear" else MlpGate)
    torch.testing.assert_close(gate.logits(states).double(), found.logits(frame.apply(states)), atol=1e-3, rtol=1e-3)
    assert gate.logits(states).argmax(dim=1).tolist() == values.argmax(dim=1).tolist()
    changed = states.clone()
    changed[:, 3] = 1e6
    assert torch.equal(gate.logits(changed), gate.logits(states))


def test_only_an_mlp_learns_what_no_line_divides() -> None:
    inputs = torch.tensor([[a, b] for a in (-1.0, 1.0) for b in (-1.0, 1.0)], dtype=torch.float64).repeat(5, 1)
    values = torch.stack([inputs.prod(dim=1) > 0, inputs.prod(dim=1) < 0], dim=1).double()
    right = {}
    for kind in KINDS:
        found = fit_gate(inputs, values, _weights(20), Fit(kind=kind, hidden=16, penalty=1e-4, seed=3))  # type: ignore[arg-type]
        right[kind] = float((found.logits(inputs).argmax(dim=1) == values.argmax(dim=1)).double().mean())
    assert right["mlp"] == 1.0
    assert right["linear"] <= 0.75


def test_temperature_undoes_a_scale() -> None:
    """Experts are right as often as softmax(logits) says; logits that are five times too large need a temperature of 5."""
    generator = torch.Generator().manual_seed(4)
    logits = torch.randn(4000, 3, generator=generator, dtype=torch.float64) * 2
    right = torch.multinomial(torch.softmax(logits, dim=1), 1, generator=generator)
    values = torch.zeros_like(logits).scatter(1, right, 1.0)
    assert temperature_of(logits * 5, values, _weights(4000)) == pytest.approx(5, rel=0.1)
    assert temperature_of(logits, values, _weights(4000)) == pytest.approx(1, rel=0.1)
    assert temperature_of(logits, torch.ones_like(values), _weights(4000)) == 1.0


# -- learning ---------------------------------------------------------------------------------------------------------------------


def letters_and_digits(count: int = 20) -> ScoredItems:
    """Expert `llama` is right on letters, `neox` on digits, and one letter of ten is right by chance."""
    rows = []
    for number in range(count):
        places = [number // 9 % 3, number // 3 % 3, number % 3]
        rows.append(ScoredItem("words", str(number), "".join("abc"[place] for place in places), (1.0, float(number % 10 == 0))))
        rows.append(ScoredItem("numbers", str(number), "".join("123"[place] for place in places), (0.0, 1.0)))
    return ScoredItems(("llama", "neox"), tuple(rows))


def swapped(folder: Path) -> list[ExpertSpec]:
    """Each expert with the other's prompts."""
    first, second = two_experts(folder)
    return [
        ExpertSpec(first.name, first.path, second.positive, second.negative),
        ExpertSpec(second.name, second.path, first.positive, first.negative),
    ]


ROUTER = RouterSpec(gate_mode="hidden_avg", router_layer="auto")


@pytest.mark.parametrize(("kind", "objective"), [("linear", "best"), ("mlp", "expected")])
def test_what_beats_prompts_on_unseen_items_is_used(kind: str, objective: str, tmp_path: Path) -> None:
    experts, items = swapped(tmp_path), letters_and_digits()
    fit = Fit(kind=kind, objective=objective, hidden=6, seed=1)  # type: ignore[arg-type]
    found = learn_router(experts, items, ROUTER, fit, encoder=experts[0].path)
    assert found.used
    assert found.router is not None
    held_out = found.router.training.held_out
    assert held_out is not None
    assert (held_out.against, held_out.trained, held_out.oracle) == ("prompts", 1.0, 1.0)
    assert found.load == {"words": {"llama": 20, "neox": 0}, "numbers": {"llama": 0, "neox": 20}}
    write_mixture(tmp_path / "prompted", experts, ROUTER, encoder=experts[0].path)
    wrong = items.outcome([route.expert for route in Mixture.load(tmp_path / "prompted").route(items.texts)])
    assert held_out.reference == wrong.mean
    assert (held_out.difference, *held_out.interval) == paired_interval(items.outcome(items.oracle()), wrong)
    assert found.message.startswith(f"The router learned from scores: {100 * (1 - wrong.mean):+.1f} points (")
    again = learn_router(experts, items, ROUTER, fit, encoder=experts[0].path)
    assert again.router is not None
    for name, value in found.router.gate.tensors().items():
        assert torch.equal(value, again.router.gate.tensors()[name]), name
    assert again.to_json() == found.to_json()

    written = write_mixture(tmp_path / "mixture", experts, RouterSpec(temperature=9.0), encoder=None, trained=found.router)
    assert (written.router, written.gate_mode, written.temperature) == (kind, "scores", found.router.temperature)
    manifest, gate = read_manifest(tmp_path / "mixture")
    assert manifest.training == found.router.training
    assert all(torch.equal(value, found.router.gate.tensors()[name]) for name, value in gate.tensors().items())
    routes = Mixture.load(tmp_path / "mixture").route(["bab", "cab", "12", "3213"])
    assert [route.name for route in routes] == ["llama", "llama", "neox", "neox"]


def test_prompts_that_are_as_good_stay(tmp_path: Path) -> None:
    items = letters_and_digits()
    words, numbers = (tuple(dict.fromkeys(item.text for item in items.items if item.task == task)) for task in items.tasks)
    first, second = two_experts(tmp_path)
    experts = [ExpertSpec(first.name, first.path, words, numbers), ExpertSpec(second.name, second.path, numbers, words)]
    found = learn_router(experts, items, ROUTER, Fit(), encoder=first.path)
    assert (found.used, found.router is not None) == (False, True)
    assert found.message == (
        "The router learned from scores is not better by more than chance, so the router from prompts stays: "
        "+0.0 points (+0.0 to +0.0) against the router from prompts on held-out items."
    )
    asked = learn_router(experts, items, ROUTER, Fit(), encoder=first.path, always=True)
    assert asked.used
    assert asked.message.startswith("The router learned from scores, as asked; it is not better by more than chance: +0.0 points")


def test_without_prompts_the_best_expert_is_what_to_beat(tmp_path: Path) -> None:
    experts = [ExpertSpec(expert.name, expert.path, ()) for expert in two_experts(tmp_path)]
    items = letters_and_digits()
    found = learn_router(experts, items, ROUTER, Fit(), encoder=experts[1].path)
    assert found.router is not None
    assert found.router.encoder == experts[1].path
    held_out = found.router.training.held_out
    assert held_out is not None
    assert (found.used, held_out.against) == (True, "best expert")
    assert held_out.reference == pytest.approx(0.55)
    write_mixture(tmp_path / "mixture", experts, RouterSpec(), encoder=None, trained=found.router, pack=True)
    mixture = Mixture.load(tmp_path / "mixture")
    assert mixture.manifest.encoder == "experts/neox"
    assert [route.name for route in mixture.route(["abc", "12"])] == ["llama", "neox"]
    with pytest.raises(UserError, match="the router's self-test needs prompts"):
        mixture.self_test()


def test_held_out_items_are_not_seen(tmp_path: Path) -> None:
    """Values by a coin: nothing can be learned, and the check does not think so, though the fit on all items knows most of them."""
    coin = torch.randint(0, 2, (40,), generator=torch.Generator().manual_seed(5)).tolist()
    letters = "abcdefghijklmnopqrstuvwxyz"
    rows = [ScoredItem("t", str(n), letters[n % 26] + letters[(n * 7) % 26] + str(n), (float(c), 1.0 - c)) for n, c in enumerate(coin)]
    experts = [ExpertSpec(expert.name, expert.path, ()) for expert in two_experts(tmp_path)]
    found = learn_router(experts, ScoredItems(("llama", "neox"), tuple(rows)), ROUTER, Fit(), encoder=experts[0].path)
    assert not found.used
    assert found.router is not None
    held_out = found.router.training.held_out
    assert held_out is not None
    assert held_out.trained < 0.7


def test_what_nothing_can_be_learned_from(tmp_path: Path) -> None:
    experts, items = two_experts(tmp_path), letters_and_digits()
    few = learn_router(experts, ScoredItems(items.experts, items.items[:19]), ROUTER, Fit())
    assert few == LearnedRouter(None, False, "19 scored items are too few (at least 20): there is nothing to learn a router from.", {}, {})
    alike = tuple(ScoredItem(item.task, item.id, item.text, (1.0, 1.0)) for item in items.items)
    message = learn_router(experts, ScoredItems(items.experts, alike), ROUTER, Fit()).message
    assert message == "all experts score alike: there is nothing to learn a router from."
    with pytest.raises(UserError, match="the scores are of llama, neox, the experts are neox, llama"):
        learn_router(experts[::-1], items, ROUTER, Fit())


def test_texts_that_the_encoder_cannot_read(tmp_path: Path) -> None:
    """They stand in the middle of all others; where nothing can be read at all, it is said."""
    experts, items = swapped(tmp_path), letters_and_digits()
    blank = ScoredItem("words", "blank", "", (1.0, 0.0))
    found = learn_router(experts, ScoredItems(items.experts, (*items.items, blank)), ROUTER, Fit(), encoder=experts[0].path)
    assert found.used
    nothing = tuple(ScoredItem(item.task, item.id, "", item.values) for item in items.items)
    with pytest.raises(UserError, match="no scored text has a token in the encoder's vocabulary"):
        learn_router(experts, ScoredItems(items.experts, nothing), ROUTER, Fit(), encoder=experts[0].path)


def test_gates_of_blocks_learn_from_the_scores_of_complete_models() -> None:
    """One fit per layer; the mixture routes its prompts as the scores ask, at every layer that decides."""
    live = [model("llama", seed) for seed in range(2)]
    reader = Reader(live[0], letters(), 0)
    items = letters_and_digits()
    made = learn_layer_gates(reader, items, [0, 1], Fit())
    for layer, gate in made.items():
        states = reader.pooled_at([layer], items.texts, "prompt")[layer]
        right = [item.values.index(1.0) if item.task == "words" else 1 for item in items.items]
        assert gate.logits(states).argmax(dim=1).tolist() == right
    mixed = mixture(live, LevelSpec("block", "sample"), gate=made)
    ids = torch.tensor([[1, *letters()(text, add_special_tokens=False)["input_ids"]] for text in ("cab", "321")])
    mixed(ids, prompt_length=4)
    assert mixed.routing.logits[0].argmax(dim=1).tolist() == [0, 1]
    with pytest.raises(UserError, match="all experts score alike on every item"):
        learn_layer_gates(reader, items_of(("t", "a", (1, 1))), [0], Fit())


# -- gates on disk ----------------------------------------------------------------------------------------------------------------


def test_logits_by_hand() -> None:
    linear = LinearGate(torch.tensor([[1.0, 2.0], [0.0, -1.0]]), torch.tensor([0.5, 0.0]))
    assert linear.logits(torch.tensor([[1.0, 1.0], [0.0, 2.0]])).tolist() == [[3.5, -1.0], [4.5, -2.0]]
    mlp = MlpGate(torch.tensor([[1.0, 0.0], [0.0, -1.0]]), torch.tensor([[1.0, 10.0], [2.0, 0.0]]), None, torch.tensor([0.0, 1.0]))
    assert mlp.logits(torch.tensor([[3.0, 5.0], [-1.0, -2.0]])).tolist() == [[3.0, 7.0], [20.0, 1.0]]


@pytest.mark.parametrize(
    ("kind", "tensors", "message"),
    [
        ("linear", {}, r"no linear router for 3 experts \(gate: missing\)"),
        ("linear", {"gate": torch.zeros(2, 5)}, r"gate is float32 \[2, 5\], allowed is float32 \[3, d\]"),
        ("linear", {"gate": torch.zeros(3, 5), "bias": torch.zeros(2)}, r"bias is float32 \[2\], allowed is float32 \[3\]"),
        ("linear", {"gate": torch.zeros(3, 0)}, r"gate is float32 \[3, 0\]"),
        ("linear", {"gate": torch.zeros(3, 5), "mlp.0.weight": torch.zeros(1)}, r"mlp.0.weight: unknown"),
        ("mlp", {"gate": torch.zeros(3, 5)}, r"gate: unknown; mlp.0.weight: missing; mlp.2.weight: missing"),
        (
            "mlp",
            {"mlp.0.weight": torch.zeros(4, 5), "mlp.2.weight": torch.zeros(3, 6)},
            r"mlp.2.weight is float32 \[3, 6\], allowed is float32 \[3, 4\]",
        ),
        (
            "mlp",
            {"mlp.0.weight": torch.full((4, 5), torch.inf), "mlp.2.weight": torch.zeros(3, 4, dtype=torch.float16)},
            r"mlp.0.weight holds values that are not finite; mlp.2.weight is float16",
        ),
    ],
)
def test_tensors_that_are_no_router(kind: str, tensors: dict[str, torch.Tensor], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        gate_from(kind, tensors, 3, "router.safetensors")  # type: ignore[arg-type]
