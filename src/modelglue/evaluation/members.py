"""What candidates are made of: the open models, and how a candidate becomes a checkpoint over them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from modelglue.checkpoint import ENGINE_VERSION, Checkpoint, MergedCheckpoint
from modelglue.recipe import Candidate, build, read_recipe

#: merges of one set of members whose shapes have been compared, kept for the next coefficients
_TEMPLATES = 64
#: how far from 1 the coefficients of a normalised merge may sum
_ROUNDING = 1e-9


class Members:
    """Open models by alias; members stay mapped, and nothing is read. Picklable: a worker maps the files itself.

    `store_dtype` is what merges are stored in (default: as the first member is stored): a candidate is scored with the rounding that its
    saved form would have.
    """

    def __init__(self, checkpoints: Mapping[str, Checkpoint], store_dtype: str | None = None) -> None:
        self.checkpoints = checkpoints
        self.store_dtype = store_dtype
        self._templates: dict[tuple[str, ...], MergedCheckpoint] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_templates": {}}

    def identity(self, candidate: Candidate) -> str:
        """SHA-256 (hex) that changes with any member's content, any coefficient (at 1e-6), the method, or the stored dtype.

        A member by itself has the identity of its checkpoint, so its scores are shared with every other use of the model.
        """
        contents = {alias: self.checkpoints[alias].identity for alias in candidate.aliases}
        if candidate.alone is not None:
            return contents[candidate.alone]
        recipe = [ENGINE_VERSION, candidate.key_over(contents), self.store_dtype]
        return hashlib.sha256(json.dumps(recipe).encode()).hexdigest()

    def expression(self, candidate: Candidate) -> Checkpoint:
        """The candidate as a checkpoint. RecipeError or MergeError for one that is no model."""
        if candidate.alone is not None:
            return self.checkpoints[candidate.alone]
        plain = candidate.is_linear and abs(sum(candidate.weights) - 1) < _ROUNDING
        if plain and (template := self._templates.get(candidate.members)) is not None:
            values = template.parameters.for_tensor(template.names()[0])
            return template.with_parameters({**values, "weight": list(candidate.weights)})
        recipe = dict(candidate.recipe)
        if self.store_dtype is not None:
            recipe["dtype"] = {"store": self.store_dtype}
        made = build(read_recipe(recipe), resolve=self.checkpoints.__getitem__)
        if plain and isinstance(made, MergedCheckpoint) and made.names():
            if len(self._templates) >= _TEMPLATES:
                del self._templates[next(iter(self._templates))]
            self._templates[candidate.members] = made
        return made
