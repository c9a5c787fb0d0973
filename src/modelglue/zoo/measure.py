"""What can be seen of a zoo's weights at a glance: how large the changes are, how alike, how often their signs agree."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from modelglue.checkpoint import FLOATING, Checkpoint
from modelglue.checkpoint.adapted import AdaptedCheckpoint
from modelglue.checkpoint.adapter import Factors
from modelglue.errors import CheckpointError, UserError
from modelglue.settings import BLOCK_ELEMENTS
from modelglue.zoo.signature import groups, signature


@dataclass(frozen=True)
class Measured:
    """A zoo in numbers. What needs a base is None without one, or where no model differs from it."""

    models: tuple[str, ...]
    has_base: bool
    adapters: tuple[str, ...]
    proxy: bool
    """Whether there are tasks to score candidates on."""
    distinct_domains: bool
    """Whether every model is tagged with a domain of its own."""
    parameters: int
    """Of the largest model."""
    sampled: float
    """Share of the common elements that was read."""
    cosine: float | None
    """Mean over pairs of the cosine of the weights."""
    kinship: float | None
    """Mean over pairs of the cosine of the changes."""
    change: Mapping[str, float]
    """Length of a model's change, relative to the base."""
    agreement: float | None
    """Mean over pairs: share of entries, of those that both changed, that they changed in the same direction."""
    warnings: tuple[str, ...] = ()
    ranks: Mapping[str, int] = field(default_factory=dict)
    """Largest rank of every adapter."""
    same_targets: bool = True
    """Whether all adapters change the same tensors."""
    domains: tuple[str, ...] = ()
    """All domains that models are tagged with."""

    @property
    def all_adapters(self) -> bool:
        """Whether every model is an adapter on its base."""
        return set(self.models) <= set(self.adapters)

    def to_json(self) -> dict[str, Any]:
        return {name: dict(value) if isinstance(value, Mapping) else list(value) if isinstance(value, tuple) else value
                for name, value in vars(self).items()}  # fmt: skip

    def in_words(self) -> list[str]:
        """The measurements, a line each."""
        lines = [f"{len(self.models)} models{', with a base' if self.has_base else ', without a base'}; "
                 f"{100 * self.sampled:.0f} % of the common weights were read"]  # fmt: skip
        if self.ranks:
            listed = ", ".join(f"{name} rank {rank}" for name, rank in self.ranks.items())
            lines.append(f"adapters: {listed}{'' if self.same_targets else '; they change different tensors'}")
        if self.cosine is not None:
            lines.append(f"weights: mean cosine {self.cosine:.4f} over pairs")
        if self.change:
            listed = ", ".join(f"{name} {100 * value:.2g} %" for name, value in self.change.items())
            lines.append(f"changes relative to the base: {listed}")
        if self.kinship is not None and self.agreement is not None:
            lines.append(f"changes of pairs: mean cosine {self.kinship:.3f}, {100 * self.agreement:.0f} % of signs agree (50 % is chance)")
        lines.append("tasks: there are items to score candidates on" if self.proxy else "tasks: none, so nothing can be searched")
        return lines


