"""Model kinship: how related the changes are that two models made to their common base.

arXiv 2410.12613. Early in a chain of merges low kinship promises gains; when the best models are close kin, progress has stopped.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeAlias, get_args

import numpy as np
from numpy.typing import NDArray

from modelglue.checkpoint import FLOATING
from modelglue.errors import CheckpointError, UserError, did_you_mean
from modelglue.settings import BLOCK_ELEMENTS

if TYPE_CHECKING:
    from modelglue.checkpoint import Checkpoint

Floats: TypeAlias = NDArray[np.float64]
Metric: TypeAlias = Literal["pcc", "cs", "ed"]
METRICS: tuple[str, ...] = get_args(Metric)

#: a variance below this share of the mean square is rounding
_ROUNDING = 1e-13
#: steps from 0 to the largest change in the low-precision variant
_STEPS = 127


@dataclass(frozen=True, eq=False)
class ChangeSums:
    """What is gathered of the changes in one pass: per tensor (first axis) sums over its elements, for n models."""

    count: Floats
    """[tensors]: elements."""
    total: Floats
    """[tensors, n]: sum of d_i."""
    product: Floats
    """[tensors, n, n]: sum of d_i d_j."""
    distance: Floats
    """[tensors, n, n]: sum of (d_i - d_j)^2."""

    def only(self, chosen: Sequence[int]) -> ChangeSums:
        rows = np.array(chosen, dtype=np.int64)
        return ChangeSums(self.count[rows], self.total[rows], self.product[rows], self.distance[rows])


@dataclass(frozen=True, eq=False)
class Kinship:
    """Kinship of n models, of any part of their tensors and by any metric; everything is computed from the same sums.

    Metrics: `pcc` Pearson correlation, `cs` cosine, `ed` Euclidean distance of the changes. A model that did not change has no
    direction: NaN in pcc and cs, and named in `warnings`.
    """

    labels: tuple[str, ...]
    tensors: tuple[str, ...]
    sums: ChangeSums
    warnings: tuple[str, ...] = ()

    def matrix(self, metric: Metric = "pcc", *, absolute: bool = False, part: str = "") -> Floats:
        """[n, n] over all tensors whose name holds `part`, concatenated. `absolute` takes opposite changes for related ones."""
        found = _metric(metric, _summed(self.sums.only(self._chosen(part))))[0]
        return np.asarray(np.abs(found) if absolute else found)

    def by_tensor(self, metric: Metric = "pcc", *, absolute: bool = False, part: str = "") -> Floats:
        """[n, n]: the metric of each tensor for itself, averaged in proportion to their elements; tensors without a value are left out."""
        sums = self.sums.only(self._chosen(part))
        values = _metric(metric, sums)
        values = np.abs(values) if absolute else values
        weight = np.where(np.isnan(values), 0.0, sums.count[:, None, None])
        with np.errstate(invalid="ignore"):
            return np.asarray(np.nansum(values * weight, axis=0) / weight.sum(axis=0))

    def of_tensors(self, metric: Metric = "pcc", *, absolute: bool = False) -> dict[str, Floats]:
        """[n, n] for every tensor."""
        values = _metric(metric, self.sums)
        return dict(zip(self.tensors, np.abs(values) if absolute else values, strict=True))

    def mean(self, metric: Metric = "pcc", *, absolute: bool = False, part: str = "") -> float:
        """Average over pairs of different models; NaN if a pair has none."""
        if len(self.labels) < 2:
            raise UserError("kinship is between two models or more.")
        return float(self.matrix(metric, absolute=absolute, part=part)[np.triu_indices(len(self.labels), k=1)].mean())

    def farthest(self, model: int, metric: Metric = "pcc") -> int:
        """The model of lowest kinship to this one (the most distant, for `ed`); the first on ties. UserError if there is none."""
        row = self.matrix(metric)[model].copy()
        row[model] = np.nan
        if np.isnan(row).all():
            raise UserError(f"'{self.labels[model]}' has no kinship to any other model: {' '.join(self.warnings)}")
        return int(np.nanargmax(row) if metric == "ed" else np.nanargmin(row))

    def _chosen(self, part: str) -> list[int]:
        chosen = [number for number, name in enumerate(self.tensors) if part in name]
        if not chosen:
            raise UserError(f"no tensor has '{part}' in its name.{did_you_mean(part, self.tensors)}")
        return chosen


def kinship(
    base: Checkpoint,
    models: Sequence[Checkpoint],
    *,
    labels: Sequence[str] | None = None,
    low_precision: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Kinship:
    """Compare what models changed in their base, over all weights that the base and all models have.

    Where a vocabulary was extended, rows beyond the shortest are cut. `low_precision` first rounds every model's change to 127 steps
    up to its largest element, which takes a second pass. Adapters count by what they add to the weights.

    Every tensor is read once, in blocks of 65,536 elements, and summed in float64 in one order whatever the machine: time n^2 operations
    per element, memory 512 kB per model. `progress(done, total)` counts elements. CheckpointError for NaN, for shapes that differ in
    more than rows, and where nothing is common.
    """
    names = [f"model {number}" for number in range(len(models))] if labels is None else list(labels)
    if not models or len(names) != len(models):
        raise UserError(f"{len(models)} models and {len(names)} labels; allowed is a model or more, and a label for each.")
    plan, warnings = _plan(base, models, names)
    for checkpoint in (base, *models):
        checkpoint.prepare([name for name, _ in plan])
    total, done = sum(size for _, size in plan), 0
    scale = _largest(base, models, names, plan) / _STEPS if low_precision else None
    sums = ChangeSums(np.array([size for _, size in plan], dtype=np.float64), *(np.zeros((len(plan), *shape)) for shape in _shapes(models)))
    for number, (name, size) in enumerate(plan):
        for start in range(0, size, BLOCK_ELEMENTS):
            change = _changes(base, models, name, start, min(start + BLOCK_ELEMENTS, size))
            if scale is not None:
                change = np.round(change / scale[:, None])
            with np.errstate(invalid="ignore", over="ignore"):  # refused below
                _add(sums, number, change)
            done += change.shape[1]
            if progress is not None:
                progress(done, total)
        _refuse_nan(sums.product[number], names, name)
    unchanged = [label for label, square in zip(names, np.diagonal(sums.product.sum(axis=0)), strict=True) if square == 0]
    warnings += [f"{label}: is identical to the base, so it has no kinship to anyone." for label in unchanged]
    return Kinship(tuple(names), tuple(name for name, _ in plan), sums, tuple(warnings))


def _shapes(models: Sequence[Checkpoint]) -> tuple[tuple[int, ...], ...]:
    count = len(models)
    return (count,), (count, count), (count, count)


def _plan(base: Checkpoint, models: Sequence[Checkpoint], labels: Sequence[str]) -> tuple[list[tuple[str, int]], list[str]]:
    """(tensor, elements that everybody has) in order, and what is left out."""
    everybody = (base, *models)
    common = set(base.names()).intersection(*(model.names() for model in models))
    left_out = sorted(set().union(*(one.names() for one in everybody)) - common)
    plan, cut, other, faults = [], [], [], []
    for name in sorted(common):
        infos = [one.info(name) for one in everybody]
        if any(info.dtype not in FLOATING for info in infos):
            other.append(name)
            continue
        if any(len(info.shape) != len(infos[0].shape) or info.shape[1:] != infos[0].shape[1:] for info in infos):
            shapes = ", ".join(f"{label} {list(info.shape)}" for label, info in zip(("the base", *labels), infos, strict=True))
            faults.append(f"tensor '{name}': {shapes}; kinship needs equal shapes, rows at the end excepted.")
            continue
        size = min(info.numel for info in infos)
        if any(info.numel != size for info in infos):
            cut.append(name)
        if size:
            plan.append((name, size))
    if faults:
        raise CheckpointError("\n".join(faults))
    if not plan:
        raise CheckpointError("the base and the models have no weights in common, so there is no kinship.")
    warnings = [f"{len(left_out)} tensors are not in all models and left out: {_some(left_out)}."] if left_out else []
    if other:
        warnings.append(f"{len(other)} tensors are not stored as floating-point numbers and left out: {_some(other)}.")
    if cut:
        warnings.append(f"rows beyond the shortest are cut in {_some(cut)}.")
    return plan, warnings


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _changes(base: Checkpoint, models: Sequence[Checkpoint], name: str, start: int, stop: int) -> Floats:
    """[n, elements]: float64 differences of the stored numbers, which are exact but for a last bit."""
    change = np.empty((len(models), stop - start))
    origin = base.read(name, start, stop).double().numpy()
    for row, model in zip(change, models, strict=True):
        with np.errstate(invalid="ignore"):
            np.subtract(model.read(name, start, stop).double().numpy(), origin, out=row)
    return change


def _add(sums: ChangeSums, number: int, change: Floats) -> None:
    """Sums of one block; numpy adds pairwise and in one thread, so they are the same everywhere."""
    sums.total[number] += change.sum(axis=1)
    for i, row in enumerate(change):
        products = (change[i:] * row).sum(axis=1)
        distances = ((change[i:] - row) ** 2).sum(axis=1)
        sums.product[number, i, i:] += products
        sums.distance[number, i, i:] += distances
        sums.product[number, i + 1 :, i] += products[1:]
        sums.distance[number, i + 1 :, i] += distances[1:]


def _largest(base: Checkpoint, models: Sequence[Checkpoint], labels: Sequence[str], plan: Sequence[tuple[str, int]]) -> Floats:
    """[n]: the largest absolute change of each model, 1 where there is none."""
    largest = np.zeros(len(models))
    for name, size in plan:
        for start in range(0, size, BLOCK_ELEMENTS):
            largest = np.maximum(largest, np.abs(_changes(base, models, name, start, min(start + BLOCK_ELEMENTS, size))).max(axis=1))
        _refuse_nan(np.diag(largest), labels, name)
    return np.where(largest > 0, largest, 1.0)


def _refuse_nan(products: Floats, labels: Sequence[str], name: str) -> None:
    bad = [label for label, square in zip(labels, np.diagonal(products), strict=True) if not np.isfinite(square)]
    if bad:
        raise CheckpointError(
            f"{', '.join(bad)}: tensor '{name}' holds NaN or infinity, there or in the base. Leave the model out, or restore its weights."
        )


def _summed(sums: ChangeSums) -> ChangeSums:
    """All tensors as one."""
    return ChangeSums(*(part.sum(axis=0, keepdims=True) for part in (sums.count, sums.total, sums.product, sums.distance)))


def _metric(metric: str, sums: ChangeSums) -> Floats:
    """[tensors, n, n]."""
    if metric not in METRICS:
        raise UserError(f"kinship '{metric}'.{did_you_mean(metric, METRICS)} Allowed: {', '.join(METRICS)}.")
    if metric == "ed":
        return np.sqrt(sums.distance)
    product = sums.product
    if metric == "pcc":
        means = sums.total / sums.count[:, None]
        product = product - sums.count[:, None, None] * (means[:, :, None] * means[:, None, :])
    squares = np.diagonal(product, axis1=1, axis2=2)
    own = np.diagonal(sums.product, axis1=1, axis2=2)
    usable = squares > _ROUNDING * own
    norms = np.sqrt(np.where(usable, squares, np.nan))
    return np.asarray(np.clip(product / (norms[:, :, None] * norms[:, None, :]), -1.0, 1.0))
