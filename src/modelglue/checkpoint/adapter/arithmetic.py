"""The arithmetic of adapted tensors, in fixed blocks of rows: float32 products (float64 for float64 bases), one sum, norms in float64."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from modelglue.checkpoint.adapter.changes import Change, LowRank
from modelglue.errors import CheckpointError
from modelglue.settings import BLOCK_ELEMENTS

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Grid:
    """A tensor as rows, and the fixed blocks of rows in which products are taken: equal blocks give equal bits."""

    rows: int
    width: int
    #: blocks never cross the border of an expert
    experts: int

    @staticmethod
    def of(change: Change) -> Grid:
        shape = change.info.shape
        if len(shape) < 2:
            return Grid(change.info.numel, 1, 1)
        if any(isinstance(one, LowRank) and one.layout.startswith("experts") for one in change.added):
            return Grid(shape[0] * shape[1], shape[2], shape[0])
        return Grid(shape[0], change.info.numel // max(shape[0], 1), 1)

    def blocks(self, first: int, last: int) -> list[tuple[int, int]]:
        """The blocks (first row, row after the last) that rows first..last touch."""
        per_expert = self.rows // self.experts
        height = max(BLOCK_ELEMENTS // max(self.width, 1), 1)
        found = []
        row = first // per_expert * per_expert + first % per_expert // height * height if per_expert else last
        while row < last:
            end = min(row + height, (row // per_expert + 1) * per_expert)
            found.append((row, end))
            row = end
        return found


@dataclass
class _Product:
    """scale * left @ right: left (experts, rows, r), right (experts, r, width); magnitude per row, or per column if laid transposed."""

    left: torch.Tensor
    right: torch.Tensor
    scale: float
    magnitude: torch.Tensor | None
    per_row: bool

    @staticmethod
    def of(one: LowRank, dtype: torch.dtype, experts: int) -> _Product | None:
        """None if the update is zero."""
        factors = one.factors()
        A, B = factors.A.to(dtype), factors.B.to(dtype)
        key = one.update.magnitude
        if key is None and (one.scale == 0 or not bool(B.any())):
            return None
        magnitude = None if key is None else one.adapter.read(key).to(dtype)
        if one.layout.startswith("experts"):
            stacked_A = A.view(experts, -1, A.shape[1])  # (E, r, i)
            stacked_B = B.view(B.shape[0], -1, experts).permute(2, 0, 1)  # (E, o, r)
            left, right = (stacked_B, stacked_A) if one.layout == "experts" else (stacked_A.mT, stacked_B.mT)
        else:
            left, right = (B[None], A[None]) if one.layout == "plain" else (A.t()[None], B.t()[None])
        return _Product(left.contiguous(), right.contiguous(), one.scale, magnitude, one.layout == "plain")


class Ready:
    """The factors of one tensor's change, in the dtype of the arithmetic."""

    def __init__(self, change: Change, products: list[_Product], shifts: list[tuple[torch.Tensor, float]], dtype: torch.dtype) -> None:
        self._change = change
        self._products = products
        self._shifts = shifts
        self._dtype = dtype
        self._rows = [(dict(zip(rows.rows, range(len(rows.rows)), strict=True)), rows.adapter.tensor(rows.key)) for rows in change.rows]
        self._grid = Grid.of(change)
        self.norms: torch.Tensor | None = None

    @staticmethod
    def of(change: Change) -> Ready:
        import torch

        dtype = torch.float64 if change.info.dtype == "F64" else torch.float32
        experts = Grid.of(change).experts
        low_rank = [one for one in change.added if isinstance(one, LowRank)]
        shifts = [(one.adapter.read(one.key).to(dtype), one.scale) for one in change.added if not isinstance(one, LowRank)]
        products = [product for one in low_rank if (product := _Product.of(one, dtype, experts)) is not None]
        return Ready(change, products, [(values, scale) for values, scale in shifts if scale and bool(values.any())], dtype)

    @property
    def changes_anything(self) -> bool:
        return bool(self._products or self._shifts or self._rows)

    def sum(self, values: torch.Tensor, first: int, last: int) -> torch.Tensor:
        """Rows first..last (of one expert) with the low-rank updates added: [last - first, width]."""
        result = values.to(self._dtype).view(last - first, self._grid.width)
        per_expert = self._grid.rows // self._grid.experts
        expert, begin = divmod(first, per_expert)
        for product in self._products:
            added = product.left[expert, begin : begin + last - first] @ product.right[expert]
            result = added.mul_(product.scale).add_(result)
        return result

    def block(self, values: torch.Tensor, first: int, last: int) -> torch.Tensor:
        """Rows first..last of the changed tensor, before they are rounded."""
        result = self.sum(values, first, last)
        for shift, scale in self._shifts:
            result = result + scale * shift[first:last, None]
        for product in self._products:
            if product.magnitude is not None:
                result = self._renormed(result, product.magnitude, product.per_row, first, last)
        replaced = [(row, numbers[row], new) for numbers, new in self._rows for row in range(first, last) if row in numbers]
        if replaced:
            result = result.clone()
            for row, number, new in replaced:
                result[row - first] = new[number].to(self._dtype)
        return result

    def _renormed(self, values: torch.Tensor, magnitude: torch.Tensor, per_row: bool, first: int, last: int) -> torch.Tensor:
        import torch

        if not per_row:
            assert self.norms is not None, "the norms of columns are taken before rows are read"
            return values * (magnitude / self.norms.to(self._dtype))
        norms = values.double().square().sum(1).sqrt().to(self._dtype)
        if not bool((norms > 0).all()):
            raise CheckpointError(
                f"row {first + int(torch.argmin(norms))} of '{self._change.origin}' is zero, so DoRA cannot set its norm. Use another base."
            )
        return values * (magnitude[first:last] / norms)[:, None]
