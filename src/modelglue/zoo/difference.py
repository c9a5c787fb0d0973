"""Where two models differ: norms, cosine and changed elements of every tensor, in one pass over both."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property, reduce
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from modelglue.checkpoint import Checkpoint
from modelglue.checkpoint.engine.workers import run_tasks
from modelglue.checkpoint.protocol import PACKED_BITS
from modelglue.checkpoint.tensor_names import ROLES, Layer, layer_of, role_of
from modelglue.errors import UserError
from modelglue.settings import BLOCK_ELEMENTS, SMALL_OUTPUT_BYTES, default_workers

if TYPE_CHECKING:
    import torch

#: elements that are read at once; a multiple of the blocks in which sums are taken, so that results do not depend on it
_PIECE = 16 * BLOCK_ELEMENTS
#: elements of one task of a worker, when tensors are small enough to be bundled
_TASK = 2**23


class Sums(NamedTuple):
    """What is summed over elements; sums of tensors are sums of their sums."""

    numel: int = 0
    changed: int = 0
    """Elements whose bits differ (whose values differ, where the dtypes do)."""
    not_finite: int = 0
    """Elements that are NaN or infinite in one of the two; they are changed or not, but in no norm."""
    difference: float = 0.0
    """Sum of (b - a)^2."""
    a: float = 0.0
    b: float = 0.0
    largest: float = 0.0
    """Largest |b - a|."""

    def plus(self, other: Sums) -> Sums:
        return Sums(
            self.numel + other.numel,
            self.changed + other.changed,
            self.not_finite + other.not_finite,
            self.difference + other.difference,
            self.a + other.a,
            self.b + other.b,
            max(self.largest, other.largest),
        )

    @property
    def norm(self) -> float:
        """|b - a|"""
        return math.sqrt(self.difference)

    @property
    def relative(self) -> float:
        """|b - a| / |a|; NaN if a is zero and b is not."""
        return self.norm / math.sqrt(self.a) if self.a else (0.0 if not self.difference else math.nan)

    @property
    def cosine(self) -> float:
        """Of a and b; NaN if one of them is zero."""
        if not self.changed and self.a:
            return 1.0
        if not self.a or not self.b:
            return math.nan
        dot = (self.a + self.b - self.difference) / 2
        return max(-1.0, min(1.0, dot / math.sqrt(self.a) / math.sqrt(self.b)))

    @property
    def changed_share(self) -> float:
        return self.changed / self.numel if self.numel else 0.0

    def to_json(self) -> dict[str, Any]:
        def number(value: float) -> float | None:
            return value if math.isfinite(value) else None

        return {
            "elements": self.numel, "changed": self.changed, "changed_share": self.changed_share, "not_finite": self.not_finite,
            "norm": number(self.norm), "relative": number(self.relative), "cosine": number(self.cosine), "largest": self.largest,
        }  # fmt: skip


@dataclass(frozen=True)
class TensorDifference:
    """One tensor that both models have in one shape."""

    name: str
    shape: tuple[int, ...]
    dtypes: tuple[str, str]
    sums: Sums

    @cached_property
    def layer(self) -> Layer | None:
        return layer_of(self.name)

    @cached_property
    def role(self) -> str:
        return role_of(self.name)


@dataclass(frozen=True)
class Difference:
    """Where models a and b differ. `tensors` are sorted by name; the rest is what could not be compared."""

    labels: tuple[str, str]
    tensors: tuple[TensorDifference, ...]
    only_a: tuple[str, ...]
    only_b: tuple[str, ...]
    shapes: tuple[tuple[str, tuple[int, ...], tuple[int, ...]], ...]
    """Tensors of one name and two shapes."""
    packed: tuple[str, ...] = ()
    """Tensors whose dtype packs several numbers into a byte, which are not read."""

    @cached_property
    def total(self) -> Sums:
        return _added(tensor.sums for tensor in self.tensors)

    @cached_property
    def roles(self) -> dict[str, Sums]:
        """Sums by role, for the roles that there are, in the order of ROLES."""
        found: dict[str, Sums] = {}
        for one in self.tensors:
            found[one.role] = found.get(one.role, Sums()).plus(one.sums)
        return {role: found[role] for role in ROLES if role in found}

    @cached_property
    def layers(self) -> dict[Layer | None, dict[str, Sums]]:
        """Sums by layer and role; layers in order, stack after stack, and None, for what stands in no layer, at the end."""
        found: dict[Layer | None, dict[str, Sums]] = {}
        for one in self.tensors:
            roles = found.setdefault(one.layer, {})
            roles[one.role] = roles.get(one.role, Sums()).plus(one.sums)
        return {layer: found[layer] for layer in sorted(found, key=lambda layer: (layer is None, layer or ("", 0)))}

    @property
    def identical(self) -> bool:
        """Whether both models have the same tensors in the same dtypes with the same bits."""
        unpaired = self.only_a or self.only_b or self.shapes or self.packed
        return not unpaired and all(not one.sums.changed and one.dtypes[0] == one.dtypes[1] for one in self.tensors)

    @property
    def warnings(self) -> tuple[str, ...]:
        """What was not compared, or not bit by bit, in words."""
        a, b = self.labels
        found = [
            f"tensor '{name}' is {_shape(ours)} in {a} and {_shape(theirs)} in {b}: not compared." for name, ours, theirs in self.shapes
        ]
        for label, other, names in ((a, b, self.only_a), (b, a, self.only_b)):
            if names:
                found.append(f"{len(names)} tensors of {label} are not in {other}: {_some(names)}.")
        if self.packed:
            found.append(f"{len(self.packed)} tensors pack several numbers into a byte and are not compared: {_some(self.packed)}.")
        retyped = [one for one in self.tensors if one.dtypes[0] != one.dtypes[1]]
        if retyped:
            kinds = ", ".join(sorted({" and ".join(one.dtypes) for one in retyped}))
            found.append(
                f"{len(retyped)} tensors differ in dtype ({kinds}); there, values are compared: {_some([x.name for x in retyped])}."
            )
        bad = [one for one in self.tensors if one.sums.not_finite]
        found += [f"tensor '{one.name}' holds {one.sums.not_finite} values that are NaN or infinite; no norm counts them." for one in bad]
        return tuple(found)

    def to_json(self) -> dict[str, Any]:
        return {
            "a": self.labels[0],
            "b": self.labels[1],
            "identical": self.identical,
            "total": self.total.to_json(),
            "roles": {role: sums.to_json() for role, sums in self.roles.items()},
            "layers": [
                {"stack": layer and layer.stack, "layer": layer and layer.number, "roles": {r: s.to_json() for r, s in roles.items()}}
                for layer, roles in self.layers.items()
            ],
            "tensors": [
                {"name": one.name, "shape": list(one.shape), "dtypes": list(one.dtypes), "role": one.role, **one.sums.to_json()}
                for one in self.tensors
            ],
            "only_a": list(self.only_a),
            "only_b": list(self.only_b),
            "shapes": [{"name": name, "a": list(ours), "b": list(theirs)} for name, ours, theirs in self.shapes],
            "packed": list(self.packed),
            "warnings": list(self.warnings),
        }


def diff(
    a: Checkpoint,
    b: Checkpoint,
    *,
    labels: Sequence[str] = ("a", "b"),
    workers: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Difference:
    """Compare two models tensor by tensor; what only one of them has, or has in another shape, is listed and no error.

    Sums are taken in float64 in blocks of 65,536 elements in index order, so the result does not depend on `workers`. Every byte of
    both is read once; memory is a few MB per worker, whatever the models' size (an expression that must compute a tensor as a whole holds
    that tensor). `progress(done, total)` counts bytes. UserError if the two have no tensor in common.
    """
    ours, theirs = set(a.names()), set(b.names())
    common = sorted(ours & theirs)
    if not common:
        raise UserError(f"{labels[0]} and {labels[1]} have no tensor name in common: there is nothing to compare.")
    packed = tuple(name for name in common if {a.info(name).dtype, b.info(name).dtype} & PACKED_BITS.keys())
    readable = [name for name in common if name not in set(packed)]
    same = [name for name in readable if a.info(name).shape == b.info(name).shape]
    shapes = tuple((name, a.info(name).shape, b.info(name).shape) for name in readable if a.info(name).shape != b.info(name).shape)
    total = sum(a.info(name).nbytes + b.info(name).nbytes for name in same)
    for checkpoint in (a, b):
        checkpoint.prepare(same)
    if workers is None:
        workers = 1 if total < 2 * SMALL_OUTPUT_BYTES else default_workers()
    found: dict[tuple[str, int], Sums] = {}
    done = 0

    def on_done(task: _Task, result: list[Sums]) -> None:
        nonlocal done
        for (name, start, stop), sums in zip(task, result, strict=True):
            found[name, start] = sums
            done += sum((stop - start) * one.info(name).nbytes // max(one.info(name).numel, 1) for one in (a, b))
        if progress is not None:
            progress(done, total)

    tasks = _tasks(a, b, same)
    run_tasks(_compare, (a, b), tasks, workers=workers, on_done=on_done)
    sums: dict[str, Sums] = dict.fromkeys(same, Sums())
    for task in tasks:  # in index order, whoever was first
        for name, start, _ in task:
            sums[name] = sums[name].plus(found[name, start])
    compared = [TensorDifference(name, a.info(name).shape, (a.info(name).dtype, b.info(name).dtype), sums[name]) for name in same]
    names = (labels[0], labels[1])
    return Difference(names, tuple(compared), tuple(sorted(ours - theirs)), tuple(sorted(theirs - ours)), shapes, packed)


#: pieces of tensors, (name, start, stop) in elements
_Task = tuple[tuple[str, int, int], ...]


def _tasks(a: Checkpoint, b: Checkpoint, names: Sequence[str]) -> list[_Task]:
    """Bundles of about equal size; a tensor that one of the two must compute as a whole is one piece."""
    bundles: list[list[tuple[str, int, int]]] = [[]]
    filled = 0
    for name in names:
        numel = a.info(name).numel
        step = _PIECE if a.splittable(name) and b.splittable(name) else max(numel, 1)
        for start in range(0, numel, step):
            if filled >= _TASK:
                bundles.append([])
                filled = 0
            stop = min(start + step, numel)
            bundles[-1].append((name, start, stop))
            filled += stop - start
    return [tuple(bundle) for bundle in bundles if bundle]


def _compare(state: tuple[Checkpoint, Checkpoint], task: _Task) -> list[Sums]:
    """The sums of every piece. Runs in a worker."""
    a, b = state
    found = []
    for name, start, stop in task:
        A, B = a.read(name, start, stop), b.read(name, start, stop)
        blocks = [slice(at, at + BLOCK_ELEMENTS) for at in range(0, stop - start, BLOCK_ELEMENTS)]
        found.append(_added(_block(A[block], B[block]) for block in blocks))
    return found


def _block(A: torch.Tensor, B: torch.Tensor) -> Sums:
    """Doubles hold every dtype exactly but 64-bit integers above 2^53."""
    import torch

    numel = A.numel()
    alike = A.dtype == B.dtype
    changed = 0
    if alike:
        bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[A.element_size()]
        changed = int(np.count_nonzero(A.view(bits).numpy() != B.view(bits).numpy()))
    A, B = (torch.view_as_real(X).reshape(-1).double() if X.is_complex() else X.double() for X in (A, B))
    if not alike:
        changed = int(torch.count_nonzero(~((A == B) | (A.isnan() & B.isnan()))))
    own = float(A.dot(A))
    if not changed and math.isfinite(own):
        return Sums(numel, 0, 0, 0.0, own, own, 0.0)
    D = B - A
    difference, other = float(D.dot(D)), float(B.dot(B))
    not_finite = 0
    if not math.isfinite(difference + own + other):
        bad = ~(torch.isfinite(A) & torch.isfinite(B))
        not_finite = int(bad.sum())
        A, B, D = (X.masked_fill(bad, 0.0) for X in (A, B, D))
        difference, own, other = float(D.dot(D)), float(A.dot(A)), float(B.dot(B))
    low, high = torch.aminmax(D)
    return Sums(numel, changed, not_finite, difference, own, other, max(-float(low), float(high)))


def _added(sums: Iterable[Sums]) -> Sums:
    return reduce(Sums.plus, sums, Sums())


def _shape(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape)) or "a scalar"


def _some(names: Sequence[str], count: int = 4) -> str:
    more = f" and {len(names) - count} more" if len(names) > count else ""
    return ", ".join(f"'{name}'" for name in names[:count]) + more
