"""Gates trained by gradients: a module made by hand whose gradient is known, and mixtures inside one model."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from modelglue.errors import RunError, UserError
from modelglue.mixture.gates import LinearGate, MlpGate
from modelglue.mixture.levels import LevelSpec
from modelglue.mixture.routing import GatedModel, GateTraining, Row, balance_term, gates_of, read_rows, rows_of, schedule, train_gates
from modelglue.models.mixture_code.modeling_mixture import Routing
from tests.mixture.levels_making import mixture, model, some_ids
from tests.models.tiny import letters

FAST = {"rate": 0.05, "batch": 4, "micro_batch": 2}


class Two(nn.Module):
    """Expert 0 answers w0 x, expert 1 w1 x; right is 2 x where x is positive, else -x. The gate reads (x, 1)."""

    def __init__(self, top_k: int = 1) -> None:
        super().__init__()
        self.experts = nn.Parameter(torch.tensor([2.0, -1.0]))
        self.gate = nn.Parameter(torch.tensor([[-0.5, 0.1], [0.5, 0.0]]))
        self.routing = Routing({"routing": "token", "level": "ffn", "merged_layers": 0, "top_k": top_k, "temperature": 1.0})
        self.mixes = False

    @property
    def top_k(self) -> int:
        return self.routing.top_k

    def gates(self) -> Sequence[nn.Parameter]:
        return [self.gate]

    def everything(self) -> Sequence[nn.Parameter]:
        return list(self.parameters())

    def gating(self, kind: Any) -> None:
        self.routing.train_gating, self.mixes = kind, kind is not None

    def targets(self, rows: Sequence[float]) -> int:
        return len(rows)

    def weights(self, rows: Sequence[float]) -> Tensor:
        states = torch.tensor([[x, 1.0] for x in rows])
        return self.routing.weights(states @ self.gate.T, training=self.mixes)

    def loss_of(self, weights: Tensor, rows: Sequence[float]) -> Tensor:
        x = torch.tensor(rows)
        return (((weights * self.experts).sum(dim=1) * x - torch.where(x > 0, 2 * x, -x)) ** 2).sum()

    def loss(self, rows: Sequence[float]) -> Tensor:
        return self.loss_of(self.weights(rows), rows)

    def balance(self) -> Tensor | None:
        return None


ROWS = [0.5, -0.25, 1.0, -1.0, 0.75, -0.5, 0.25, -0.75]


@pytest.mark.parametrize(("gating", "top_k"), [("soft", 1), ("straight_through", 1), ("topk", 2)])
def test_a_gate_that_is_wrong_learns_and_nothing_else_changes(gating: Any, top_k: int) -> None:
    module = Two(top_k)
    wrong = float(module.loss(ROWS).detach())
    assert wrong > 5  # every x goes to the expert for the other sign
    losses = train_gates(module, ROWS, GateTraining(gating=gating, epochs=60, **FAST))  # type: ignore[arg-type]
    assert len(losses) == 120
    assert losses[-1] < 0.1 * losses[0]
    assert float(module.loss(ROWS).detach()) < 0.1 * wrong  # with the weights of inference
    assert module.experts.tolist() == [2.0, -1.0]
    assert (module.routing.train_gating, module.experts.requires_grad, module.gate.grad) == (None, True, None)
    again = Two(top_k)
    assert train_gates(again, ROWS, GateTraining(gating=gating, epochs=60, **FAST)) == losses  # type: ignore[arg-type]
    assert torch.equal(again.gate, module.gate)


def test_no_gradient_at_inference_gating_and_an_exact_one_for_soft() -> None:
    module = Two()
    module.loss(ROWS).backward()  # type: ignore[no-untyped-call]
    assert module.gate.grad is not None
    assert float(module.gate.grad.abs().max()) < 1e-5  # zero, but for rounding
    module.gate.grad = None
    module.gating("soft")
    module.loss(ROWS).backward()  # type: ignore[no-untyped-call]
    assert module.gate.grad is not None
    found = module.gate.grad.clone()
    with torch.no_grad():
        for place in [(0, 0), (0, 1), (1, 0), (1, 1)]:
            module.gate[place] += 1e-3
            above = float(module.loss(ROWS))
            module.gate[place] -= 2e-3
            below = float(module.loss(ROWS))
            module.gate[place] += 1e-3
            assert float(found[place]) == pytest.approx((above - below) / 2e-3, rel=1e-2, abs=1e-2)


def test_straight_through_has_the_gradient_of_p_at_the_chosen() -> None:
    """The loss is linearised at the weights of inference; p moves by finite differences, for the chosen experts alone."""
    module = Two()
    module.gating("straight_through")
    weights = module.weights(ROWS)
    assert torch.equal(weights.detach(), Two().weights(ROWS).detach())
    module.loss(ROWS).backward()  # type: ignore[no-untyped-call]
    assert module.gate.grad is not None
    at = weights.detach().clone().requires_grad_()
    (slope,) = torch.autograd.grad(module.loss_of(at, ROWS), at)
    chosen = (weights.detach() > 0).float()
    states = torch.tensor([[x, 1.0] for x in ROWS])

    def value(gate: Tensor) -> float:
        return float((slope * chosen * torch.softmax(states @ gate.T, dim=-1)).sum().detach())

    for place in [(0, 0), (0, 1), (1, 0), (1, 1)]:
        moved = torch.zeros(2, 2)
        moved[place] = 1e-3
        expected = (value(module.gate.detach() + moved) - value(module.gate.detach() - moved)) / 2e-3
        assert float(module.gate.grad[place]) == pytest.approx(expected, rel=1e-2, abs=1e-2)


def test_parts_of_a_batch_add_up() -> None:
    whole, parts = Two(), Two()
    options: dict[str, Any] = {"gating": "soft", "rate": 0.05, "batch": 8, "epochs": 3}
    losses = train_gates(whole, ROWS, GateTraining(micro_batch=8, **options))
    assert train_gates(parts, ROWS, GateTraining(micro_batch=3, **options)) == pytest.approx(losses, rel=1e-5)
    torch.testing.assert_close(whole.gate, parts.gate)


def test_the_rate_rises_and_falls() -> None:
    factors = [schedule(step, 100, 0.03) for step in range(100)]
    assert factors[:4] == [pytest.approx(1 / 3), pytest.approx(2 / 3), 1.0, 1.0]
    assert factors[51] == pytest.approx(0.5 * (1 + math.cos(math.pi * 48 / 97)))
    assert factors[-1] < 1e-3
    assert all(after <= before for before, after in itertools.pairwise(factors[2:]))
    assert schedule(0, 1, 0.0) == 1.0


def test_balance() -> None:
    even = torch.tensor([[5.0, 0, 0], [0, 5.0, 0], [0, 0, 5.0]])
    assert float(balance_term(even, 1)) == pytest.approx(1.0)
    assert float(balance_term(torch.zeros(7, 3), 2)) == pytest.approx(2.0)
    lean = torch.tensor([[5.0, 0, 0]] * 3)
    assert float(balance_term(lean, 1)) == pytest.approx(3 * math.exp(5) / (math.exp(5) + 2))


def test_what_cannot_be_trained() -> None:
    with pytest.raises(UserError, match="gating is topk at top_k 1, where no gradient reaches the router; use soft or straight_through"):
        train_gates(Two(), ROWS, GateTraining(gating="topk"))
    with pytest.raises(UserError, match="there is nothing to train on"):
        train_gates(Two(), [], GateTraining())
    with pytest.raises(UserError, match=r"gating is 'hard'; allowed are soft, topk, straight_through; batch is 0; .* rate is nan; allowed"):
        GateTraining(gating="hard", batch=0, rate=math.nan)  # type: ignore[arg-type]
    broken = Two()
    before = broken.gate.detach().clone()
    with pytest.raises(RunError, match=r"the loss of step 2 is nan"):
        train_gates(broken, [*ROWS, math.nan], GateTraining(gating="soft", rate=1e-2, batch=4, seed=1))
    assert torch.equal(broken.gate, before)
    assert broken.experts.requires_grad


# -- mixtures inside one model ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def llamas() -> list[Any]:
    return [model("llama", seed) for seed in range(2)]


@pytest.mark.parametrize(
    ("level", "routing", "gating", "top_k"),
    [("ffn", "token", "soft", 1), ("ffn", "token", "topk", 2), ("block", "sample", "straight_through", 1), ("block", "sample", "soft", 1)],
)
def test_the_gates_of_a_mixture_learn_and_nothing_else_changes(
    level: Any, routing: Any, gating: Any, top_k: int, llamas: list[Any]
) -> None:
    mixed = mixture(llamas, LevelSpec(level, routing, top_k=top_k))
    before = {name: value.clone() for name, value in mixed.state_dict().items()}
    rows = [Row((1, *ids[:3]), tuple(ids[3:])) for ids in some_ids(8).tolist()]
    module = GatedModel(mixed)
    losses = train_gates(module, rows, GateTraining(gating=gating, epochs=6, balance=0.001, **FAST))  # type: ignore[arg-type]
    assert all(map(math.isfinite, losses))
    changed = {name for name, value in mixed.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {name for name in before if ".router." in name}
    assert mixed.routing.train_gating is None
    assert not any(part.training for part in mixed.modules())
    if gating == "soft":
        assert sum(losses[-2:]) < sum(losses[:2])
    again = mixture(llamas, LevelSpec(level, routing, top_k=top_k), gate=gates_of(mixed))
    torch.testing.assert_close(again(some_ids()).logits, mixed(some_ids()).logits)


def test_the_loss_is_that_of_each_row_alone(llamas: list[Any]) -> None:
    """Rows of different lengths, padded on both sides, with one decision per row from its prompt."""
    module = GatedModel(mixture(llamas, LevelSpec("block", "sample")))
    rows = [Row((1, 5), (6, 7, 8)), Row((1, 9, 10, 11), (12,)), Row((1, 20, 21), (22, 23))]
    with torch.no_grad():
        alone = [float(module.loss([row])) for row in rows]
        assert float(module.loss(rows)) == pytest.approx(sum(alone), rel=1e-5)
        ids = torch.tensor([[1, 5, 6, 7, 8]])
        logits = module.model(ids, prompt_length=2).logits[0].log_softmax(dim=-1)
    assert module.targets(rows) == 6
    assert alone[0] == pytest.approx(-float(sum(logits[place - 1, ids[0, place]] for place in (2, 3, 4))), rel=1e-5)


def test_rows_of_texts(tmp_path: Path) -> None:
    tokenizer = letters()
    a, b, c, d = (tokenizer.convert_tokens_to_ids(letter) for letter in "abcd")
    begin, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    assert rows_of([{"text": "ab"}], tokenizer) == [Row((), (begin, a, b, end))]
    assert rows_of([{"prompt": "abc", "response": "d"}], tokenizer, length=4) == [Row((begin, c), (d, end))]
    assert rows_of([{"prompt": "abc", "response": "d"}], tokenizer, length=2) == [Row((begin,), (d,))]  # no room for any of the prompt
    path = tmp_path / "data.jsonl"
    path.write_text('{"prompt": "ab", "response": "c", "source": "x"}\n\n{"prompt": "a", "response": "d"}\n')
    assert read_rows(path, tokenizer) == [Row((begin, a, b), (c, end)), Row((begin, a), (d, end))]
    path.write_text('{"text": "a\u2028b\x85c"}\r\n', encoding="utf-8")  # lines end where JSON lines end
    assert read_rows(path, tokenizer) == rows_of([{"text": "a\u2028b\x85c"}], tokenizer)
    path.write_text('{"text": "a"}\nnonsense\n{"prompt": "b"}\n' + json.dumps({"prompt": "a", "response": "b"}) + '\n{"text": 3}\n')
    with pytest.raises(UserError) as fault:
        read_rows(path, tokenizer)
    lines = str(fault.value).splitlines()
    assert [line.split(":")[1] for line in lines] == ["2", "3", "4", "5"]
    assert "is not JSON" in lines[0]
    assert lines[2].endswith("is of another kind than the lines before; give texts, or prompts with responses")
    with pytest.raises(UserError, match=r"cannot be read"):
        read_rows(tmp_path / "nowhere.jsonl", tokenizer)


def test_gates_of_a_model_are_those_that_it_was_made_with(llamas: list[Any]) -> None:
    generator = torch.Generator().manual_seed(1)
    linear = {layer: LinearGate(torch.randn(2, 16, generator=generator), torch.randn(2, generator=generator)) for layer in range(2)}
    mlp = {layer: MlpGate(torch.randn(4, 16, generator=generator), torch.randn(2, 4, generator=generator)) for layer in range(2)}
    for given in (linear, mlp):
        found = gates_of(mixture(llamas, LevelSpec("ffn", "token"), gate=given))
        assert sorted(found) == [0, 1]
        for layer, gate in given.items():
            assert type(found[layer]) is type(gate)
            for name, value in gate.tensors().items():
                assert torch.equal(found[layer].tensors()[name], value)
