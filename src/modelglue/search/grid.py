"""Grid search: every combination."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from modelglue.errors import UserError
from modelglue.search.decode import Decoder
from modelglue.search.searcher import Needs, Outcome, Proposal

#: more combinations than anybody scores
_MOST = 100_000


class GridSearch:
    """`steps` values of every number, all values of choices, simplexes in steps of 1 / steps; in order."""

    needs = Needs(racing="batch")

    def __init__(self, decoder: Decoder, *, steps: int = 5) -> None:
        if steps < 1:
            raise UserError(f"a grid of {steps} steps; allowed is 1 or more.")
        width = sum(parameter.width for parameter in decoder.space.parameters)
        if steps > 1 and steps ** min(width, 40) > 1000 * _MOST:
            raise UserError(f"a grid of {steps} steps in {width} dimensions has too many points. Search fewer parameters, or another way.")
        self._decoder = decoder
        self._points = decoder.space.grid(steps)
        if len(self._points) > _MOST:
            raise UserError(f"the grid has {len(self._points)} points. Take fewer steps or parameters, or search another way.")
        self._count = 0

    def ask(self, n: int) -> list[Proposal]:
        batch = self._points[self._count : self._count + n]
        self._count += len(batch)
        return [Proposal(self._decoder.candidate(params), params, tag="grid") for params in batch]

    def tell(self, outcomes: Sequence[Outcome]) -> None:
        """Nothing is learnt."""

    def done(self) -> bool:
        return self._count >= len(self._points)

    def report(self) -> Mapping[str, Any]:
        return {"points": len(self._points)}
