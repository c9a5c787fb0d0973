"""Selection inside a family: the four strategies with the evaluator that the file describes."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch

from modelglue.checkpoint import TensorsCheckpoint
from modelglue.recipe import Candidate, Scores
from modelglue.search import Selection, select
from modelglue.zoo import similarity
from tests.golden.cases import Adapter, Answer, Case

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence


class Quantised:
    """floor(200 (1 - mean((w - target)^2))) / 200, with w the candidate's single tensor: the file's evaluator."""

    tasks: Sequence[str] = ("distance",)

    def __init__(self, case: Case) -> None:
        self._target = case.tensors("data")["target"].double()
        self._weights = [only(model).double() for model in case.models]

    def evaluate(self, candidate: Candidate) -> Scores:
        w = torch.zeros_like(self._target)
        for alias, weight in zip(candidate.members, candidate.weights, strict=True):
            w += weight * self._weights[int(alias)]
        error = float(((w - self._target) ** 2).mean())
        return Scores({"distance": {"0": math.floor(200 * (1 - error)) / 200}})


def only(model: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """The single tensor of a model."""
    (tensor,) = model.values()
    return tensor


def _trace(found: Selection) -> dict[str, Any]:
    """Our trace in the file's words; models are numbers there."""
    order = [int(alias) for alias in found.order]
    common = {
        "order": order,
        "individual_scores": list(found.individual.values()),
        "weights": list(found.weights.values()),
        "final_score": found.score,
        "new_evaluations": found.evaluations,
    }
    if found.strategy == "average":
        rounds: list[dict[str, Any]] = [
            {"candidate": int(one.candidate), "score": one.score, "accepted": one.accepted} for one in found.rounds
        ]
        return {**common, "rounds": rounds, "selected": [one for one in order if found.weights[str(one)]]}
    rounds = [
        {
            "candidate": int(one.candidate),
            "scores": list((one.scores or {}).values()),
            "best_c": one.coefficient,
            "accepted": one.accepted,
            "score_after": one.current,
        }
        for one in found.rounds
    ]
    return {**common, "rounds": rounds}


def _select(case: Case) -> Answer:
    models = [TensorsCheckpoint(tensors) for tensors in case.models]
    gram = similarity(models, keep_gram=True)

    def similarity_to(weights: Mapping[str, float], other: str) -> float:
        return gram.to_merge({int(alias): weight for alias, weight in weights.items()}, int(other))

    result = select(
        [str(number) for number in range(len(models))],
        Quantised(case),
        coefficients=case.params["coefficients"],
        similarity_to=similarity_to,
    )
    return Answer(json={found.strategy: _trace(found) for found in result.selections})


ADAPTERS: dict[str, Adapter] = {"model-glue/selective-merge-": _select}
