"""mergekit-evolve's genome as a search space: a coordinate per gene, and the recipe that its vector means."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from modelglue.recipe import Candidate
from modelglue.recipe.genome import Genome, GenomeDefinition
from modelglue.search.space import Float, Params, Space


@dataclass(frozen=True)
class GenomeSpace:
    """Genes in the order of the vector, from 0 to 1; from -1 where weights may be negative.

    mergekit-evolve's own search has no bounds. It begins at equal weights and density 1, with a step of 1/6.
    """

    definition: GenomeDefinition
    layers: int

    @cached_property
    def genome(self) -> Genome:
        return Genome(self.definition, self.layers)

    @cached_property
    def space(self) -> Space:
        signed = self.definition.allow_negative_weights
        names = self.definition.parameters * (self.genome.size // len(self.definition.parameters))
        return Space(
            tuple(Float(f"{number:04d}/{name}", -1.0 if signed and name == "weight" else 0.0, 1.0) for number, name in enumerate(names))
        )

    def candidate(self, params: Params) -> Candidate | None:
        """The recipe of these genes; None where weights that are to be normalised are all 0."""
        vector = np.array([params[parameter.name] for parameter in self.space.parameters])
        if "weight" in self.definition.parameters and self.definition.normalised:
            weights = self.genome.decode(vector).values["weight"][:, list(self.definition.merged)]
            if (np.abs(weights.sum(axis=1)) < 1e-3).any():
                return None
        return Candidate.of({key: value for key, value in self.genome.recipe(vector).items() if key not in ("format", "tokenizer")})

    def start(self) -> dict[str, Any]:
        """Equal weights, density 1."""
        return {parameter.name: float(value) for parameter, value in zip(self.space.parameters, self.genome.start(), strict=True)}