def measure(
    models: Mapping[str, Checkpoint], base: Checkpoint | None, *, proxy: bool = False,
    domains: Sequence[Sequence[str]] = (), most: int = BLOCK_ELEMENTS,
) -> Measured:  # fmt: skip
    """Measure the first `most` elements of every floating-point tensor that all have in one shape, in one pass, in float64.

    Time: n^2 operations per element that is read. Memory: n + 1 blocks of `most` elements. UserError for no model, CheckpointError for
    weights that are NaN or infinite, or where nothing is common.
    """
    if not models:
        raise UserError("the zoo has no models.")
    models, strangers = _largest_group(models)
    tags = tuple(dict.fromkeys(tag for one in domains for tag in one))
    domains = [] if strangers else domains
    adapted = {alias: model for alias, model in models.items() if isinstance(model, AdaptedCheckpoint)}
    changed = {alias: {name: factors for name in model.names() if (factors := model.factors(name))} for alias, model in adapted.items()}
    everybody = [*models.values(), *([base] if base is not None else [])]
    common = [name for name in sorted(set.intersection(*(set(one.names()) for one in everybody))) if _alike(everybody, name)]
    left = len(set().union(*(one.names() for one in everybody))) - len(common)
    if not common:
        raise CheckpointError("the models have no weights of equal names and shapes in common, so they cannot be merged or compared.")
    count = len(models)
    products, changes, same, both = np.zeros((4, count, count))
    origin = 0.0
    read = total = 0
    for one in everybody:
        one.prepare(common)
    for name in common:
        size = everybody[0].info(name).numel
        stop = min(size, most)
        total, read = total + size, read + stop
        values = np.stack([model.read(name, 0, stop).double().numpy() for model in models.values()])
        products += values @ values.T
        if not np.isfinite(products).all():
            bad = [alias for alias, row in zip(models, values, strict=True) if not np.isfinite(row).all()]
            raise CheckpointError(f"{', '.join(bad)}: tensor '{name}' holds NaN or infinity. Leave the model out, or restore its weights.")
        if base is not None:
            start = base.read(name, 0, stop).double().numpy()
            origin += float(start @ start)
            delta = values - start
            changes += delta @ delta.T
            signs = np.sign(delta)
            moved = np.abs(signs)
            agreeing, known = signs @ signs.T, moved @ moved.T
            same += (agreeing + known) / 2
            both += known
    pairs = np.triu_indices(count, k=1)
    lengths = np.sqrt(np.diagonal(changes))
    moving = [number for number in range(count) if lengths[number] > 0]
    warnings = [f"{', '.join(strangers)}: of another architecture or vocabulary, and left out."] if strangers else []
    warnings += [f"{left} tensors are not in all models in one shape and left out."] if left else []
    if base is not None:
        warnings += [f"{alias}: is identical to the base." for number, alias in enumerate(models) if number not in moving]
    return Measured(
        models=tuple(models), has_base=base is not None, adapters=tuple(adapted), proxy=proxy,
        distinct_domains=len(domains) == count > 1 and all(domains) and sum(map(len, domains)) == len({tag for d in domains for tag in d}),
        parameters=max(sum(one.info(name).numel for name in one.names()) for one in models.values()), sampled=read / total,
        cosine=_mean(_cosines(products), pairs), kinship=None if base is None else _mean(_cosines(changes), pairs),
        change={alias: float(lengths[number] / np.sqrt(origin)) for number, alias in enumerate(models)} if origin else {},
        agreement=None if base is None else _mean(np.divide(same, both, out=np.full_like(same, np.nan), where=both > 0), pairs),
        warnings=tuple(warnings), ranks={alias: _rank(found) for alias, found in changed.items()},
        same_targets=len({frozenset(found) for found in changed.values()}) < 2, domains=tags,
    )  # fmt: skip


def _rank(changed: Mapping[str, Sequence[Factors]]) -> int:
    return max((one.A.shape[0] for factors in changed.values() for one in factors), default=0)


def _largest_group(models: Mapping[str, Checkpoint]) -> tuple[dict[str, Checkpoint], list[str]]:
    """The models of the largest group that can be merged, and the names of the others."""
    names = list(models)
    largest = max(groups([signature(model) for model in models.values()]), key=len)
    kept = {names[number]: models[names[number]] for number in sorted(largest)}
    return kept, [name for name in names if name not in kept]


def _alike(models: Sequence[Checkpoint], name: str) -> bool:
    infos = [model.info(name) for model in models]
    return infos[0].numel > 0 and all(info.shape == infos[0].shape and info.dtype in FLOATING for info in infos)


def _cosines(products: Any) -> Any:
    lengths = np.sqrt(np.diagonal(products))
    bottom = np.outer(lengths, lengths)
    return np.clip(np.divide(products, bottom, out=np.full_like(products, np.nan), where=bottom > 0), -1, 1)


def _mean(matrix: Any, pairs: Any) -> float | None:
    values = matrix[pairs]
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else None
