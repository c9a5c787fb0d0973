"""A live model that reads ids piece by piece and keeps what it has read.

Pieces of different lengths are padded on the left; pads are masked, and positions are counted from the mask, so a row's logits do
not depend (beyond rounding) on the rows beside it. Models that carry pads along in a state of their own never see any. What several
rows have in common is read once and handed on.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from modelglue.errors import CheckpointError

if TYPE_CHECKING:
    import torch

#: positions (rows x longest row) that one forward pass may hold
BATCH_POSITIONS = 8192
MAX_ROWS = 128
#: positions that sharing a beginning must save: a forward pass more costs about as much on a tiny model
_WORTH_SHARING = 256
_ANY_LENGTH = 2**30


@dataclass(frozen=True)
class Past:
    """What the rows of a batch have read: the model's own cache, the mask [B, S] of its real positions, and whether others are in it."""

    cache: Any
    mask: torch.Tensor
    padded: bool

    def rows(self, places: Sequence[int]) -> Past:
        """These rows, in this order, some perhaps several times; the past that they are taken from can still be used."""
        import torch

        cache = copy.copy(self.cache)
        cache.layers = [copy.copy(layer) for layer in self.cache.layers]  # layers replace their tensors, they never write into them
        if list(places) == list(range(len(self.mask))):
            return Past(cache, self.mask, self.padded)
        if len(self.mask) == 1 and all(getattr(layer, "is_initialized", False) for layer in cache.layers):
            for layer in cache.layers:  # one row many times needs no copies
                layer.keys, layer.values = (part.expand(len(places), *part.shape[1:]) for part in (layer.keys, layer.values))
            return Past(cache, self.mask.expand(len(places), -1), self.padded)
        chosen = torch.tensor(places, device=self.mask.device)
        cache.batch_select_indices(chosen)
        return Past(cache, self.mask[chosen], self.padded)


class CachedModel:
    """A transformers causal model, called the way that its version and class want it."""

    def __init__(self, model: Any, pad: int) -> None:
        known = inspect.signature(model.forward).parameters
        self._model = model
        self._pad = pad
        self._cache = next((name for name in ("cache", "past_key_values", "cache_params") if name in known), "past_key_values")
        self._counts_positions = "position_ids" in known
        self._can_keep = "logits_to_keep" in known
        self.routes_prompts = bool(getattr(model, "routes_prompts", False))
        """Whether the model decides by a prompt what to do with what follows: a prompt is then read in one piece, and nothing else is."""

    @cached_property
    def shareable(self) -> int:
        """The longest row, in ids, whose past may be handed on to other rows; 0 for models whose memory is no plain list of keys, or
        that remember what a prompt has decided.

        In a sliding window masked positions count, so there rows must fit into the window.
        """
        return 0 if self.routes_prompts else self.reorderable

    @cached_property
    def reorderable(self) -> int:
        """The longest row, in ids, whose past may go on in several ways (beams of one prompt). Costs one step of the model, once."""
        import torch
        from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

        with torch.inference_mode():
            cache = self.read([[self._pad]], keep=1)[1].cache
        plain = [type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in getattr(cache, "layers", ())]
        routed = [self.routes_prompts and isinstance(layer, DynamicLayer) for layer in getattr(cache, "layers", ())]
        if type(cache) is not DynamicCache or not all(a or b for a, b in zip(plain, routed, strict=True)):
            return 0
        return min((int(getattr(layer, "sliding_window", _ANY_LENGTH)) for layer in cache.layers), default=0)

    def batches(self, lengths: Sequence[int], positions: int = BATCH_POSITIONS) -> list[list[int]]:
        """`batches` of rows that this model may read together."""
        return batches(lengths, positions, equal=not self.shareable)

    def read(
        self, pieces: Sequence[Sequence[int]], past: Past | None = None, *, keep: int, prompts: bool = True
    ) -> tuple[torch.Tensor, Past]:
        """Read one more piece in every row: logits [B, >= keep, V] up to the last position, and the past with the pieces in it.

        The past that went in is used up: take `rows` of it where it is still needed. No piece may be empty. `prompts`: the first pieces
        are prompts, which something else will follow (and no texts in which nobody knows where a prompt ends).
        """
        import torch

        width = max(len(piece) for piece in pieces)
        device = self._model.device
        ids = torch.tensor([[self._pad] * (width - len(piece)) + list(piece) for piece in pieces], device=device)
        pads = [width - len(piece) for piece in pieces]
        padded = max(pads) > 0
        mask = (torch.arange(width, device=device) >= torch.tensor(pads, device=device)[:, None]).long() if padded else torch.ones_like(ids)
        return self._call(ids, mask, past, keep, padded=padded, prompts=prompts and past is None)

    def step(self, ids: torch.Tensor, past: Past) -> tuple[torch.Tensor, Past]:
        """Read one more id [B] in every row: logits [B, 1, V], and the past."""
        return self._call(ids[:, None], past.mask.new_ones(len(ids), 1), past, 1, padded=False, prompts=False)

    def shared(self, beginnings: Sequence[list[int]], longest: int) -> tuple[int, Past | None]:
        """(length of what all beginnings begin with, its past in one row) where reading that once is worth a pass, else (0, None).

        `longest`: the length, in the end, of the longest row.
        """
        if len(beginnings) < 2:
            return 0, None
        count = common_length(min(beginnings), max(beginnings))
        if count * (len(beginnings) - 1) < _WORTH_SHARING or longest > self.shareable:
            return 0, None
        return count, self.read([beginnings[0][:count]], keep=1)[1]

    def _call(
        self, ids: torch.Tensor, mask: torch.Tensor, past: Past | None, keep: int, *, padded: bool, prompts: bool
    ) -> tuple[torch.Tensor, Past]:
        import torch

        options: dict[str, Any] = {self._cache: None}
        if past is not None:
            mask, padded = torch.cat([past.mask, mask], dim=1), padded or past.padded
            options[self._cache] = past.cache
        if padded:  # without pads every class counts positions right by itself, and some allow no mask beside a cache
            options["attention_mask"] = mask
            if self._counts_positions:
                options["position_ids"] = (mask.cumsum(dim=1) - 1)[:, -ids.shape[1] :].clamp(min=0)
        if self._can_keep:
            options["logits_to_keep"] = keep
        if prompts and self.routes_prompts:
            options["prompt_length"] = ids.shape[1]
        output = self._model(input_ids=ids, use_cache=True, **options)
        if getattr(output, self._cache, None) is None:
            raise CheckpointError(f"{type(self._model).__name__}: hands out no cache, so it cannot continue text here. Use another model.")
        return output.logits, Past(getattr(output, self._cache), mask, padded)


def common_length(first: Sequence[int], second: Sequence[int]) -> int:
    """How many ids two rows begin with in common."""
    return next((i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), min(len(first), len(second)))


def batches(lengths: Sequence[int], positions: int = BATCH_POSITIONS, *, equal: bool = False) -> list[list[int]]:
    """Places of rows, long ones first, in batches of similar length that hold at most `positions` (a longer row is alone).

    A function of the lengths alone. With `equal` all rows of a batch have the same length.
    """
    order = sorted(range(len(lengths)), key=lambda place: (-lengths[place], place))
    found: list[list[int]] = []
    for place in order:
        longest = lengths[found[-1][0]] if found else 0
        full = not found or len(found[-1]) >= MAX_ROWS or (len(found[-1]) + 1) * longest > positions
        if full or (equal and lengths[place] != longest):
            found.append([])
        found[-1].append(place)
    return found
