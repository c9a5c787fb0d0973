"""What adapters do to one tensor of a base: replace it, add to it, replace rows of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from modelglue.checkpoint.adapter.folder import Adapter, Factors, Part, Update
from modelglue.checkpoint.protocol import TensorInfo

#: how B A is laid on the tensor: as it is (o, i), transposed (i, o), or per expert of a stack (E, o, i) or (E, i, o)
Layout = Literal["plain", "transposed", "experts", "experts_transposed"]


@dataclass(frozen=True)
class LowRank:
    """scale * B A is added; with a magnitude the rows (or columns, where B A lies transposed) then get these norms."""

    adapter: Adapter
    update: Update
    scale: float
    layout: Layout
    part: Part | None = None

    def factors(self) -> Factors:
        return self.adapter.factors(self.update.name, self.scale, self.part)


@dataclass(frozen=True)
class Shift:
    """scale * values is added: the bias that was trained with a low-rank update."""

    adapter: Adapter
    key: str
    scale: float


@dataclass(frozen=True)
class Rows:
    """These rows are replaced."""

    adapter: Adapter
    key: str
    rows: tuple[int, ...]


@dataclass(frozen=True)
class Change:
    """All that happens to one tensor, in the order of the fields. `origin`: the tensor of the base that it starts from."""

    info: TensorInfo
    origin: str | None
    replaced: tuple[Adapter, str] | None = None
    added: tuple[LowRank | Shift, ...] = ()
    rows: tuple[Rows, ...] = ()

    @property
    def norms_columns(self) -> bool:
        """Whether a norm runs over the whole tensor, so that no row can be computed without reading all of them."""
        return any(isinstance(one, LowRank) and one.update.magnitude is not None and one.layout == "transposed" for one in self.added)


def equal_changes(one: Change, other: Change) -> bool:
    """Whether two tied tensors change alike, read from the adapters."""
    import torch

    if one.info != other.info or (one.replaced is None) != (other.replaced is None) or len(one.added) != len(other.added):
        return False
    if one.replaced is not None and other.replaced is not None:
        (first, key), (second, other_key) = one.replaced, other.replaced
        if first.info(key) != second.info(other_key) or not torch.equal(first.read(key), second.read(other_key)):
            return False
    if [rows.rows for rows in one.rows] != [rows.rows for rows in other.rows]:
        return False
    pairs = zip(one.rows, other.rows, strict=True)
    if not all(torch.equal(ours.adapter.read(ours.key), theirs.adapter.read(theirs.key)) for ours, theirs in pairs):
        return False
    return all(_equal_updates(ours, theirs) for ours, theirs in zip(one.added, other.added, strict=True))


def _equal_updates(one: LowRank | Shift, other: LowRank | Shift) -> bool:
    import torch

    if not isinstance(one, LowRank) or not isinstance(other, LowRank) or one.scale != other.scale:
        return False
    if one.update.magnitude or other.update.magnitude:
        return False
    sides = []
    for low_rank in (one, other):
        factors = low_rank.factors()
        sides.append((factors.A.t(), factors.B.t()) if low_rank.layout == "transposed" else (factors.B, factors.A))
    return all(ours.shape == theirs.shape and torch.equal(ours, theirs) for ours, theirs in zip(*sides, strict=True))
