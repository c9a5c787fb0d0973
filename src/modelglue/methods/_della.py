"""MAGPRUNE, the pruning of DELLA: the larger an entry's magnitude in its row, the likelier it stays."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from modelglue.methods._ranks import by_rank

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

Rows = Literal["flat", "axis1"]


def chances(model: Tensor, base: Tensor, position: int, parameters: Mapping[str, Any]) -> np.ndarray[Any, np.dtype[np.float32]]:
    """p = density - epsilon + 2 epsilon r / (c - 1) for every entry of chunks [count, *channel], r its rank 0 .. c-1 of |model - base|."""
    import numpy as np
    import torch

    density, epsilon = parameters["density"][position], parameters["epsilon"][position]
    magnitude = (model - base).abs_().to(torch.float32).cpu().numpy()
    shape = magnitude.shape
    strided = parameters["rows"] == "axis1" and magnitude.ndim > 2
    if strided:
        magnitude = np.moveaxis(magnitude, 1, -1)
    turned = magnitude.shape
    magnitude = np.ascontiguousarray(magnitude).reshape(-1, turned[-1] if strided else math.prod(turned[1:]))
    c = magnitude.shape[1]
    spread = np.linspace(-epsilon, epsilon, c) if c > 1 else np.zeros(1)
    found = by_rank(magnitude, (density + spread).astype(np.float32)).reshape(turned)
    return np.ascontiguousarray(np.moveaxis(found, -1, 1) if strided else found).reshape(shape)


def window_fits(parameters: Mapping[str, Any], models: Sequence[str]) -> list[str]:
    """Every probability lies between 0 and 1."""
    faults = []
    for model, density, epsilon in zip(models, parameters["density"], parameters["epsilon"], strict=True):
        low, high = density - epsilon, density + epsilon
        if density < 1 and not (low > 0 and high < 1):
            faults.append(
                f"{model}: density {density:g} and epsilon {epsilon:g} make probabilities from {low:g} to {high:g}, allowed is (0, 1); "
                "lower epsilon, or set density to 1 to drop nothing"
            )
    return faults
