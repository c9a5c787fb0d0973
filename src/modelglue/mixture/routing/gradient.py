"""Train the gates of a mixture by gradients, and nothing else of it (Model-GLUE, arXiv 2410.05357, whose settings are the defaults).

At K = 1 the renormalised weight of the chosen expert is 1 whatever the router says, so no gradient would reach it. While training, weights
are

    soft               the whole softmax: all experts run, the gradient is exact
    topk               as at inference; needs K >= 2
    straight_through   as at inference, with the gradient of p for the chosen: the cost of K experts, a biased gradient
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeVar, get_args

from modelglue.errors import RunError, UserError

if TYPE_CHECKING:
    import torch

Gating = Literal["soft", "topk", "straight_through"]
R = TypeVar("R", contravariant=True)


class Gated(Protocol[R]):
    """A module whose gates can be trained on rows of some kind; see `GatedModel` for the mixtures of this library."""

    @property
    def top_k(self) -> int: ...
    def gates(self) -> Sequence[torch.nn.Parameter]:
        """What is trained."""

    def everything(self) -> Sequence[torch.nn.Parameter]:
        """All parameters; those that are no gates are frozen meanwhile."""

    def gating(self, kind: Gating | None) -> None:
        """Use these weights from now on; None: those of inference."""

    def targets(self, rows: Sequence[R]) -> int:
        """How many losses `loss` adds up."""

    def loss(self, rows: Sequence[R]) -> torch.Tensor:
        """The sum of the losses of all targets."""

    def balance(self) -> torch.Tensor | None:
        """The load-balancing term of the last call of `loss`, if it has one."""


@dataclass(frozen=True)
class GateTraining:
    """How gates are trained. Raises UserError for what cannot be."""

    gating: Gating = "soft"
    rate: float = 5e-5
    batch: int = 128
    micro_batch: int = 8
    """Rows that are in memory at once; gradients of a batch are added up."""
    epochs: int = 1
    warm_up: float = 0.03
    """Share of the steps in which the rate rises; then it falls along a cosine to 0."""
    clip: float = 1.0
    balance: float = 0.0
    """Factor of the load-balancing term; the research code has 0.001."""
    seed: int = 42

    def __post_init__(self) -> None:
        faults = []
        if self.gating not in get_args(Gating):
            faults.append(f"gating is {self.gating!r}; allowed are {', '.join(get_args(Gating))}")
        faults += [
            f"{name} is {getattr(self, name)}; allowed is a whole number from 1"
            for name in ("batch", "micro_batch", "epochs") if not getattr(self, name) >= 1
        ]  # fmt: skip
        faults += [
            f"{name} is {getattr(self, name)}; allowed is a number above 0" for name in ("rate", "clip") if not getattr(self, name) > 0
        ]
        if not 0 <= self.warm_up < 1:
            faults.append(f"warm_up is {self.warm_up}; allowed is a share from 0 to below 1")
        if not self.balance >= 0:
            faults.append(f"balance is {self.balance}; allowed is a number from 0")
        if faults:
            raise UserError(f"router_train: {'; '.join(faults)}.")


def train_gates(module: Gated[R], rows: Sequence[R], training: GateTraining) -> list[float]:
    """Train the gates in place; the mean loss of every step, the first of them before anything has changed.

    AdamW (0.9, 0.999) without decay, in one thread and with seeded batches, so equal inputs give equal bits on a CPU. Raises UserError
    for `topk` at K = 1 and for no rows, RunError for a loss that is no number (the gates are then as they were). Time: an epoch is one
    forward and backward pass of all rows, with all experts for `soft`, else K. Memory: the activations of a micro batch.
    """
    import torch

    from modelglue.checkpoint.engine.workers import single_thread

    if training.gating == "topk" and module.top_k < 2:
        raise UserError("router_train: gating is topk at top_k 1, where no gradient reaches the router; use soft or straight_through.")
    if not rows:
        raise UserError("router_train: there is nothing to train on. Give texts.")
    gates = list(module.gates())
    before = [gate.detach().clone() for gate in gates]
    frozen = [(parameter, parameter.requires_grad) for parameter in module.everything()]
    steps = math.ceil(len(rows) / training.batch) * training.epochs
    optimiser = torch.optim.AdamW(gates, lr=training.rate, betas=(0.9, 0.999), weight_decay=0.0)
    losses: list[float] = []
    for parameter, _ in frozen:
        parameter.requires_grad_(False)
    try:
        module.gating(training.gating)
        with single_thread(), torch.enable_grad():
            for gate in gates:
                gate.requires_grad_(True)
            for step, chosen in enumerate(_batches(len(rows), training)):
                for group in optimiser.param_groups:
                    group["lr"] = training.rate * schedule(step, steps, training.warm_up)
                optimiser.zero_grad()
                losses.append(_accumulate(module, [rows[number] for number in chosen], training))
                if not math.isfinite(losses[-1]):
                    raise RunError(f"router_train: the loss of step {step + 1} is {losses[-1]}. Check the texts, or lower the rate.")
                torch.nn.utils.clip_grad_norm_(gates, training.clip)
                optimiser.step()
    except BaseException:
        with torch.no_grad():
            for gate, value in zip(gates, before, strict=True):
                gate.copy_(value)
        raise
    finally:
        module.gating(None)
        for parameter, wanted in frozen:
            parameter.requires_grad_(wanted)
    for gate in gates:
        gate.grad = None
    return losses


def schedule(step: int, steps: int, warm_up: float) -> float:
    """The rate's factor at a step counted from 0: rising over the share `warm_up` of all steps, then along half a cosine to 0."""
    rising = math.ceil(steps * warm_up)
    if step < rising:
        return (step + 1) / rising
    return 0.5 * (1 + math.cos(math.pi * (step - rising) / max(steps - rising, 1)))


def balance_term(logits: torch.Tensor, top_k: int) -> torch.Tensor:
    """experts * sum over choices k and experts e of f[k, e] P[e]: f is the share of rows whose k-th choice is e, P the mean probability.

    `logits` [rows, experts], without pads. `top_k` at perfect balance, more for anything else that the probabilities follow.
    """
    import torch

    p = torch.softmax(logits.float(), dim=-1)
    best = p.sort(dim=-1, descending=True, stable=True).indices[:, :top_k]
    shares = torch.nn.functional.one_hot(best, p.shape[-1]).float().mean(dim=0)
    return (shares * p.mean(dim=0)).sum() * p.shape[-1]


def _batches(count: int, training: GateTraining) -> Iterator[list[int]]:
    import torch

    generator = torch.Generator().manual_seed(training.seed)
    for _ in range(training.epochs):
        order = torch.randperm(count, generator=generator).tolist()
        for start in range(0, count, training.batch):
            yield order[start : start + training.batch]


def _accumulate(module: Gated[Any], rows: Sequence[Any], training: GateTraining) -> float:
    """Leave the gradient of the batch's loss in the gates; the loss."""
    total, parts = 0.0, math.ceil(len(rows) / training.micro_batch)
    targets = max(module.targets(rows), 1)
    for start in range(0, len(rows), training.micro_batch):
        loss = module.loss(rows[start : start + training.micro_batch]) / targets
        term = module.balance() if training.balance else None
        if term is not None:
            loss = loss + training.balance * term / parts
        loss.backward()  # type: ignore[no-untyped-call]
        total += float(loss.detach())
    return total
