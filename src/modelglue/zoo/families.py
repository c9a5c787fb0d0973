"""Cluster a zoo into families whose members may be merged with each other.

The requirement is that every pair inside a family is more similar than the threshold (strictly); the number of families
follows from the data. Complete linkage guarantees it. The published code's leader rule and single linkage do not.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from itertools import combinations
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from modelglue.errors import UserError, did_you_mean

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

Linkage = Literal["complete", "leader", "single"]
Matrix = NDArray[np.float64]

#: a weakest inner and a strongest outer pair closer than this: the threshold decides by a hair
HAIR = 0.02


@dataclass(frozen=True)
class Pair:
    """Two models and how similar they are; None: not comparable."""

    models: tuple[str, str]
    similarity: float | None

    def to_json(self) -> dict[str, Any]:
        return {"models": list(self.models), "similarity": self.similarity}


@dataclass(frozen=True)
class Family:
    """Members in zoo order; the pair that holds it together least (None for a family of one)."""

    id: int
    members: tuple[str, ...]
    weakest_pair: Pair | None


@dataclass(frozen=True)
class Families:
    """A partition of the zoo: largest family first, equal sizes by their first member."""

    threshold: float
    linkage: str
    families: tuple[Family, ...]
    strongest_across: Pair | None
    warnings: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """JSON-ready; the content of families.json."""
        return {
            "threshold": self.threshold,
            "linkage": self.linkage,
            "families": [
                {**asdict(family), "members": list(family.members), "weakest_pair": _json(family.weakest_pair)} for family in self.families
            ],
            "strongest_across": _json(self.strongest_across),
            "warnings": list(self.warnings),
        }


def find_families(
    matrix: Matrix,
    *,
    threshold: float = 0.95,
    linkage: Linkage = "complete",
    groups: Sequence[Sequence[int]] | None = None,
    labels: Sequence[str] | None = None,
) -> Families:
    """Families of a zoo from its similarity matrix [n, n] (float64, NaN: not comparable, below every threshold).

    `groups` are index lists inside which families may form (see `modelglue.zoo.groups`); default: one group of all.
    `complete` joins, as long as it can, the two clusters whose weakest pair is strongest (ties: smallest member index).
    `leader` puts each model, in zoo order, into the first family whose first member is similar enough. `single` takes
    connected components.
    Time O(n^3), a few hundred models at most.
    """
    matrix = np.asarray(matrix, dtype=np.float64)
    count = len(matrix)
    names = [str(number) for number in range(count)] if labels is None else list(labels)
    _check(matrix, threshold, linkage, names)
    parts = [list(range(count))] if groups is None else [sorted(group) for group in groups]
    if sorted(index for part in parts for index in part) != list(range(count)):
        raise UserError(f"the groups {parts} are no partition of the {count} models.")
    comparable = np.where(np.isnan(matrix), -np.inf, matrix)
    clusters = [cluster for part in parts for cluster in _LINKAGES[linkage](comparable, part, threshold)]
    clusters = sorted((sorted(cluster) for cluster in clusters), key=lambda cluster: (-len(cluster), cluster[0]))

    def pair(indices: tuple[int, int] | None) -> Pair | None:
        if indices is None:
            return None
        a, b = indices
        return Pair((names[a], names[b]), None if np.isnan(matrix[a, b]) else float(matrix[a, b]))

    def value(indices: tuple[int, int]) -> float:
        return float(comparable[indices])

    weakest = [min(combinations(cluster, 2), key=value, default=None) for cluster in clusters]
    home = {index: number for number, cluster in enumerate(clusters) for index in cluster}
    group = {index: number for number, part in enumerate(parts) for index in part}
    across = [pair for pair in combinations(range(count), 2) if home[pair[0]] != home[pair[1]] and value(pair) > -np.inf]
    warnings = _warnings([found for found in weakest if found is not None], across, value, threshold, group, names)
    return Families(
        threshold,
        linkage,
        tuple(
            Family(number, tuple(names[index] for index in cluster), pair(weak))
            for number, (cluster, weak) in enumerate(zip(clusters, weakest, strict=True))
        ),
        pair(max(across, key=value, default=None)),
        tuple(warnings),
    )


def _complete(matrix: Matrix, part: list[int], threshold: float) -> list[list[int]]:
    clusters = [[index] for index in part]
    link = matrix[np.ix_(part, part)].copy()  # weakest pair between two clusters; only a < b counts
    link[np.tril_indices(len(part))] = -np.inf
    while len(clusters) > 1:
        # clusters stay sorted by their smallest member, so the first of equal maxima is the one the tie rule wants
        a, b = divmod(int(link.argmax()), len(clusters))
        if link[a, b] <= threshold:
            break
        both = np.maximum(link, link.T)
        joined = np.minimum(both[a], both[b])
        link[a, a + 1 :] = joined[a + 1 :]
        link[:a, a] = joined[:a]
        link = np.delete(np.delete(link, b, axis=0), b, axis=1)
        clusters[a] += clusters.pop(b)
    return clusters


def _leader(matrix: Matrix, part: list[int], threshold: float) -> list[list[int]]:
    clusters: list[list[int]] = []
    for index in part:
        home = next((cluster for cluster in clusters if matrix[cluster[0], index] > threshold), None)
        if home is None:
            clusters.append([index])
        else:
            home.append(index)
    return clusters


def _single(matrix: Matrix, part: list[int], threshold: float) -> list[list[int]]:
    clusters: list[list[int]] = []
    for index in part:
        near = [cluster for cluster in clusters if any(matrix[member, index] > threshold for member in cluster)]
        clusters = [cluster for cluster in clusters if cluster not in near]
        clusters.append([member for cluster in near for member in cluster] + [index])
    return clusters


_LINKAGES: dict[str, Callable[[Matrix, list[int], float], list[list[int]]]] = {
    "complete": _complete,
    "leader": _leader,
    "single": _single,
}


def _warnings(
    inside: Sequence[tuple[int, int]],
    across: Sequence[tuple[int, int]],
    value: Callable[[tuple[int, int]], float],
    threshold: float,
    group: dict[int, int],
    names: Sequence[str],
) -> list[str]:
    found = []

    def show(pair: tuple[int, int]) -> str:
        return f"'{names[pair[0]]}' and '{names[pair[1]]}' ({value(pair):.4f})"

    found += [
        f"{show(pair)} are in one family although their similarity is not above {threshold}. Use linkage: complete."
        for pair in inside
        if value(pair) <= threshold
    ]
    weakest = min(inside, key=value, default=None)
    strongest = max((pair for pair in across if group[pair[0]] == group[pair[1]]), key=value, default=None)
    if weakest is not None and strongest is not None and value(weakest) - value(strongest) < HAIR:
        found.append(
            f"the threshold {threshold} decides by a hair: the weakest pair inside a family is {show(weakest)}, "
            f"the strongest pair across families {show(strongest)}. Look at the matrix before trusting the families."
        )
    apart = max((pair for pair in across if group[pair[0]] != group[pair[1]]), key=value, default=None)
    if apart is not None and value(apart) > threshold:
        found.append(
            f"{show(apart)} are similar enough for one family, but their tensors, configs or vocabularies differ, so they stay apart."
        )
    return found


def _check(matrix: Matrix, threshold: float, linkage: str, names: Sequence[str]) -> None:
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1] or not len(matrix):
        raise UserError(f"the similarity matrix has shape {matrix.shape}; allowed is [n, n] with n from 1.")
    if not np.allclose(matrix, matrix.T, rtol=0, atol=1e-9, equal_nan=True):
        raise UserError("the similarity matrix is not symmetric. Give the matrix that `similarity` made.")
    if len(names) != len(matrix):
        raise UserError(f"{len(names)} labels for {len(matrix)} models; give one label per model.")
    if not -1 < threshold < 1:
        raise UserError(f"threshold is {threshold}; allowed is a number between -1 and 1.")
    if linkage not in _LINKAGES:
        raise UserError(f"linkage is '{linkage}'; allowed are {', '.join(_LINKAGES)}.{did_you_mean(linkage, _LINKAGES)}")


def _json(pair: Pair | None) -> dict[str, Any] | None:
    return None if pair is None else pair.to_json()
