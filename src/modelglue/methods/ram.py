"""Task vectors added where one model alone has changed a position, averaged where several have."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

from modelglue.methods._ram import add_changes
from modelglue.methods.registry import Range, method

if TYPE_CHECKING:
    from torch import Tensor


@method(source="RAM, arXiv 2601.13572")
def ram(models: Sequence[Tensor], base: Tensor, *, epsilon: Annotated[float, Range(low=0)] = 1e-5) -> Tensor:
    """Keep at full size what one model alone has changed, and average what several have changed.

    Where c models changed a position (|X_i - B| > epsilon), B + the sum of their c changes / c. The threshold is absolute: models stored in
    bfloat16 differ by rounding alone in more positions than they learned. Time O(n P), every input read once; memory: one chunk of
    every input.

    Parameters:
        epsilon: changes up to this size count as none.
    """
    return add_changes(base, models, epsilon, [1.0] * len(models))
