"""Rows that come and go: pasts of different lengths become one batch, and rows that have ended leave it."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

from modelglue.models.cached import CachedModel, Past

if TYPE_CHECKING:
    import torch


class JoiningReader(Protocol):
    """What a running batch needs of a model, or of several whose probabilities are mixed."""

    @property
    def shareable(self) -> int: ...
    @property
    def reorderable(self) -> int: ...
    def read(self, pieces: Sequence[Sequence[int]], past: Any = None, *, keep: int) -> tuple[torch.Tensor, Any]: ...
    def step(self, ids: torch.Tensor, past: Any) -> tuple[torch.Tensor, Any]: ...
    def join(self, pasts: Sequence[Any]) -> Any: ...
    def pick(self, past: Any, places: Sequence[int]) -> Any: ...


class JoiningModel(CachedModel):
    """A `CachedModel` whose rows may be put together and taken apart, where they are `shareable`."""

    def join(self, pasts: Sequence[Past]) -> Past:
        """One batch of several: what is shorter is padded on the left, and masked there. Memory: a copy of all of them."""
        import torch
        from torch.nn.functional import pad

        if len(pasts) == 1:
            return pasts[0]
        width = max(past.mask.shape[1] for past in pasts)
        mask = torch.cat([pad(past.mask, (width - past.mask.shape[1], 0)) for past in pasts])
        cache = copy.copy(pasts[0].cache)
        cache.layers = [
            _with(layers[0], *(_stacked([getattr(layer, name) for layer in layers]) for name in ("keys", "values")))
            if layers[0].is_initialized
            else layers[0]
            for layers in zip(*(past.cache.layers for past in pasts), strict=True)
        ]
        return Past(cache, mask, bool((mask == 0).any()))

    def pick(self, past: Past, places: Sequence[int]) -> Past:
        """These rows, some perhaps several times, without the columns that are padding in all of them."""
        chosen = past.rows(places)
        empty = int(chosen.mask.shape[1] - chosen.mask.sum(dim=1).max())
        if not empty:
            return Past(chosen.cache, chosen.mask, bool((chosen.mask == 0).any()))
        chosen.cache.layers = [
            _with(layer, layer.keys[:, :, empty:], layer.values[:, :, empty:]) if layer.is_initialized else layer
            for layer in chosen.cache.layers
        ]
        mask = chosen.mask[:, empty:]
        return Past(chosen.cache, mask, bool((mask == 0).any()))


def _stacked(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """Keys or values [B, heads, S, width] of several batches below each other, the shorter ones with zeros on the left."""
    import torch
    from torch.nn.functional import pad

    longest = max(tensor.shape[2] for tensor in tensors)
    return torch.cat([pad(tensor, (0, 0, longest - tensor.shape[2], 0)) for tensor in tensors])


def _with(layer: Any, keys: torch.Tensor, values: torch.Tensor) -> Any:
    """A copy of a cache's layer that holds these."""
    made = copy.copy(layer)
    made.keys, made.values = keys, values
    if hasattr(made, "cumulative_length"):  # of sliding windows, which no row here has outgrown
        made.cumulative_length = keys.shape[2]
    return made
