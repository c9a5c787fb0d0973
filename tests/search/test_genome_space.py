"""mergekit-evolve's genome as a search space: the recipe of a point is that of its vector."""

from __future__ import annotations

import numpy as np
import pytest

from modelglue.recipe.genome import Genome, GenomeDefinition
from modelglue.search.genome_space import GenomeSpace

DEFINITION = GenomeDefinition(models=("a", "b"), merge_method="dare_ties", base_model="o", layer_granularity=2, filters=("mlp",))


def test_a_point_is_the_recipe_of_its_vector() -> None:
    space = GenomeSpace(DEFINITION, 4)
    vector = np.random.default_rng(0).random(space.space.dimensions).round(6)
    candidate = space.candidate(space.space.from_unit_cube(vector))
    expected = Genome(DEFINITION, 4).recipe(vector)
    assert expected.pop("format") == "modelglue/1"
    assert candidate is not None
    assert candidate.recipe == expected
    assert space.space.dimensions == 2 * 2 * 2 * 2


def test_the_start_is_equal_weights_and_density_one() -> None:
    assert list(GenomeSpace(DEFINITION, 4).start().values()) == [0.5, 1.0] * 8


@pytest.mark.parametrize(("negative", "low"), [(False, 0.0), (True, -1.0)])
def test_weights_may_be_negative_where_the_genome_allows_it(negative: bool, low: float) -> None:
    definition = GenomeDefinition(models=("a", "b"), merge_method="linear", allow_negative_weights=negative)
    space = GenomeSpace(definition, 4)
    assert list(space.space.from_unit_cube([0.0, 1.0]).values()) == [low, 1.0]
    assert (space.candidate(space.space.from_unit_cube([0.0, 1.0])) is None) is negative  # -1 and 1 cannot be normalised
