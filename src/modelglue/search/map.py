"""MAP (arXiv 2406.07529): score a few dozen scalings of the task vectors, fit one quadratic per task, and read the front off it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, get_args

import numpy as np

from modelglue.errors import UserError, did_you_mean
from modelglue.search.decode import MergeSpace
from modelglue.search.item_response import Floats
from modelglue.search.pareto import hypervolume
from modelglue.search.randomness import rng
from modelglue.search.searcher import Needs, Outcome, Proposal
from modelglue.search.surrogate import Link, Quadratic, coefficient_count, first_points, fit, poor_fits, preferred, surrogate_front
from modelglue.search.surrogate_design import Node, closest_pair, joined, leaves, next_points

Variant = Literal["plain", "bayesian", "nested"]
#: points of a pair in the nested variant
_PAIR_POINTS = 20
#: one step of a variant: what is asked, and what it is told back, point by point: [points, tasks]
_Steps = Iterator["tuple[Floats, str]"]


class MapSearch:
    """Scalings c_m in [0, 1] of task vectors: base + sum_m c_m (model_m - base), all tasks as objectives.

    `plain` scores `points` (default twice what a quadratic needs) and verifies `verify` points spread over the fitted front. `bayesian`
    chooses the second half of the points where the fits err. `nested` joins two models at a time, those whose scores are closest, for many
    tasks: one task per model, in order, or `own`: model -> its tasks. `preference`: task -> weight, 1 where nothing is said.
    Where a quadratic does not predict points that were left out, there is no front; the best point that was scored remains.
    """

    needs = Needs(frozenset({"E1"}), "off")

    def __init__(
        self, members: Sequence[str], base: str, *, variant: Variant = "plain", points: int | None = None, verify: int = 5,
        preference: Mapping[str, float] | None = None, own: Mapping[str, Sequence[str]] | None = None, seed: int = 0,
        link: Link | None = None, generations: int = 150,
    ) -> None:  # fmt: skip
        if variant not in get_args(Variant):
            hint = did_you_mean(variant, get_args(Variant))
            raise UserError(f"variant is '{variant}'; allowed are {', '.join(get_args(Variant))}.{hint}")
        self._members, self._variant, self._seed, self._verify = list(members), variant, seed, verify
        self._count = points or 2 * coefficient_count(len(members))
        self._preference, self._own, self._link, self._generations = dict(preference or {}), own, link, generations
        self._space = MergeSpace("task_arithmetic", tuple(members), base)
        if variant != "nested" and self._count < coefficient_count(len(members)):
            needed = coefficient_count(len(members))
            raise UserError(f"{self._count} points for {len(members)} models; allowed is {needed} or more, default twice that.")
        self._points: list[Floats] = []
        self._scores: list[Floats] = []
        self._tasks: list[str] = []
        self._said: dict[str, Any] = {}
        self._steps = {"plain": self._plain, "bayesian": self._bayesian, "nested": self._nested}[variant]()
        self._next: tuple[Floats, str] | None = next(self._steps)

    def ask(self, n: int) -> list[Proposal]:
        if self._next is None:
            return []
        points, tag = self._next
        found = []
        for point in points:
            weights = {alias: round(float(c), 6) for alias, c in zip(self._members, point, strict=True)}
            params = self._space.everywhere({"weight": weights})
            found.append(Proposal(self._space.candidate(params), params, tag=tag))
        return found

    def tell(self, outcomes: Sequence[Outcome]) -> None:
        assert self._next is not None, "told what was not asked"
        self._tasks = self._tasks or next((list(outcome.tasks) for outcome in outcomes if outcome.whole), [])
        if not self._tasks:
            raise UserError("none of the first points could be scored, so there is nothing to fit.")
        for point, outcome in zip(self._next[0], outcomes, strict=True):
            if outcome.whole:
                self._points.append(point)
                self._scores.append(np.array([outcome.tasks[task] for task in self._tasks]))
        self._next = next(self._steps, None)

    def done(self) -> bool:
        return self._next is None

    def report(self) -> Mapping[str, Any]:
        return {"variant": self._variant, "tasks": self._tasks, **self._said}

    # -- the variants: generators that yield what to score, and find it scored when they go on ----------------------------------------

    def _plain(self) -> _Steps:
        yield first_points(len(self._members), self._count, self._seed), "design"
        yield from self._verified()

    def _bayesian(self) -> _Steps:
        models = len(self._members)
        start = max(coefficient_count(models), self._count // 2) if models > 1 else self._count
        yield first_points(models, start, self._seed), "design"
        round_ = 0
        while (left := self._count - start) > 0 and len(self._points) >= coefficient_count(models):
            each = max(1, min(left, models) // len(self._tasks) or 1)
            X, Y = np.stack(self._points), np.stack(self._scores)
            fresh = []
            for number in range(min(len(self._tasks), left)):
                surrogate = fit(X, Y[:, number], self._linked(Y))
                generator = rng(self._seed, "map", "bayesian", round_, number)
                fresh.append(next_points(X, (surrogate(X) - Y[:, number]) ** 2, each, generator))
            batch = np.clip(np.concatenate(fresh)[:left], 0.0, 1.0)
            start += len(batch)
            round_ += 1
            yield batch, "design"
        yield from self._verified()

    def _verified(self) -> _Steps:
        """Fit what was scored, and score some points of the front."""
        X, Y = np.stack(self._points), np.stack(self._scores)
        if len(X) < coefficient_count(len(self._members)):
            self._said = {"refused": f"{len(X)} points could be scored, a quadratic needs {coefficient_count(len(self._members))}"}
            return
        surrogates = [fit(X, Y[:, number], self._linked(Y)) for number in range(len(self._tasks))]
        self._said = {"r2": {task: one.r2 for task, one in zip(self._tasks, surrogates, strict=True)}}
        if bad := poor_fits(surrogates):
            names = ", ".join(f"{self._tasks[number]} ({surrogates[number].r2:.2f})" for number in bad)
            self._said["refused"] = f"points that were left out are not predicted (R^2 below 0.5): {names}"
            return
        front, predicted = self._front(surrogates, X)
        chosen = _spread(predicted, self._verify, preferred(predicted, self._weights()))
        before = len(self._points)
        yield front[chosen], "verify"
        verified = [one.tolist() for one in self._scores[before:]]
        self._said |= {
            "front": [
                {"scalings": dict(zip(self._members, map(float, c), strict=True)), "predicted": p.tolist()}
                for c, p in zip(front, predicted, strict=True)
            ],
            "verified": [
                {"scalings": dict(zip(self._members, map(float, c), strict=True)), "predicted": predicted[position].tolist(), "scored": y}
                for c, position, y in zip(self._points[before:], chosen, verified, strict=False)
            ],
        }

    def _nested(self) -> _Steps:
        models = len(self._members)
        yield np.eye(models), "member"
        if len(self._points) < models:
            self._said = {"refused": "a member could not be scored"}
            return
        below = [self._own_tasks(number) for number in range(models)]
        weights = self._weights()
        nodes: Sequence[Node] = leaves(
            [float(self._scores[number][below[number]].mean()) for number in range(models)],
            [float(weights[tasks].sum()) for tasks in below],
        )
        joins = []
        while len(nodes) > 1:
            i, j = closest_pair([node.score for node in nodes])
            design = first_points(2, _PAIR_POINTS, self._seed)
            before = len(self._points)
            yield design @ np.stack([nodes[i].scalings, nodes[j].scalings]), "design"
            found = np.stack(self._scores[before:])
            sides = np.stack([found[:, tasks] @ weights[tasks] / weights[tasks].sum() for tasks in (below[i], below[j])], axis=1)
            preference = [nodes[i].preference, nodes[j].preference]
            scaling, score = self._pair(design[: len(sides)], sides, preference)
            nodes = joined(nodes, (i, j), (float(scaling[0]), float(scaling[1])), score)
            joins.append({"pair": [i, j], "scaling": [float(c) for c in scaling], "score": score})
            below = [below[i] + below[j] if number == i else tasks for number, tasks in enumerate(below) if number != j]
        self._said = {"joins": joins, "scalings": dict(zip(self._members, map(float, nodes[0].scalings), strict=True))}
        yield np.clip(nodes[0].scalings, 0.0, 1.0)[None, :], "verify"

    def _pair(self, design: Floats, sides: Floats, preference: Sequence[float]) -> tuple[Floats, float]:
        """The scalings of a pair and what they score: off the fitted front, or where the fits say nothing, the best point scored."""
        share = np.array(preference) / sum(preference)
        if len(design) >= coefficient_count(2):
            surrogates = [fit(design, sides[:, side], self._linked(sides)) for side in range(2)]
            if not poor_fits(surrogates):
                front, predicted = self._front(surrogates, design)
                best = preferred(predicted, preference)
                return front[best], float(predicted[best] @ share)
        best = int(np.argmax(sides @ share))
        return design[best], float(sides[best] @ share)

    # -- what they share -----------------------------------------------------------------------------------------------------------

    def _front(self, surrogates: Sequence[Quadratic], X: Floats) -> tuple[Floats, Floats]:
        return surrogate_front(surrogates, X.min(axis=0), X.max(axis=0), seed=self._seed, generations=self._generations)

    def _linked(self, Y: Floats) -> Link:
        return self._link or ("sigmoid" if bool(((Y >= 0) & (Y <= 1)).all()) else "identity")

    def _weights(self) -> Floats:
        return np.array([self._preference.get(task, 1.0) for task in self._tasks])

    def _own_tasks(self, number: int) -> list[int]:
        if self._own is not None:
            return [self._tasks.index(task) for task in self._own[self._members[number]]]
        if len(self._tasks) != len(self._members):
            raise UserError(f"nested: {len(self._members)} models and {len(self._tasks)} tasks. Say which tasks are whose.")
        return [number]


def _spread(front: Floats, count: int, first: int) -> list[int]:
    """Positions of `count` points of a front [n, tasks], starting with `first`: each next one adds most to what they cover together.

    From four tasks on, where covering is costly to measure, each next one is the farthest from those before.
    """
    chosen = [first]
    low, width = front.min(axis=0), np.maximum(front.max(axis=0) - front.min(axis=0), 1e-12)
    scaled = (front - low) / width
    while len(chosen) < min(count, len(front)):
        if front.shape[1] <= 3:
            gains = [hypervolume(scaled[[*chosen, number]], np.full(front.shape[1], -0.1)) for number in range(len(front))]
        else:
            gains = [float(np.linalg.norm(scaled[chosen] - point, axis=1).min()) for point in scaled]
        best = int(np.argmax(gains))
        if best in chosen:
            break
        chosen.append(best)
    return chosen
