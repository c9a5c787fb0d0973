"""Fit a gate to values: which expert to ask, told from a pooled state.

Two losses over probabilities p = softmax(gate(x)) and values v, larger is better:

    best       -log of the sum of p over the experts that did best on the item (cross-entropy to the best expert; ties share)
    expected   sum of p (max v - v): what is lost, on average, by asking a random expert of the distribution p

`best` is convex for a linear gate as long as there are no ties; `expected` is what routing is judged by, but flat far from its minimum,
so it starts where `best` ends. A squared penalty on weights (not on biases) keeps either finite. L-BFGS in float64 and one thread:
equal inputs give equal bits, and a few hundred items take a fraction of a second.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from modelglue.mixture.gates import Gate, GateKind, LinearGate, MlpGate
from modelglue.mixture.trained import Objective

if TYPE_CHECKING:
    import torch

_STEPS = 100
#: states of more numbers are read along their strongest directions only
_MOST_DIRECTIONS = 256


@dataclass(frozen=True)
class Fit:
    """What kind of gate is fitted, and by which loss."""

    kind: GateKind = "linear"
    objective: Objective = "best"
    penalty: float = 1e-2
    hidden: int = 64
    """Hidden units of an MLP."""
    seed: int = 0
    """For the MLP's first weights."""


