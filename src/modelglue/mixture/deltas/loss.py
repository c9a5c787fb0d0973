"""How much of a model is lost by the way it is kept: measured on what comes back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from modelglue.checkpoint import FLOATING, Checkpoint

_STEP = 2**22


@dataclass(frozen=True)
class Loss:
    """Of all tensors of one role together (roots of summed squares)."""

    error: float
    """||W - W'|| / ||W||: how far what comes back is from what was kept."""
    lost: float
    """||W - W'|| / ||W - base||: the share of the difference that is lost; 0 where there is none."""
    elements: int


def losses(model: Checkpoint, restored: Checkpoint, base: Checkpoint, role: Callable[[str], str]) -> dict[str, Loss]:
    """By role, and under `all`. Reads all three once, in steps of 4 Mi elements; sums in float64."""
    sums: dict[str, list[float]] = {}
    for name in model.names():
        info = model.info(name)
        if info.dtype not in FLOATING:
            continue
        inside = name in base.names() and base.info(name).shape == info.shape
        for start in range(0, info.numel, _STEP):
            stop = min(start + _STEP, info.numel)
            ours = model.read(name, start, stop).double()
            away = float((ours - restored.read(name, start, stop).double()).square().sum())
            change = float((ours - base.read(name, start, stop).double()).square().sum()) if inside else 0.0
            for key in (role(name), "all"):
                total = sums.setdefault(key, [0.0, 0.0, 0.0, 0.0])
                for place, value in enumerate((away, float(ours.square().sum()), change, float(stop - start))):
                    total[place] += value
    return {key: _loss(*sums[key]) for key in sorted(sums)}


def _loss(away: float, whole: float, change: float, elements: float) -> Loss:
    return Loss((away / whole) ** 0.5 if whole else 0.0, (away / change) ** 0.5 if change else 0.0, int(elements))
