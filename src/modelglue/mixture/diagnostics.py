"""Is the router any good? Self-test, condition number, load, and the gap to a router that knows the answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from modelglue.errors import UserError
from modelglue.mixture.gates import Gate, LinearGate
from modelglue.mixture.router import Reader, prompt_logits, winner, worst_margin
from modelglue.mixture.spec import ExpertSpec

_HIGH_CONDITION = 5.0
#: stands for infinity, which JSON does not have
_NO_CONDITION = 1e9
_HIGH_LOAD = 0.9


@dataclass(frozen=True)
class SelfTest:
    """Where the experts' own prompts go: `confusion[i][j]` counts prompts of expert i that reach expert j."""

    experts: tuple[str, ...]
    confusion: tuple[tuple[int, ...], ...]
    margin: float
    condition_number: float | None
    """Of a linear gate's rows; None for an MLP."""
    gate_mode: str
    router_layer: int
    encoder: str
    warnings: tuple[str, ...]

    @property
    def accuracy(self) -> float:
        total = sum(map(sum, self.confusion))
        return sum(row[i] for i, row in enumerate(self.confusion)) / total

    def to_json(self) -> dict[str, Any]:
        return {
            "gate_mode": self.gate_mode,
            "router_layer": self.router_layer,
            "encoder": self.encoder,
            "self_test": {"experts": list(self.experts), "confusion": [list(row) for row in self.confusion], "accuracy": self.accuracy},
            "condition_number": {"gate": self.condition_number},
            "margin": self.margin,
            "warnings": list(self.warnings),
        }


class _Settings(Protocol):
    @property
    def gate_mode(self) -> Any: ...
    @property
    def router_layer(self) -> int: ...
    @property
    def route_span(self) -> str: ...
    @property
    def encoder(self) -> str: ...


def self_test(reader: Reader, experts: Sequence[ExpertSpec], gate: Gate, settings: _Settings) -> SelfTest:
    """Route every positive prompt and compare with the expert it belongs to. Raises UserError when no expert has one."""
    import torch

    if not any(expert.positive for expert in experts):
        raise UserError("the router's self-test needs prompts, and no expert has positive ones. Make the mixture with prompts.")
    logits = prompt_logits(reader, experts, gate, settings.route_span)
    confusion = [[0] * len(experts) for _ in experts]
    for own, rows in enumerate(logits):
        for row in rows.tolist():
            confusion[own][winner(row)] += 1
    condition, warnings = None, []
    if isinstance(gate, LinearGate):
        rows = gate.weight
        condition = min(float(torch.linalg.cond(rows.double())), _NO_CONDITION)
        opposite = len(experts) == 2 and float(rows[0] @ rows[1]) < 0  # rows that point apart are no trouble, however dependent
        if condition > _HIGH_CONDITION and not opposite and gate.bias is None:
            warnings.append(f"the gate's condition number is {condition:.1f} (over {_HIGH_CONDITION:g}): the prompts are too alike.")
    for own, row in enumerate(confusion):
        if row[own] < sum(row):
            warnings.append(f"{sum(row) - row[own]} of {sum(row)} prompts of '{experts[own].name}' reach another expert.")
    return SelfTest(
        experts=tuple(expert.name for expert in experts), confusion=tuple(map(tuple, confusion)), margin=worst_margin(logits),
        condition_number=condition, gate_mode=str(settings.gate_mode), router_layer=settings.router_layer, encoder=settings.encoder,
        warnings=tuple(warnings),
    )  # fmt: skip


class _Router(Protocol):
    @property
    def experts(self) -> Sequence[str]: ...
    def route(self, texts: Sequence[str]) -> Sequence[Any]: ...


@dataclass(frozen=True)
class LoadReport:
    """How many samples of each task reach each expert."""

    load: Mapping[str, Mapping[str, int]]
    warnings: tuple[str, ...]


def load_report(mixture: _Router, contexts: Mapping[str, Sequence[str]]) -> LoadReport:
    """Route the contexts of every task; warns when one expert gets more than nine tenths of everything."""
    load = {}
    for task, texts in contexts.items():
        names = [route.name for route in mixture.route(texts)]
        load[task] = {expert: names.count(expert) for expert in mixture.experts}
    total = sum(sum(row.values()) for row in load.values())
    warnings = []
    for expert in mixture.experts:
        share = sum(row[expert] for row in load.values()) / max(total, 1)
        if share > _HIGH_LOAD:
            warnings.append(f"'{expert}' gets {share:.0%} of all samples.")
    return LoadReport(load, tuple(warnings))


def oracle_gap(experts: Mapping[str, Mapping[str, float]], mixture: Mapping[str, float]) -> float:
    """Mean over the mixture's tasks of the best expert's score minus the mixture's: large means a bad router, not bad experts."""
    gaps = [max(scores[task] for scores in experts.values()) - value for task, value in mixture.items()]
    return sum(gaps) / len(gaps)