@dataclass(frozen=True)
class Frame:
    """How states are scaled before they are fitted: centred, every number to deviation 1, and along at most 256 principal directions.

    Folded into the gate afterwards, so that nobody who routes needs it.
    """

    mean: torch.Tensor
    scale: torch.Tensor
    directions: torch.Tensor | None

    @classmethod
    def of(cls, states: torch.Tensor) -> Frame:
        """The frame of these states [items, d]. Time: items^2 d where there are more than 256 numbers or fewer items than numbers."""
        import torch

        states = states.double()
        mean = states.mean(dim=0)
        deviation = states.std(dim=0, correction=0)
        flat = deviation <= 1e-6 * deviation.max().clamp(min=1e-30)  # numbers that do not vary say nothing
        scale = torch.where(flat, torch.zeros_like(deviation), 1 / deviation.clamp(min=1e-30))
        directions = None
        most = min(len(states), _MOST_DIRECTIONS)
        if states.shape[1] > most:
            directions = torch.linalg.svd((states - mean) * scale, full_matrices=False).Vh[:most].T.contiguous()
        return cls(mean, scale, directions)

    def apply(self, states: torch.Tensor) -> torch.Tensor:
        """[items, r] of states [items, d], float64."""
        scaled = (states.double() - self.mean) * self.scale
        return scaled if self.directions is None else scaled @ self.directions

    def unfold(self, weight: torch.Tensor, bias: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Weight [n, d] and bias on plain states, of a weight [n, r] and bias in this frame."""
        if self.directions is not None:
            weight = weight @ self.directions.T
        weight = weight * self.scale
        return weight, bias - weight @ self.mean


@dataclass(frozen=True)
class Fitted:
    """Parameters in a frame's terms, float64: one (weight, bias) of a linear gate, two of an MLP."""

    layers: tuple[tuple[torch.Tensor, torch.Tensor], ...]

    def logits(self, inputs: torch.Tensor) -> torch.Tensor:
        """[items, experts] of framed states."""
        return _forward([part for layer in self.layers for part in layer], inputs)

    def gate(self, frame: Frame) -> Gate:
        """The gate that does the same on plain states, float32."""
        weight, bias = frame.unfold(*self.layers[0])
        if len(self.layers) == 1:
            return LinearGate(weight.float(), bias.float())
        second, second_bias = self.layers[1]
        return MlpGate(weight.float(), second.float(), bias.float(), second_bias.float())


def fit_gate(inputs: torch.Tensor, values: torch.Tensor, weights: torch.Tensor, fit: Fit) -> Fitted:
    """Fit to framed states [items, r], values [items, experts] and item weights [items], all float64.

    Memory: the parameters ten times, for L-BFGS.
    """
    import torch

    from modelglue.checkpoint.engine.workers import single_thread

    losses = values.max(dim=1, keepdim=True).values - values
    losses = losses / (losses.max(dim=1).values * weights).sum().clamp(min=1e-30) * weights.sum()
    best = losses == 0
    with single_thread(), torch.enable_grad():
        parameters = _start(inputs.shape[1], values.shape[1], fit)
        for objective in ("best", "expected") if fit.objective == "expected" else ("best",):

            def loss(objective: str = objective) -> torch.Tensor:
                logs = torch.log_softmax(_forward(parameters, inputs), dim=-1)
                if objective == "best":
                    each = -torch.logsumexp(logs.masked_fill(~best, -torch.inf), dim=-1)
                else:
                    each = (logs.exp() * losses).sum(dim=-1)
                squares = sum(weight.square().sum() for weight in parameters[::2])
                return (each * weights).sum() / weights.sum() + 0.5 * fit.penalty * squares

            _minimise(parameters, loss)
    found = [parameter.detach() for parameter in parameters]
    return Fitted(tuple(zip(found[::2], found[1::2], strict=True)))


def temperature_of(logits: torch.Tensor, values: torch.Tensor, weights: torch.Tensor) -> float:
    """The temperature in [0.05, 20] by which `logits` tell best which experts are right: the least cross-entropy of softmax(logits / T).

    Give logits of items that the gate was not fitted on. 1 where all experts are alike on all items. Golden-section search on log T.
    """
    import torch

    best = values == values.max(dim=1, keepdim=True).values
    telling = ~best.all(dim=1)
    if not bool(telling.any()):
        return 1.0
    logits, best, weights = logits[telling].double(), best[telling], weights[telling]

    def entropy(log: float) -> float:
        logs = torch.log_softmax(logits / float(torch.tensor(log).double().exp()), dim=-1)
        return float((-torch.logsumexp(logs.masked_fill(~best, -torch.inf), dim=-1) * weights).sum())

    low, high = -2.995732273553991, 2.995732273553991  # log 20
    ratio = (5**0.5 - 1) / 2
    for _ in range(40):
        left, right = high - ratio * (high - low), low + ratio * (high - low)
        if entropy(left) <= entropy(right):
            high = right
        else:
            low = left
    return round(float(torch.tensor((low + high) / 2).double().exp()), 6)


def with_penalty(fit: Fit, penalty: float) -> Fit:
    return replace(fit, penalty=penalty)


def _start(inputs: int, experts: int, fit: Fit) -> list[torch.Tensor]:
    """Zeros for a linear gate; for an MLP normal weights of deviation 1 / sqrt(inputs), and zeros above."""
    import torch

    def zeros(*shape: int) -> torch.Tensor:
        return torch.zeros(*shape, dtype=torch.float64)

    if fit.kind == "linear":
        made = [zeros(experts, inputs), zeros(experts)]
    else:
        generator = torch.Generator().manual_seed(fit.seed)
        first = torch.randn(fit.hidden, inputs, generator=generator, dtype=torch.float64) * inputs**-0.5
        second = torch.randn(experts, fit.hidden, generator=generator, dtype=torch.float64) * 0.1 * fit.hidden**-0.5
        made = [first, zeros(fit.hidden), second, zeros(experts)]
    return [part.requires_grad_() for part in made]


def _forward(parameters: list[torch.Tensor], inputs: torch.Tensor) -> torch.Tensor:
    states = inputs @ parameters[0].T + parameters[1]
    if len(parameters) == 4:
        states = states.clamp(min=0) @ parameters[2].T + parameters[3]
    return states


def _minimise(parameters: list[torch.Tensor], loss: object) -> None:
    import torch

    optimiser = torch.optim.LBFGS(
        parameters, max_iter=_STEPS, history_size=10, line_search_fn="strong_wolfe", tolerance_grad=1e-7, tolerance_change=1e-9
    )

    def closure() -> torch.Tensor:
        optimiser.zero_grad()
        value: torch.Tensor = loss()  # type: ignore[operator]
        value.backward()  # type: ignore[no-untyped-call]
        return value

    optimiser.step(closure)  # type: ignore[no-untyped-call]
