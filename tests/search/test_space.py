"""Search spaces: the unit cube and back, one canonical form, conditions, grids."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modelglue.errors import UserError
from modelglue.search.space import Bool, Choice, Float, Int, Parameter, Simplex, Space, When

few = settings(max_examples=30, deadline=None)

SPACE = Space(
    (
        Float("weight", -0.5, 1.5),
        Float("rate", 1e-3, 10.0, log=True),
        Int("layers", 2, 5),
        Choice("method", ("ties", "linear", "slerp")),
        Float("density", 0.01, 1.0, when=When("method", ("ties",))),
        Bool("normalize"),
        Simplex("shares", 3),
        Simplex("soft", 3, softmax=True),
    )
)
cubes = st.lists(st.floats(0, 1), min_size=SPACE.dimensions, max_size=SPACE.dimensions)


@few
@given(cubes)
def test_canonical_is_one_form(x: list[float]) -> None:
    params = SPACE.from_unit_cube(x)
    once = SPACE.canonical(params)
    assert SPACE.canonical(once) == once
    for name in ("layers", "method", "normalize"):
        assert once[name] == params[name]
    assert once["weight"] == pytest.approx(params["weight"], abs=2e-6)
    assert once["rate"] == pytest.approx(params["rate"], rel=1e-3, abs=2e-6)
    for name in ("shares", "soft"):
        assert sum(once[name]) == pytest.approx(1, abs=4e-6)
        assert once[name] == pytest.approx(params[name], abs=4e-6)
    assert ("density" in once) == (once["method"] == "ties")


@few
@given(cubes)
def test_values_are_in_their_ranges(x: list[float]) -> None:
    params = SPACE.from_unit_cube(x)
    assert -0.5 <= params["weight"] <= 1.5
    assert 1e-3 <= params["rate"] <= 10
    assert params["layers"] in (2, 3, 4, 5)
    assert isinstance(params["normalize"], bool)
    assert all(share >= 0 for share in params["shares"] + params["soft"])


def test_different_points_of_one_recipe_are_one_choice() -> None:
    space = Space((Simplex("shares", 2),))
    assert space.from_unit_cube([0.2, 0.1]) == space.from_unit_cube([0.8, 0.4]) == {"shares": [0.666667, 0.333333]}
    assert space.from_unit_cube([0.0, 1e-9]) == {"shares": [0.5, 0.5]}


def test_every_whole_number_has_its_share_and_the_ends_count() -> None:
    space = Space((Int("n", 0, 3),))
    found = [space.from_unit_cube([u])["n"] for u in (0, 0.2499, 0.25, 0.5, 0.7499, 0.75, 1)]
    assert found == [0, 0, 1, 2, 2, 3, 3]


def test_a_logarithmic_range_has_its_middle_at_the_geometric_mean() -> None:
    space = Space((Float("rate", 0.01, 1.0, log=True),))
    assert space.from_unit_cube([0.5]) == {"rate": 0.1}
    assert space.to_unit_cube({"rate": 0.1}) == pytest.approx([0.5])


def test_a_range_of_one_value() -> None:
    space = Space((Float("weight", 0.3, 0.3),))
    assert space.canonical({"weight": 0.3}) == {"weight": 0.3}


def test_points_outside_are_taken_to_the_border() -> None:
    assert Space((Float("weight", 0, 1),)).from_unit_cube([1.7]) == {"weight": 1.0}
    with pytest.raises(UserError, match=r"shape \[2\] in a search space of 1"):
        Space((Float("weight", 0, 1),)).from_unit_cube([1, 2])


def test_a_grid_has_every_combination_once() -> None:
    space = Space((Choice("method", ("ties", "linear")), Float("density", 0, 1, when=When("method", ("ties",))), Simplex("w", 2)))
    grid = space.grid(2)
    assert len(grid) == 2 * 3 + 3
    assert {"method": "ties", "density": 1.0, "w": [0.5, 0.5]} in grid
    assert [one for one in grid if one["method"] == "linear"] == [
        {"method": "linear", "w": w} for w in ([1.0, 0.0], [0.5, 0.5], [0.0, 1.0])
    ]  # fmt: skip
    assert Space((Int("n", 1, 9),)).grid(3) == [{"n": 1}, {"n": 5}, {"n": 9}]
    assert Space((Float("x", 0, 1),)).grid(1) == [{"x": 0.5}]


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ([], "there is nothing to search"),
        ([Float("a", 0, 1), Int("a", 0, 1)], "a: is named twice"),
        ([Float("a", 1, 0)], "allowed are finite bounds, the lower one first"),
        ([Float("a", 0, float("inf"))], "finite bounds"),
        ([Float("a", 0, 1, log=True)], "a lower bound above 0"),
        ([Int("a", 2, 1)], "the lower one first"),
        ([Choice("a", ())], "needs values"),
        ([Choice("a", (1, 1))], "each named once"),
        ([Simplex("a", 0)], "allowed is 1 or more"),
        ([Float("a", 0, 1, when=When("b", (1,))), Bool("b")], "depends on 'b', which does not come before it"),
    ],
)
def test_what_is_no_space(parameters: list[Parameter], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Space(tuple(parameters))


def test_what_is_not_named_stands_in_the_middle() -> None:
    params: dict[str, Any] = {"method": "linear"}
    point = SPACE.to_unit_cube(params)
    assert np.array_equal(np.delete(point, 3), np.full(SPACE.dimensions - 1, 0.5))
