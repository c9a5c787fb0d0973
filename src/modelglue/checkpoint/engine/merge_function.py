"""What the engine needs of a merge method, and of its parameters; the registry's `Method` is one."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol

if TYPE_CHECKING:
    import torch

Unit = Literal["element", "row", "channel", "matrix"]


def unit_shape(unit: Unit, shape: Sequence[int]) -> tuple[int, ...]:
    """The part of a tensor that one call must hold whole; its chunks come as [count, *part], those of unit "element" as [length].

    "row": a vector along the last axis. "channel": everything at one index of the first axis, the weights of one output (a tensor with
    one axis is one channel). "matrix": the tensor.
    """
    if unit == "element":
        return ()
    if unit == "row":
        return tuple(shape[-1:]) or (1,)
    if unit == "channel":
        return tuple(shape[1:] if len(shape) > 1 else shape) or (1,)
    return tuple(shape)


class CannotMergeError(Exception):
    """Raised by a method: what it cannot do with these values, and what would help. The engine says which tensor it is."""


@dataclass(frozen=True)
class Round:
    """One reduction over chunks, before the merge maps over them.

    `gather(models, base, uniform, known, start, parameters)` sees one chunk (1-D tensors; a multiple of 65,536 elements long
    except at the end of a tensor) and returns its partial result; `combine(partials, known, numel, parameters)` makes the round's result of
    them, in index order. `known` holds the results of the rounds before. `ranges(known, numel, parameters)`, if given, names
    the chunks to visit; default: all. Scope "tensor" runs it for one tensor, "model" once over all tensors laid end to end in
    the order of their names. With another `unit` the chunks are whole rows or channels (or the tensor), in the shape in which
    the merge gets them; `ranges` are widened to them. `fold(so far, next)` joins partial results as they come, where keeping
    all of them would take much memory; `combine` then gets one (or none). `note(result)`: what a user should be warned of. With
    `sound` (unit "element" only) `gather` takes the chunks as they are stored, and `sound(partial)` says whether its result shows that
    all of them were numbers; where it does not, the engine looks at each.
    """

    gather: Callable[..., Any]
    combine: Callable[..., Any]
    scope: Literal["tensor", "model"] = "tensor"
    ranges: Callable[[Sequence[Any], int, Mapping[str, Any]], Sequence[tuple[int, int]]] | None = None
    unit: Unit = "element"
    fold: Callable[[Any, Any], Any] | None = None
    note: Callable[[Any], str | None] | None = None
    sound: Callable[[Any], bool] | None = None


class MergeFunction(Protocol):
    """What the engine needs of a merge method; the registry's `Method` is one. Pickles by its id."""

    @property
    def id(self) -> str: ...
    @property
    def needs_base(self) -> bool: ...
    @property
    def takes_base(self) -> bool: ...
    @property
    def needs_uniform(self) -> bool: ...
    def unit(self, parameters: Mapping[str, Any]) -> Unit: ...
    def copies(self, parameters: Mapping[str, Any]) -> bool: ...
    def rounds(self, parameters: Mapping[str, Any]) -> Sequence[Round]: ...
    def merge(
        self,
        models: Sequence[torch.Tensor],
        base: torch.Tensor | None,
        uniform: Sequence[torch.Tensor] | None,
        survey: Sequence[Any],
        start: int,
        parameters: Mapping[str, Any],
    ) -> torch.Tensor: ...


class ParameterSource(ABC):
    """The parameters of one merge; they may differ from tensor to tensor (gradients over layers, filters)."""

    @abstractmethod
    def for_tensor(self, name: str) -> Mapping[str, Any]:
        """Resolved values for one output tensor: a number per global parameter, a list per per-model parameter."""

    @abstractmethod
    def describe(self) -> Any:
        """JSON-ready and canonical: equal sources give equal descriptions."""


@dataclass(frozen=True)
class Constant(ParameterSource):
    """The same values for every tensor."""

    values: Mapping[str, Any]

    def for_tensor(self, name: str) -> Mapping[str, Any]:
        return self.values

    def describe(self) -> Any:
        return dict(sorted(self.values.items()))
