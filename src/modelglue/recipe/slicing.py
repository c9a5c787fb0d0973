"""From the slices of a recipe to the tensors that are merged: which layer of which model becomes which tensor of the output."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from modelglue.checkpoint import Checkpoint, RenamedCheckpoint
from modelglue.recipe.layer_config import LayerSource
from modelglue.recipe.layers import Tower, position
from modelglue.recipe.settings import Spot


@dataclass(frozen=True)
class Run:
    """One model's part in a slice: its layers `start` to `stop` - 1."""

    model: Checkpoint
    tower: Tower
    start: int
    stop: int

    @property
    def length(self) -> int:
        return self.stop - self.start

    def names(self, at: int, total: int, *, first: bool, last: bool) -> dict[str, str]:
        """Output name -> name in the model, for a slice whose first layer becomes layer `at` of `total`."""
        found = {}
        for number in range(self.start, self.stop):
            for name in self.tower.layers[number]:
                found[self.tower.renumbered(name, at - self.start)] = name
        if first:
            found |= {name: name for name in self.tower.before}
        if last:
            found |= {self.tower.renumbered(name, total - self.tower.count): name for name in self.tower.after}
        return found


@dataclass(frozen=True)
class Cut:
    """A slice, ready to be merged: views of the models under the output's names, and where every tensor stands."""

    models: tuple[Checkpoint, ...]
    base: Checkpoint | None
    spots: dict[str, Spot]
    layers: tuple[LayerSource, ...]


def cut(runs: Sequence[Run], base: Run | None, at: int, total: int, *, first: bool, last: bool) -> Cut:
    """A slice that becomes the layers from `at` on. The embeddings come with the first slice, final norm and head with the last."""
    inputs = [*runs, *([base] if base is not None else [])]
    maps = [run.names(at, total, first=first, last=last) for run in inputs]
    length = runs[0].length
    spots = {}
    for name in sorted(frozenset().union(*maps)):
        owner = next(run for run, names in zip(inputs, maps, strict=True) if name in names)
        number = owner.tower.number_of(name)
        inside = number is not None and at <= number < at + length and owner.tower.number_of(maps[inputs.index(owner)][name]) is not None
        t = position(number - at, length) if inside and number is not None else 0.0
        spots[name] = Spot(t, tuple(names.get(name, name) for names in maps[: len(runs)]))
    views = [RenamedCheckpoint(run.model, names) for run, names in zip(inputs, maps, strict=True)]
    source = base or runs[0]
    layers = tuple(LayerSource(source.model.config, number) for number in range(source.start, source.stop))
    return Cut(tuple(views[: len(runs)]), views[-1] if base is not None else None, spots, layers)
