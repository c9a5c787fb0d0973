"""One model's tensors, copied or scaled."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from modelglue.methods.registry import PerModel, method, per_model

if TYPE_CHECKING:
    from torch import Tensor


def _copies(parameters: Mapping[str, Any]) -> bool:
    return bool(parameters["scale"] == [None])


@method(models=(1, 1), copies=_copies, source="mergekit; the building block of layer stacks")
def passthrough(models: Sequence[Tensor], *, scale: PerModel[float | None] = per_model(None)) -> Tensor:
    """The model's tensor, or scale times it.

    Without a scale nothing is computed and every byte is copied, whatever the dtype and the values, unless another dtype is to be stored.
    Time O(P), the input read once; memory: one chunk.

    Parameters:
        scale: factor; 0 silences a layer's output projection. None copies.
    """
    return models[0] if scale[0] is None else models[0] * scale[0]
