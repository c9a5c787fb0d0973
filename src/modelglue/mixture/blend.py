"""Several experts at once: their next-token probabilities are mixed by the router's weights.

Every expert reads the same ids with a cache of its own, so this is for experts whose tokenizers number the same tokens alike.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

from modelglue.checkpoint import Checkpoint
from modelglue.checkpoint.vocabulary import vocabulary
from modelglue.errors import UserError
from modelglue.models import LiveTextModel
from modelglue.models.cached import CachedModel
from modelglue.models.joining import JoiningModel
from modelglue.models.running import Row
from modelglue.models.writer import Asked, Writer

if TYPE_CHECKING:
    import torch

#: `logits` sums the weighted logits instead
Combine = Literal["probabilities", "logits"]


@dataclass(frozen=True)
class BlendedPast:
    """What every expert has read of the rows, and the experts' weights [B, experts] in each row."""

    pasts: tuple[Any, ...]
    weights: torch.Tensor

    @property
    def mask(self) -> torch.Tensor:
        mask: torch.Tensor = self.pasts[0].mask
        return mask

    def rows(self, places: Sequence[int]) -> BlendedPast:
        return BlendedPast(tuple(past.rows(places) for past in self.pasts), self.weights[list(places)])


class Blend(CachedModel):
    """Experts that read together, one set of weights for all rows that begin here. Its logits are logarithms of mixed probabilities."""

    def __init__(self, readers: Sequence[JoiningModel], weights: Sequence[float], combine: Combine) -> None:
        # What it inherits (batches, shared beginnings) rests on `shareable` and `read` alone.
        self._readers, self._weights, self._combine = readers, weights, combine
        self.routes_prompts = any(reader.routes_prompts for reader in readers)

    @cached_property
    def shareable(self) -> int:
        return min(reader.shareable for reader in self._readers)

    @cached_property
    def reorderable(self) -> int:
        return min(reader.reorderable for reader in self._readers)

    def read(self, pieces: Sequence[Sequence[int]], past: Any = None, *, keep: int, prompts: bool = True) -> tuple[torch.Tensor, Any]:
        import torch

        pasts = (None,) * len(self._readers) if past is None else past.pasts
        weights = torch.tensor([self._weights] * len(pieces), dtype=torch.float64) if past is None else past.weights
        found = [reader.read(pieces, before, keep=keep, prompts=prompts) for reader, before in zip(self._readers, pasts, strict=True)]
        return self._mixed([logits[:, -keep:] for logits, _ in found], weights), BlendedPast(tuple(after for _, after in found), weights)

    def step(self, ids: torch.Tensor, past: Any) -> tuple[torch.Tensor, Any]:
        found = [reader.step(ids, before) for reader, before in zip(self._readers, past.pasts, strict=True)]
        return self._mixed([logits for logits, _ in found], past.weights), BlendedPast(tuple(after for _, after in found), past.weights)

    def join(self, pasts: Sequence[BlendedPast]) -> BlendedPast:
        import torch

        joined = tuple(reader.join([past.pasts[number] for past in pasts]) for number, reader in enumerate(self._readers))
        return BlendedPast(joined, torch.cat([past.weights for past in pasts]))

    def pick(self, past: BlendedPast, places: Sequence[int]) -> BlendedPast:
        picked = tuple(reader.pick(before, places) for reader, before in zip(self._readers, past.pasts, strict=True))
        return BlendedPast(picked, past.weights[list(places)])

    def _mixed(self, logits: Sequence[torch.Tensor], weights: torch.Tensor) -> torch.Tensor:
        """[B, T, V] of the experts' logits. Tables may be padded to different lengths: no token stands beyond the shortest of them."""
        shortest = min(values.shape[-1] for values in logits)
        parts = [values.double() if self._combine == "logits" else values.double().softmax(dim=-1) for values in logits]
        terms = [weights[:, number, None, None].to(part.device) * part[..., :shortest] for number, part in enumerate(parts)]
        total = terms[0]
        for term in terms[1:]:
            total = total + term
        return total if self._combine == "logits" else total.log()


class BlendedTextModel(LiveTextModel):
    """Several text models as one, for one set of weights."""

    def __init__(self, models: Sequence[LiveTextModel], weights: Sequence[float], combine: Combine) -> None:
        super().__init__(models[0].model, models[0].tokenizer)
        self.blend = Blend([_reader(model) for model in models], weights, combine)
        self._reader = self.blend
        self._ends = set().union(*(model.ends([]) for model in models))
        self.encoder.limit = min(model.encoder.limit for model in models)


class BlendWriter(Writer):
    """Writes the texts of several experts; every row has weights of its own."""

    def __init__(self, models: Sequence[LiveTextModel], combine: Combine) -> None:
        self._readers, self._combine = [_reader(model) for model in models], combine
        same = [1 / len(models)] * len(models)
        super().__init__(BlendedTextModel(models, same, combine), self.weighted(same))

    def weighted(self, weights: Sequence[float]) -> Blend:
        """What reads rows of these weights for the first time; from then on the batch's reader goes on with them."""
        return Blend(self._readers, weights, self._combine)

    def row_of(self, weights: Sequence[float], asked: Asked, **how: Any) -> Row:
        """A row of these weights."""
        row = self.row(asked, **how)
        row.reader = self.weighted(weights)
        return row


def _reader(model: LiveTextModel) -> JoiningModel:
    return JoiningModel(model.model, model.pad)


def check_same_tokens(experts: Mapping[str, Checkpoint]) -> None:
    """Raise the UserError that mixing the probabilities of these experts would need: tokens that are not numbered alike."""
    (first, checkpoint), *others = experts.items()
    wanted = vocabulary(checkpoint)
    for name, other in others:
        found = vocabulary(other)
        if wanted is None or found is None or wanted.ids != found.ids:
            raise UserError(
                f"top_k is above 1, which mixes next-token probabilities, but the tokenizers of experts '{first}' and '{name}' do not "
                "number the same tokens alike. Use top_k: 1, where every expert reads and writes text by itself."
            )
