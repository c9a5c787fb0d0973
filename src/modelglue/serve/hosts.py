"""What the engine knows of a model or a mixture: who answers a text, and what writes the answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from modelglue.mixture import Mixture
from modelglue.mixture.blend import BlendWriter
from modelglue.models import LiveTextModel
from modelglue.models.running import Row
from modelglue.models.writer import Asked, Writer


@dataclass(frozen=True)
class Placed:
    """Who answers: `key` names the lane (numbers of experts), `expert` and `weight` are what the client is told."""

    key: tuple[int, ...]
    expert: str | None = None
    weight: float | None = None
    weights: tuple[float, ...] = (1.0,)


class Host(Protocol):
    """A model, or several behind a router."""

    @property
    def capacity(self) -> int:
        """Experts that may be in memory at once."""
        ...

    def place(self, texts: Sequence[str]) -> list[Placed]: ...

    def writer(self, key: tuple[int, ...]) -> Writer:
        """Loads what is not in memory."""
        ...

    def row(self, writer: Writer, placed: Placed, asked: Asked, **how: Any) -> Row: ...


class ModelHost:
    """One model answers everything."""

    capacity = 1

    def __init__(self, model: LiveTextModel) -> None:
        self._writer = Writer(model)

    def place(self, texts: Sequence[str]) -> list[Placed]:
        return [Placed((0,))] * len(texts)

    def writer(self, key: tuple[int, ...]) -> Writer:
        return self._writer

    def row(self, writer: Writer, placed: Placed, asked: Asked, **how: Any) -> Row:
        return writer.row(asked, **how)


class MixtureHost:
    """Every text is answered by the experts that the router chooses for it, once."""

    def __init__(self, mixture: Mixture) -> None:
        self._mixture = mixture

    @property
    def capacity(self) -> int:
        return self._mixture.resident_limit

    def place(self, texts: Sequence[str]) -> list[Placed]:
        return [Placed(route.key, route.name, route.weight, route.weights) for route in self._mixture.route(texts)]

    def writer(self, key: tuple[int, ...]) -> Writer:
        return self._mixture.writer(key)

    def row(self, writer: Writer, placed: Placed, asked: Asked, **how: Any) -> Row:
        return writer.row_of(placed.weights, asked, **how) if isinstance(writer, BlendWriter) else writer.row(asked, **how)


def host_of(model: LiveTextModel | Mixture) -> Host:
    return MixtureHost(model) if isinstance(model, Mixture) else ModelHost(model)
