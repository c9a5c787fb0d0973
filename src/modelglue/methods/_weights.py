"""Weights that nearly cancel: what a normalised sum may be divided by, told from the weights alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

#: a divisor below this share of the weights' magnitudes makes more of a rounding error than of what was learned
_SMALL = 1e-3
#: steps into which the sum of all magnitudes is divided where subsets are looked for
_STEPS = 2**20


def summed(parameters: Mapping[str, Any], models: Sequence[str]) -> list[str]:
    """What to say of a sum that is divided by the sum of its weights."""
    weight, whole = parameters["weight"], sum(map(abs, parameters["weight"]))
    total = sum(weight)
    if not parameters["normalize"] or not abs(total) < _SMALL * whole:
        return []
    if abs(total) < 1e-8:
        return ["the weights sum to 0, so nothing is divided. Change them, or set normalize: false."]
    return [f"the weights nearly cancel: all is divided by their sum, {total:.3g}. Change them, or set normalize: false."]


def elected(parameters: Mapping[str, Any], models: Sequence[str]) -> list[str]:
    """What to say of a sum that is divided, position by position, by the weights of the models that agree."""
    if not parameters["normalize"] or parameters.get("agreeing") == "largest" or not some_cancel(parameters["weight"]):
        return []
    return [
        "weights of both signs nearly cancel where the models that have them agree; what is divided by so little comes out far too large. "
        "Give weights of one sign, or set normalize: false."
    ]


def some_cancel(weight: Sequence[float]) -> bool:
    """Whether some of the weights, of both signs, sum to less than a thousandth of all magnitudes.

    Sums of subsets are bits of a number, so the time is O(n) shifts of 128 KiB, whatever the number of subsets.
    """
    whole = sum(map(abs, weight))
    added, taken = (_sums([abs(w) / whole for w in weight if w * sign > 0]) if whole else 0 for sign in (1, -1))
    near, reach, most = added, 0, int(_SMALL * _STEPS)
    while reach < most:  # every step lets the bits spread as far as leaves no gap
        step = min(2 * reach + 1, most - reach)
        near |= near << step | near >> step
        reach += step
    return bool(near & taken)


def _sums(shares: Sequence[float]) -> int:
    """Bit k for every subset, but the empty one, whose sum is k steps."""
    found = 1
    for share in shares:
        found |= found << round(share * _STEPS)
    return found & ~1
