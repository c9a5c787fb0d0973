"""MERGE^3 (arXiv 2502.10436): a candidate's accuracy on all items, estimated from its answers to a few, as the fitness of any search."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np

from modelglue.errors import UserError
from modelglue.recipe import Candidate, Evaluator, Level, Scores
from modelglue.search.estimators import Estimator, Extract, Mode, anchor_extract, gpirt_share, item_vectors, random_extract
from modelglue.search.fitness import Part
from modelglue.search.item_fit import binarised, choose_dimensions, fit_items
from modelglue.search.item_response import Floats, ItemParameters, fit_ability
from modelglue.search.randomness import rng


class ItemResponseFitness:
    """Candidates are scored on `size` items of every task; their score on the task is an estimate for all of its items.

    `parameters`: task -> item parameters in the evaluator's order of items. Without them, `responses` (task -> [models, items], 30 models
    or more, the same order) are fitted first; with neither, the mean of the seen items stands for the rest. `members` are the models
    that are merged: they are scored on everything, once, before the search. `share` is what the seen items count for in gpirt and gmpirt;
    default: 0.5 in gmpirt, and in gpirt what the errors of the prediction for models with known answers ask for.
    """

    may_race = False
    levels: frozenset[Level] = frozenset({"E2", "E3"})

    def __init__(
        self, members: Sequence[str], *, size: int = 50, mode: Mode | None = None, share: float | None = None, seed: int = 0,
        extract: Literal["random", "anchors"] = "random", parameters: Mapping[str, ItemParameters] | None = None,
        responses: Mapping[str, Any] | None = None,
    ) -> None:  # fmt: skip
        if size < 1:
            raise UserError(f"{size} items per task; allowed is 1 or more.")
        self._members, self._size, self._share, self._seed, self._kind = list(members), size, share, seed, extract
        self._parameters = dict(parameters or {})
        self._responses = {task: np.asarray(rows, dtype=np.float64) for task, rows in (responses or {}).items()}
        for task, rows in self._responses.items():
            if task not in self._parameters:
                marked = binarised(rows)
                self._parameters[task] = fit_items(marked, choose_dimensions(marked))[0]
        self.mode: Mode = mode or ("gmpirt" if self._parameters else "mean")
        if self.mode not in ("mean", "weighted") and not self._parameters:
            raise UserError(f"the estimate {self.mode} needs item parameters, or the answers of 30 models. Give them, or use mean.")
        self._estimators: dict[str, Estimator] = {}
        self._items: dict[str, tuple[str, ...]] = {}
        self._endpoints: Sequence[Scores] = ()

    def endpoints(self) -> Sequence[Candidate]:
        return [Candidate.single(alias) for alias in self._members] if self.mode in ("gpirt", "mpirt", "gmpirt") else []

    def prepare(self, evaluator: Evaluator, endpoints: Sequence[Scores]) -> None:
        self._endpoints = endpoints

    def parts(self, evaluator: Evaluator) -> Sequence[Part]:
        part: dict[str, tuple[str, ...]] = {}
        for task in evaluator.tasks:
            items = list(evaluator.items(task))
            parameters = self._parameters.get(task)
            if parameters is None and self.mode not in ("mean", "weighted"):
                raise UserError(f"task '{task}': has no item parameters, which the estimate {self.mode} needs. Give them for every task.")
            if parameters is not None and len(parameters) != len(items):
                raise UserError(f"task '{task}': {len(parameters)} item parameters for {len(items)} items.")
            extract = self._extract(task, len(items), parameters)
            abilities = None
            if parameters is not None and self._endpoints:
                answers = [np.array([scores.items[task][item] for item in items]) for scores in self._endpoints]
                abilities = np.stack([fit_ability(y, parameters) for y in answers])
            share = 0.5 if self._share is None else self._share
            if parameters is not None and self.mode == "gpirt" and self._share is None:
                answered = [
                    *self._responses.get(task, ()),
                    *(np.array([one.items[task][item] for item in items]) for one in self._endpoints),
                ]
                share = _share(extract, parameters, answered)
            self._estimators[task] = Estimator(extract, self.mode, parameters, abilities, share)
            part[task] = tuple(items[position] for position in extract.positions)
        self._items = part
        return [part]

    def tasks(self, scores: Scores) -> Mapping[str, float]:
        return {
            task: estimate([scores.items[task][item] for item in self._items[task]]) for task, estimate in self._estimators.items()
        }  # fmt: skip

    def _extract(self, task: str, count: int, parameters: ItemParameters | None) -> Extract:
        generator = rng(self._seed, "merge3", "extract", task)
        size = min(self._size, count)
        if self._kind == "anchors":
            if parameters is None:
                raise UserError(f"task '{task}': anchors are chosen by item parameters, and there are none. Use a random extract.")
            return anchor_extract(item_vectors(parameters), size, generator)
        return random_extract(count, size, generator)


def _share(extract: Extract, parameters: ItemParameters, answered: Sequence[Floats]) -> float:
    """What the seen items should count for, by models of which every answer is known: the less, the better the rest is predicted."""
    classic = Estimator(extract, "pirt", parameters)
    errors = [abs(classic(y[extract.positions]) - float(y.mean())) for y in answered]
    return gpirt_share(float(np.mean(errors)), float(np.mean([y.var() for y in answered])), len(extract)) if errors else 0.5
