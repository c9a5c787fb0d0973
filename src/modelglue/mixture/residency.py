"""Which experts are in memory: all, those that were needed so far, or the N that were used last."""

from __future__ import annotations

import gc
from collections import OrderedDict
from collections.abc import Callable, Sequence

from modelglue.errors import UserError
from modelglue.models import LiveTextModel


class Residents:
    """Live experts by their references. `load` makes one; `limit` of them are kept, and who was used longest ago goes first."""

    def __init__(self, load: Callable[[str], LiveTextModel], limit: int) -> None:
        self._load = load
        self.limit = limit
        self._models: OrderedDict[str, LiveTextModel] = OrderedDict()

    def get(self, references: Sequence[str]) -> list[LiveTextModel]:
        """These experts, all of them resident at once. Others go before one is loaded, so there are never more than `limit`."""
        for reference in references:
            if reference in self._models:
                self._models.move_to_end(reference)
        for reference in references:
            if reference not in self._models:
                self._make_room()
                self._models[reference] = self._load(reference)
            self._models.move_to_end(reference)
        return [self._models[reference] for reference in references]

    def names(self) -> list[str]:
        """References of the resident experts, the one that was used longest ago first."""
        return list(self._models)

    def _make_room(self) -> None:
        gone = False
        while len(self._models) >= self.limit:
            self._models.popitem(last=False)
            gone = True
        if gone:
            gc.collect()  # parts of a model may refer to each other, and the next one needs the memory now


def resident_limit(residency: str, experts: int) -> int:
    """How many experts may be resident. UserError for a residency that is none."""
    if residency in ("all", "lazy"):
        return experts
    kind, _, number = residency.partition(":")
    if kind == "lru" and number.isdecimal() and int(number) >= 1:
        return int(number)
    raise UserError(f"residency is '{residency}'; allowed is all, lazy or lru:N with N from 1.")
