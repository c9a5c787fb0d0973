"""The search distributions of CMA-ES behind one face: points of the unit cube out, scores in. The arithmetic is cmaes's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from modelglue.search.item_response import Floats
from modelglue.search.space import Choice, Int, Space

#: chance that a starting choice is drawn first; the others share the rest
_START = 0.7


@dataclass(frozen=True, eq=False)
class Sample:
    """A point [dimensions] of the unit cube, and what the library calls it."""

    point: Floats
    solution: Any


class Distribution(Protocol):
    """Where the next candidates are drawn from."""

    @property
    def kind(self) -> str:
        """A word for reports."""

    def reseed(self, seed: int) -> None:
        """Draw by this seed from now on."""

    def ask(self) -> Sample:
        """A point."""

    def tell(self, samples: Sequence[tuple[Sample, float]]) -> None:
        """A whole generation with values; larger is better."""

    def collapsed(self) -> bool:
        """Whether nothing else will be drawn any more."""


class Numbers:
    """A normal distribution over the cube; with `diagonal`, no covariances. Points outside are drawn again, then taken to the border."""

    def __init__(self, dimensions: int, mean: Floats | None, sigma: float, population: int, *, diagonal: bool = False) -> None:
        from cmaes import CMA, SepCMA

        width = max(2, dimensions)  # the library wants two dimensions at least; a second one that nobody reads does no harm
        start = np.full(width, 0.5)
        if mean is not None:
            start[:dimensions] = mean
        bounds = np.tile([0.0, 1.0], (width, 1))
        made = SepCMA if diagonal else CMA
        self._optimiser = made(start, sigma, bounds=bounds, n_max_resampling=10 * width, seed=0, population_size=population)
        self._dimensions = dimensions
        self.kind = "diagonal" if diagonal else "full"

    def reseed(self, seed: int) -> None:
        self._optimiser.reseed_rng(seed)

    def ask(self) -> Sample:
        x = self._optimiser.ask()
        return Sample(x[: self._dimensions], x)

    def tell(self, samples: Sequence[tuple[Sample, float]]) -> None:
        self._optimiser.tell([(sample.solution, -value) for sample, value in samples])

    def collapsed(self) -> bool:
        return bool(self._optimiser.should_stop())


class Mixed:
    """Numbers, whole numbers and choices in one distribution: CatCMA with margin (arXiv 2504.07884).

    Whole numbers keep a chance of changing however narrow the distribution becomes; every choice has chances of its values.
    """

    kind = "mixed"

    def __init__(self, space: Space, mean: Floats | None, sigma: float, population: int) -> None:
        from cmaes import CatCMAwM

        self._places: list[tuple[str, int, int]] = []  # (kind, first coordinate, how many or of how many values)
        x_mean, z_mean, z_space, chances = [], [], [], []
        middle = np.full(space.dimensions, 0.5) if mean is None else mean
        at = 0
        for parameter in space.parameters:
            size = _values(parameter)
            if size is None:
                self._places.append(("x", at, parameter.width))
                x_mean += middle[at : at + parameter.width].tolist()
            elif size > 1:  # one value is no choice: its coordinate stays in the middle
                start = min(int(middle[at] * size), size - 1)
                if isinstance(parameter, Int) and size > 2:
                    self._places.append(("z", at, size))
                    z_space.append([(value + 0.5) / size for value in range(size)])
                    z_mean.append(z_space[-1][start])
                else:
                    self._places.append(("c", at, size))
                    weights = np.full(size, 1 / size)
                    if mean is not None:
                        weights = np.full(size, (1 - _START) / (size - 1))
                        weights[start] = _START
                    chances.append(weights)
            at += parameter.width
        self._dimensions = at
        widest = max(map(len, chances), default=0)
        given: dict[str, Any] = {}
        if x_mean or z_mean:
            given |= {"mean": np.array([*x_mean, *z_mean]), "sigma": sigma}
        if x_mean:
            given["x_space"] = [[0.0, 1.0]] * len(x_mean)
        if z_space:
            given["z_space"] = z_space
        if chances:
            given |= {
                "c_space": [len(weights) for weights in chances],
                "cat_param": np.stack([np.pad(weights, (0, widest - len(weights))) for weights in chances]),
            }
        self._optimiser = CatCMAwM(population_size=population, seed=0, **given)
        self._gaussian = bool(x_mean or z_mean)

    def reseed(self, seed: int) -> None:
        self._optimiser.reseed_rng(seed)

    def ask(self) -> Sample:
        solution = self._optimiser.ask()
        point = np.full(self._dimensions, 0.5)
        x, z, c = 0, 0, 0
        for kind, at, size in self._places:
            if kind == "x":
                point[at : at + size] = solution.x[x : x + size]
                x += size
            elif kind == "z":
                point[at] = solution.z[z]
                z += 1
            else:
                point[at] = (int(np.argmax(solution.c[c])) + 0.5) / size
                c += 1
        return Sample(point, solution)

    def tell(self, samples: Sequence[tuple[Sample, float]]) -> None:
        self._optimiser.tell([(sample.solution, -value) for sample, value in samples])

    def collapsed(self) -> bool:
        return self._gaussian and not any(kind == "c" for kind, _, _ in self._places) and bool(self._optimiser.should_stop())


def _values(parameter: Any) -> int | None:
    """How many values a parameter has; None for numbers."""
    if isinstance(parameter, Choice):
        return len(parameter.values)
    return parameter.high - parameter.low + 1 if isinstance(parameter, Int) else None
