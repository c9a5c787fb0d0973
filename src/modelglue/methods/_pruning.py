"""What all pruned task vectors have in common: the factors that they are multiplied by, and the survey of their lengths."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from modelglue.methods._sums import block_sums, row_sums, total
from modelglue.methods._task_vectors import Election, divisor
from modelglue.methods.registry import Round, Unit

if TYPE_CHECKING:
    from torch import Tensor

_NO_LENGTH = 1e-7
#: rescale to the L1 norm that a vector had, or by the inverse of what is kept
RescaleBy = Literal["length", "inverse"]


def by_length(parameters: Mapping[str, Any]) -> bool:
    """Whether the factors that restore the vectors' lengths are asked for."""
    return bool(parameters["rescale"]) and parameters.get("rescale_by", "length") == "length"


def length_round(
    prune: Callable[[Sequence[Tensor], Tensor, Any, Sequence[Any], int, Mapping[str, Any]], Sequence[Tensor | None]],
    scope: Literal["tensor", "model"] = "tensor",
    unit: Unit = "element",
) -> Round:
    """The round that gives per model |D|_1 / |P|_1, for P = `prune(models, base, uniform, known, start, parameters)` (None: all of D)."""

    def gather(models: Any, base: Any, uniform: Any, known: Any, start: int, parameters: Mapping[str, Any]) -> Any:
        pruned = prune(models, base, uniform, known, start, parameters)
        return [None if p is None else (sums((model - base).abs_()), sums(p.abs())) for model, p in zip(models, pruned, strict=True)]

    return Round(gather, length_ratios, scope, unit=unit)


def sums(magnitude: Tensor) -> list[float]:
    """The sum of a chunk in parts: per block, or per row where the chunk is whole rows."""
    return block_sums(magnitude) if magnitude.dim() == 1 else row_sums(magnitude)


def length_ratios(partials: Sequence[Any], known: Any, numel: int, parameters: Mapping[str, Any]) -> list[float]:
    """Per model, |D|_1 / |P|_1 of lengths gathered as [chunk][model]; 1 where either is below 1e-7 or nothing is pruned."""
    ratios = []
    for model in range(len(parameters["weight"])):
        gathered = [partial[model] for partial in partials]
        before, after = (0.0, 0.0) if None in gathered else (total([one[side] for one in gathered]) for side in (0, 1))
        ratios.append(before / after if before >= _NO_LENGTH and after >= _NO_LENGTH else 1.0)
    return ratios


def scales(weight: Sequence[float], ratios: Sequence[float] | None, election: Election, normalize: bool, lambda_: float) -> list[float]:
    """What each pruned vector is multiplied by: its weight, the factor that restores its length, and without election all the rest."""
    shared = lambda_ / divisor(weight, normalize) if election == "none" else 1.0
    return [share * ratio * shared for share, ratio in zip(weight, ratios or [1.0] * len(weight), strict=True)]
