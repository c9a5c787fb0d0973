"""Gates from scores for a mixture of blocks: one for every layer that decides, and whether they are better than those from prompts.

Each layer's gate is fitted on its own to the states that enter the layer in the shared model, and to the scores of the experts as complete
models; no joint pass through the mixture is needed. In the mixture the states are what earlier layers' experts made of them, so what a
check on items says of layers one by one need not hold for all of them together.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from modelglue.errors import UserError
from modelglue.mixture.gates import Gate, LinearGate, MlpGate
from modelglue.mixture.router import Reader
from modelglue.mixture.routing.fit import Fit, Frame, fit_gate, temperature_of
from modelglue.mixture.routing.learn import FEWEST_ITEMS, FOLDS, compared, pooled_states, verdict
from modelglue.mixture.routing.scored import ScoredItems
from modelglue.mixture.trained import Training
from modelglue.recipe import Scores

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class LearnedGates:
    """What came of learning: gates by layer, and whether to use them."""

    gates: Mapping[int, Gate]
    """Empty where there was nothing to learn from."""
    used: bool
    message: str
    """Why they are used, or why not: one sentence."""
    training: Training | None

    def to_json(self) -> dict[str, Any]:
        training = None if self.training is None else self.training.model_dump(mode="json")
        return {"used": self.used, "message": self.message, "training": training}


def learn_layer_gates(reader: Reader, items: ScoredItems, layers: Sequence[int], fit: Fit, span: str = "prompt") -> dict[int, Gate]:
    """A gate for every layer of a mixture of blocks: fitted to the experts' scores as complete models, on the states that enter the layer.

    Raises UserError if the items tell no expert from another. Time: one pass of all texts through the model behind `reader`, the shared
    one, then a fit per layer.
    """
    from modelglue.checkpoint.engine.workers import single_thread

    if items.telling == 0:
        raise UserError("all experts score alike on every item: there is nothing to learn a router from. Give other items.")
    with single_thread():
        pooled = pooled_states(reader, layers, items.texts, span)
        return {layer: _Layer(pooled[layer], items, fit).gate() for layer in layers}


def learn_checked_gates(
    reader: Reader, items: ScoredItems, layers: Sequence[int], fit: Fit, *, reference: Mapping[int, Gate] | None, span: str = "prompt",
    always: bool = False,
) -> LearnedGates:  # fmt: skip
    """The same, held against the gates of `reference` (None: against the expert that is best for everything), mean over layers.

    They are `used` if they send items that they were not fitted on to better experts by more than chance, or `always`. Logits are
    calibrated: divided by the temperature that suits held-out items best, layer by layer. Time: six fits per layer.
    """
    from modelglue.checkpoint.engine.workers import single_thread

    if len(items.items) < FEWEST_ITEMS or items.telling == 0:
        few = f"{len(items.items)} scored items are too few (at least {FEWEST_ITEMS})" if items.telling else "all experts score alike"
        return LearnedGates({}, False, f"{few}: there is nothing to learn a router from.", None)
    gates: dict[int, Gate] = {}
    ours, theirs = [], []
    with single_thread():
        pooled = pooled_states(reader, layers, items.texts, span)
        for layer in layers:
            problem = _Layer(pooled[layer], items, fit)
            logits = problem.held_out()
            ours.append(_outcome(items, logits))
            if reference is not None:
                theirs.append(_outcome(items, reference[layer].logits(pooled[layer])))
            gates[layer] = _cooled(problem.gate(), temperature_of(logits, items.values(), items.weights()))
    if reference is None:
        theirs.append(items.outcome([items.best_for_everything()] * len(items.items)))
    held_out = compared(
        _mean(ours), _mean(theirs), items.outcome(items.oracle()), "best expert" if reference is None else "prompts"
    )  # fmt: skip
    used = held_out.better or always
    training = Training(
        objective=fit.objective, penalty=fit.penalty, hidden=fit.hidden if fit.kind == "mlp" else None, seed=fit.seed,
        items=len(items.items), tasks=items.tasks, held_out=held_out,
    )  # fmt: skip
    return LearnedGates(gates, used, verdict(held_out, used), training)


class _Layer:
    """The states that enter one layer, in their frame, and what is to be learned there."""

    def __init__(self, states: torch.Tensor, items: ScoredItems, fit: Fit) -> None:
        self.frame = Frame.of(states)
        self.states, self.items, self.fit = self.frame.apply(states), items, fit

    def gate(self) -> Gate:
        return fit_gate(self.states, self.items.values(), self.items.weights(), self.fit).gate(self.frame)

    def held_out(self) -> torch.Tensor:
        """Logits [items, experts], each by a gate that was fitted without the item's fold."""
        import torch

        values, weights, folds = self.items.values(), self.items.weights(), self.items.folds(FOLDS, self.fit.seed)
        logits = torch.zeros_like(values)
        for fold in range(FOLDS):
            known, new = folds != fold, folds == fold
            logits[new] = fit_gate(self.states[known], values[known], weights[known], self.fit).logits(self.states[new])
        return logits


def _outcome(items: ScoredItems, logits: torch.Tensor) -> Scores:
    return items.outcome([int(choice) for choice in logits.argmax(dim=1)])


def _mean(found: Sequence[Scores]) -> Scores:
    """The mean of every item over layers."""
    return Scores(
        {
            task: {name: sum(one.items[task][name] for one in found) / len(found) for name in values}
            for task, values in found[0].items.items()
        }
    )


def _cooled(gate: Gate, temperature: float) -> Gate:
    """The gate with logits divided by a temperature."""
    if isinstance(gate, LinearGate):
        return LinearGate(gate.weight / temperature, None if gate.bias is None else gate.bias / temperature)
    bias = None if gate.second_bias is None else gate.second_bias / temperature
    return MlpGate(gate.first, gate.second / temperature, gate.first_bias, bias)
