"""Task vectors with random entries dropped: the survey of their lengths, and the merge of what is left."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from modelglue.methods._pruning import by_length, length_ratios, scales, sums
from modelglue.methods._task_vectors import Election, add_kept
from modelglue.methods.registry import Round, Unit

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    Array = np.ndarray[Any, np.dtype[Any]]

#: what the survey dropped is remembered, one bit an entry, for so many entries; behind them it is worked out again
_REMEMBERED = 2**27


@dataclass(frozen=True)
class Chances:
    """With which probability an entry stays: `of(magnitude, position of the model, parameters)`, one number or one for each entry.

    `magnitude` is |model - base| of the chunk, and None unless the chances depend on it.
    """

    of: Callable[[Tensor | None, int, Mapping[str, Any]], float | Array]
    by_magnitude: bool


@dataclass(frozen=True)
class Dropped:
    """What the survey found: the factors that restore the lengths, and which entries stay (bits per model, of chunks between `edges`)."""

    ratios: Sequence[float]
    edges: Sequence[int]
    bits: Sequence[Sequence[Array | None]]

    def kept(self, model: int, start: int, stop: int) -> Array | None:
        """0 or 1 for the entries start..stop of a model; None if not all are remembered."""
        import bisect

        import numpy as np

        found = []
        for number in range(bisect.bisect_right(self.edges, start) - 1, len(self.bits)):
            (begin, end), bits = self.edges[number : number + 2], self.bits[number][model]
            if begin >= stop or bits is None:
                break
            first, last = max(start - begin, 0), min(stop, end) - begin
            found.append(np.unpackbits(bits[first // 8 : -(-last // 8)])[first % 8 : first % 8 + last - first])
        if not found:
            return None
        kept = found[0] if len(found) == 1 else np.concatenate(found)
        return kept if len(kept) == stop - start else None


def _chance(chances: Chances, magnitude: Tensor | None, position: int, parameters: Mapping[str, Any]) -> float | Array:
    """With density 0 nothing stays, whatever else the chances depend on."""
    return chances.of(magnitude, position, parameters) if parameters["density"][position] > 0 else 0.0


def _density(magnitude: Tensor | None, position: int, parameters: Mapping[str, Any]) -> float:
    return float(parameters["density"][position])


#: those of DARE: the density, for every entry
DENSITY = Chances(_density, by_magnitude=False)


def drop_rounds(chances: Chances, parameters: Mapping[str, Any], unit: Unit = "element") -> list[Round]:
    """The round before `merge_dropped`, which makes every random number once; none where no length is to be restored."""
    if not by_length(parameters):
        return []

    def gather(models: Any, base: Any, uniform: Any, known: Any, start: int, parameters: Mapping[str, Any]) -> Any:
        import numpy as np
        import torch

        found: list[Any] = []
        bits: list[Array | None] = []
        for position, (model, density) in enumerate(zip(models, parameters["density"], strict=True)):
            if density >= 1:
                found.append(None)
                bits.append(None)
                continue
            magnitude = (model - base).abs_()
            kept = _host(uniform[position]) < _chance(chances, magnitude, position, parameters)
            before = sums(magnitude)
            found.append((before, sums(magnitude.mul_(torch.from_numpy(kept.view(np.uint8)).to(base.device)))))
            bits.append(np.packbits(kept) if start < _REMEMBERED // len(models) else None)
        return start, found, bits

    return [Round(gather, _dropped, unit=unit)]


def _dropped(partials: Sequence[Any], known: Any, numel: int, parameters: Mapping[str, Any]) -> Dropped:
    ratios = length_ratios([found for _, found, _ in partials], known, numel, parameters)
    return Dropped(ratios, [*(start for start, _, _ in partials), numel], [bits for _, _, bits in partials])


def merge_dropped(
    models: Sequence[Tensor],
    base: Tensor,
    uniform: Sequence[Tensor],
    survey: Sequence[Dropped],
    start: int,
    chances: Chances,
    *,
    election: Election,
    lambda_: float,
    **parameters: Any,
) -> Tensor:
    """B + lambda * (the task vectors, thinned out, weighted and put together), as a 1-D tensor; position `start` is the chunk's first."""
    import numpy as np
    import torch

    if lambda_ == 0.0:
        return base
    ratios = list(survey[0].ratios) if survey else [1.0] * len(models)
    inverse = parameters["rescale"] and parameters["rescale_by"] == "inverse"
    kept: list[Tensor | None] = []
    for position, (model, density) in enumerate(zip(models, parameters["density"], strict=True)):
        if density >= 1:
            kept.append(None)
            continue
        keep = survey[0].kept(position, start, start + base.numel()) if survey else None
        if keep is None:
            chance = _chance(chances, (model - base).abs_() if chances.by_magnitude else None, position, parameters)
            keep = (_host(uniform[position]) < chance).view(np.uint8)
            if inverse and isinstance(chance, float):
                ratios[position] = 1.0 / chance if chance else 1.0
            elif inverse:
                keep = np.divide(keep, chance, dtype=np.float32)
        kept.append(torch.from_numpy(keep).to(base.device).reshape(-1))
    weight, normalize = parameters["weight"], parameters["normalize"]
    flat = [model.reshape(-1) for model in models]
    return add_kept(
        base.reshape(-1), flat, kept, scales(weight, ratios, election, normalize, lambda_), weight, election, normalize, lambda_, 1.0
    )


def _host(tensor: Tensor) -> Array:
    """numpy, whose masks are much cheaper."""
    array: Array = tensor.cpu().numpy()
    return array
