"""MAGPRUNE, the pruning of DELLA: the larger an entry's magnitude in its row, the likelier it stays."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from modelglue.methods._random import Chances
from modelglue.methods._ranks import by_rank

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

Rows = Literal["flat", "axis1"]


def _by_rank(magnitude: Tensor | None, position: int, parameters: Mapping[str, Any]) -> np.ndarray[Any, np.dtype[np.float32]]:
    """p = density - epsilon + 2 epsilon r / (c - 1) for every entry of a chunk [count, *channel], r its rank 0 .. c-1 in its row."""
    import numpy as np
    import torch

    assert magnitude is not None
    density, epsilon = parameters["density"][position], parameters["epsilon"][position]
    scores = magnitude.to(torch.float32).cpu().numpy()
    shape = scores.shape
    strided = parameters["rows"] == "axis1" and scores.ndim > 2
    if strided:
        scores = np.moveaxis(scores, 1, -1)
    turned = scores.shape
    scores = np.ascontiguousarray(scores).reshape(-1, turned[-1] if strided else math.prod(turned[1:]))
    c = scores.shape[1]
    spread = np.linspace(-epsilon, epsilon, c) if c > 1 else np.zeros(1)
    found = by_rank(scores, (density + spread).astype(np.float32)).reshape(turned)
    return np.ascontiguousarray(np.moveaxis(found, -1, 1) if strided else found).reshape(shape)


BY_RANK = Chances(_by_rank, by_magnitude=True)


def window_fits(parameters: Mapping[str, Any], models: Sequence[str]) -> list[str]:
    """Every probability lies between 0 and 1, but where nothing or all is dropped."""
    faults = []
    for model, density, epsilon in zip(models, parameters["density"], parameters["epsilon"], strict=True):
        low, high = density - epsilon, density + epsilon
        if 0 < density < 1 and not (low > 0 and high < 1):
            faults.append(
                f"{model}: density {density:g} and epsilon {epsilon:g} make probabilities from {low:g} to {high:g}, allowed is (0, 1); "
                "lower epsilon, or set density to 1 to drop nothing (0: all)"
            )
    return faults
