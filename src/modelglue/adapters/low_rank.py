"""Truncated singular value decompositions: of a dense matrix, exactly or by a random sketch, and of a sum of low-rank products."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

#: a sketch takes so many directions more than are wanted, and multiplies so often by the matrix and its transpose
_OVERSAMPLING = 10
_POWER_ITERATIONS = 2
#: a matrix whose smaller side is at most this is decomposed whole, in hundredths of a second
_SKETCHED_ABOVE = 256
#: matrices up to this size are decomposed in float64: it costs nothing there
_SMALL = 1024
#: rows of a residual at a time
_ROWS = 256


@dataclass(frozen=True)
class Truncation:
    """The leading part U diag(s) V^T of a matrix: U (o, k), s (k), V (i, k); `norm` of the whole matrix, `largest` singular value."""

    U: torch.Tensor
    s: torch.Tensor
    V: torch.Tensor
    norm: float
    largest: float

    @property
    def rank(self) -> int:
        return int(self.s.numel())

    @property
    def stable_rank(self) -> float:
        """(norm / largest singular value)^2: how many directions the matrix really has."""
        return (self.norm / self.largest) ** 2 if self.largest else 0.0

    def factors(self, *, distribute: bool = True) -> tuple[torch.Tensor, torch.Tensor]:
        """(A, B) with B A = U diag(s) V^T: the singular values split evenly, or all of them in A."""
        root = self.s.sqrt()
        return (root[:, None] * self.V.T, self.U * root) if distribute else (self.s[:, None] * self.V.T, self.U)


def truncated_svd(
    matrix: torch.Tensor,
    *,
    max_rank: int | None = None,
    sv_epsilon: float = 0.0,
    energy: float | None = None,
    exact: bool = False,
    seed: str = "",
) -> Truncation:
    """The leading singular triples of a float32 matrix (o, i): as few as the strictest of the limits allows.

    `max_rank`; singular values above `sv_epsilon`; the smallest number that carries the share `energy` of the squared norm. Where
    `max_rank` is below an eighth of the smaller side, which is above 256, and `exact` is not set, the leading part is found by a random
    range finder (Halko, Martinsson and Tropp, arXiv 0909.4061) with 10 more directions and 2 power iterations; `seed` says which random
    numbers.

    Time O(o i min(o, i)), by sketch O(o i k). Memory: one more matrix of that size (two where it is small).
    """
    import torch

    sides = min(matrix.shape)
    norm = float(torch.linalg.vector_norm(matrix, dtype=torch.float64))
    if norm == 0 or sides == 0:
        empty = matrix.new_zeros
        return Truncation(empty(matrix.shape[0], 0), empty(0), empty(matrix.shape[1], 0), 0.0, 0.0)
    if max_rank is not None and max_rank < sides / 8 and sides > _SKETCHED_ABOVE and not exact:
        U, s, Vh = _sketched(matrix, max_rank, seed)
    else:
        wide = matrix.to(torch.float64) if max(matrix.shape) <= _SMALL else matrix
        U, s, Vh = torch.linalg.svd(wide, full_matrices=False)
    rank = _rank(s, norm, max_rank, sv_epsilon, energy)
    kind = torch.float32
    return Truncation(U[:, :rank].to(kind), s[:rank].to(kind), Vh[:rank].T.to(kind), norm, float(s[0]))


def _rank(s: torch.Tensor, norm: float, max_rank: int | None, sv_epsilon: float, energy: float | None) -> int:
    import torch

    # rounding leaves singular values that are none; keeping them would store noise
    floor = float(s[0]) * torch.finfo(s.dtype).eps
    limits = [int((s > max(sv_epsilon, floor)).sum())]
    if max_rank is not None:
        limits.append(max_rank)
    if energy is not None:
        carried = s.double().square().cumsum(0)
        limits.append(int(torch.searchsorted(carried, energy * norm**2)) + 1)
    return min(limits)


def _sketched(matrix: torch.Tensor, rank: int, seed: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    import torch

    generator = torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(seed.encode()).digest()[:7], "little"))
    directions = min(rank + _OVERSAMPLING, *matrix.shape)
    basis = torch.linalg.qr(matrix @ torch.randn(matrix.shape[1], directions, generator=generator, dtype=matrix.dtype)).Q
    for _ in range(_POWER_ITERATIONS):
        basis = torch.linalg.qr(matrix @ torch.linalg.qr(matrix.T @ basis).Q).Q
    U, s, Vh = torch.linalg.svd((basis.T @ matrix).to(torch.float64), full_matrices=False)
    return basis.to(torch.float64) @ U, s, Vh


def residual(matrix: torch.Tensor, A: torch.Tensor, B: torch.Tensor) -> float:
    """||matrix - B A||, summed in float64, a few rows at a time."""
    import torch

    A, B = A.to(matrix.dtype), B.to(matrix.dtype)
    total = 0.0
    for start in range(0, matrix.shape[0], _ROWS):
        part = matrix[start : start + _ROWS] - B[start : start + _ROWS] @ A
        total += float(torch.linalg.vector_norm(part, dtype=torch.float64)) ** 2
    return float(total**0.5)


def truncated_product(lefts: Sequence[torch.Tensor], rights: Sequence[torch.Tensor], rank: int) -> Truncation:
    """The leading singular triples of sum_t L_t R_t, L (o, r), R (r, i), without forming the sum.

    Time O((o + i) R^2 + R^3), memory O((o + i) R), in float64, where R is the sum of the ranks.
    """
    import torch

    left, right = torch.cat(list(lefts), 1).double(), torch.cat(list(rights), 0).double()
    outer, inner = torch.linalg.qr(left), torch.linalg.qr(right.T)
    U, s, Vh = torch.linalg.svd(outer.R @ inner.R.T, full_matrices=False)
    norm = float(torch.linalg.vector_norm(s))
    kept = min(rank, int((s > float(s[0]) * torch.finfo(torch.float64).eps).sum()) if norm else 0)
    kind = torch.float32
    U, V = (outer.Q @ U[:, :kept]).to(kind), (inner.Q @ Vh[:kept].T).to(kind)
    return Truncation(U, s[:kept].to(kind), V, norm, float(s[0]) if norm else 0.0)
