"""Genotypes become recipes: every method, every granularity, and the recipe says what was meant for every tensor."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modelglue.errors import UserError
from modelglue.methods import all_methods
from modelglue.recipe import Candidate, read_recipe
from modelglue.recipe.settings import read_setting
from modelglue.search.decode import MergeSpace, NearbySpace

few = settings(max_examples=30, deadline=None)
MEMBERS = ("a", "b", "c")
NAMES = {
    "model.embed_tokens.weight": None,
    **{
        f"model.layers.{layer}.{part}.weight": layer
        for layer in range(7)
        for part in ("self_attn.q_proj", "mlp.up_proj", "input_layernorm")
    },
    "model.norm.weight": None,
}


def value_at(setting: Any, name: str, layer: int | None) -> float:
    """What a recipe's setting gives one tensor of a model with seven layers."""
    found, faults = read_setting(setting)
    assert not faults
    return float(found.at(name, 0.0 if layer is None else layer / 6))


# -- methods ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [method.id for method in all_methods()])
def test_every_method_can_be_searched(method: str) -> None:
    """With default ranges where there are any, else with a range of a parameter; what comes out is a valid recipe over the members."""
    extra: dict[str, dict[str, Any]] = {
        "karcher": {"max_iter": [1, 10]}, "model_stock": {"filter_wise": [False, True]}, "ram": {"epsilon": [1e-6, 1e-3]},
        "ramplus_tl": {"alpha": [0.0, 1.0]}, "passthrough": {"scale": [0.5, 1.5]},
    }  # fmt: skip
    members = {"passthrough": ("a",), "nuslerp": ("a", "b"), "slerp": ("a", "b"), "nearswap": ("a", "b")}.get(method, MEMBERS)
    if method == "arcee_fusion":
        with pytest.raises(UserError, match="arcee_fusion has no parameter that is searched by itself"):
            MergeSpace(method, ("a", "b"))
        return
    base = None if method in ("slerp", "nearswap", "linear", "passthrough") else "o"
    found = MergeSpace(method, members, base, parameters=extra.get(method, {}))
    for seed in range(3):
        candidate = found.candidate(found.space.from_unit_cube(np.random.default_rng(seed).random(found.space.dimensions)))
        assert candidate is not None
        recipe = read_recipe(dict(candidate.recipe))
        assert recipe.method == method
        assert set(candidate.aliases) <= {*members, "o"}


def test_the_weights_of_a_linear_merge_are_shares() -> None:
    space = MergeSpace("linear", MEMBERS)
    assert space.space.dimensions == 3
    assert space.candidate({"weight": [0.5, 0.0, 0.5]}) == Candidate.linear({"a": 1, "c": 1})
    assert space.candidate({"weight": [0.0, 1.0, 0.0]}) == Candidate.single("b")
    found = space.candidate(space.space.from_unit_cube([0.2, 0.6, 0.0]))
    assert found is not None
    assert found.weights == (0.25, 0.75)


def test_weights_that_are_given_a_range_are_numbers() -> None:
    space = MergeSpace("linear", MEMBERS, parameters={"weight": [-1, 1]})
    assert [parameter.name for parameter in space.space.parameters] == ["weight/a", "weight/b", "weight/c"]
    assert space.candidate({"weight/a": 0.5, "weight/b": -0.25, "weight/c": 0.0}) == Candidate.linear({"a": 2, "b": -1})
    assert space.candidate({"weight/a": 0.5, "weight/b": -0.5, "weight/c": 0.0}) is None


def test_task_vectors_without_weight_leave_the_base() -> None:
    space = MergeSpace("task_arithmetic", MEMBERS, "o")
    assert space.candidate(space.everywhere({"weight": {"a": 0, "b": 0, "c": 0}})) == Candidate.single("o")
    found = space.candidate(space.everywhere({"weight": {"a": 0, "b": 0.5, "c": 0}}))
    assert found == Candidate.of({"method": "task_arithmetic", "base": "o", "models": [{"model": "b", "weight": 0.5}]})


def test_masks_of_random_methods_stay_with_their_models() -> None:
    """A model without weight keeps its place, as the masks go by it; the seed is the run's, not the candidate's."""
    space = MergeSpace("dare_linear", MEMBERS, "o", seed=7)
    values = {"weight": {"a": 0.0, "b": 0.5, "c": 0.5}, "density": dict.fromkeys(MEMBERS, 0.5)}
    found = space.candidate(space.everywhere(values))
    assert found is not None
    assert [entry["model"] for entry in found.recipe["models"]] == ["a", "b", "c"]
    assert found.recipe["seed"] == 7


def test_two_model_methods_go_from_the_first_member_to_the_second() -> None:
    space = MergeSpace("slerp", ("a", "b"))
    assert space.candidate({"t": 0.25}) == Candidate.of(
        {"method": "slerp", "base": "a", "models": [{"model": "b"}], "parameters": {"t": 0.25}}
    )
    with pytest.raises(UserError, match="slerp of 3 members"):
        MergeSpace("slerp", MEMBERS)


def test_fixed_values_logarithms_and_choices() -> None:
    said = {"lambda": 0.8, "normalize": [True, False], "density": {"low": 0.01, "high": 1.0, "log": True}, "agreeing": {"choices": ["sum"]}}
    space = MergeSpace("ties", ("a",), "o", parameters=said)
    found = space.candidate(space.space.from_unit_cube(np.full(space.space.dimensions, 0.5)))
    assert found is not None
    assert found.recipe["parameters"] == {"lambda": 0.8, "normalize": True, "agreeing": "sum"}
    assert found.recipe["models"] == [{"model": "a", "weight": 0.5, "density": 0.1}]


# -- granularity ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("granularity", "groups"), [("layer", 7), (1, 7), (2, 4), (3, 3), (6, 2), (7, 0), (32, 0), ("gradient:3", 3)])
def test_groups_of_layers_and_what_is_in_no_layer(granularity: Any, groups: int) -> None:
    """g >= L means one vector; else ceil(L / g) groups and one for embedding, norm and head; block-major."""
    space = MergeSpace("linear", MEMBERS, granularity=granularity, layers=7)
    assert space.space.dimensions == 3 * (groups + 1)
    if groups:
        assert [parameter.name for parameter in space.space.parameters] == [*(f"g{n}/weight" for n in range(groups)), "rest/weight"]


@few
@given(st.data(), st.sampled_from(["layer", 2, 3, 5]), st.sampled_from([(), ("self_attn",), ("self_attn", "mlp")]))
def test_a_recipe_gives_every_tensor_the_value_of_its_group(data: st.DataObject, granularity: Any, filters: tuple[str, ...]) -> None:
    space = MergeSpace("task_arithmetic", ("a", "b"), "o", granularity, 7, filters=filters)
    params = space.space.from_unit_cube(
        data.draw(st.lists(st.floats(0.01, 1), min_size=space.space.dimensions, max_size=space.space.dimensions))
    )
    found = space.candidate(params)
    assert found is not None
    assert read_recipe(dict(found.recipe)).method == "task_arithmetic"
    size = 1 if granularity == "layer" else granularity
    for entry in found.recipe["models"]:
        for name, layer in NAMES.items():
            kind = next((one for one in filters if one in name), "")
            group = "rest" if layer is None else "/".join(part for part in (f"g{layer // size}", kind) if part)
            assert value_at(entry["weight"], name, layer) == pytest.approx(params[f"{group}/weight/{entry['model']}"], abs=1e-12)


@pytest.mark.parametrize("granularity", ["layer", 3, "gradient:4"])
def test_equal_groups_are_the_global_vector(granularity: Any) -> None:
    for method, base, values in [
        ("linear", None, {"weight": {"a": 0.2, "b": 0.3, "c": 0.5}}),
        ("ties", "o", {"weight": {"a": 0.2, "b": 0.3, "c": 0.5}, "density": dict.fromkeys(MEMBERS, 0.5)}),
    ]:
        fine = MergeSpace(method, MEMBERS, base, granularity, 7, filters=("mlp",))
        plain = MergeSpace(method, MEMBERS, base)
        one, other = fine.candidate(fine.everywhere(values)), plain.candidate(plain.everywhere(values))
        assert one is not None
        assert one == other


def test_a_gradient_is_a_curve_over_the_layers() -> None:
    space = MergeSpace("slerp", ("a", "b"), granularity="gradient:3", layers=7, filters=("self_attn",))
    params = {f"g{n}/self_attn/t": t for n, t in enumerate((0.0, 1.0, 0.5))} | {f"g{n}/t": 0.25 for n in range(3)} | {"rest/t": 0.75}
    found = space.candidate(params)
    assert found is not None
    assert found.recipe["parameters"]["t"] == [
        {"filter": "self_attn", "value": [0.0, 1.0, 0.5]}, {"filter": "layers.", "value": 0.25}, {"value": 0.75}
    ]  # fmt: skip


def test_words_differ_from_layer_to_layer_by_clauses() -> None:
    """A gradient is of numbers; yes and no of neighbouring layers stand in a clause each."""
    space = MergeSpace("model_stock", MEMBERS, "o", 2, 3, parameters={"filter_wise": [False, True]})
    found = space.candidate({"g0/filter_wise": True, "g1/filter_wise": False, "rest/filter_wise": False})
    assert found is not None
    assert found.recipe["parameters"]["filter_wise"] == [
        {"filter": "layers.0.", "value": True}, {"filter": "layers.1.", "value": True}, {"filter": "layers.2.", "value": False},
        {"value": False},
    ]  # fmt: skip
    read_recipe(dict(found.recipe))
    with pytest.raises(UserError, match="filter_wise: has values that are no numbers"):
        MergeSpace("model_stock", MEMBERS, "o", "gradient:2", 3, parameters={"filter_wise": [False, True]})


def test_which_model_is_searched_where_a_method_takes_one() -> None:
    """Beside the parameters, and alone where there are none."""
    space = MergeSpace("slerp", MEMBERS, "o")
    assert [parameter.name for parameter in space.space.parameters] == ["model", "t"]
    found = space.candidate({"model": "b", "t": 0.25})
    assert found is not None
    assert found.recipe == {"method": "slerp", "base": "o", "models": [{"model": "b"}], "parameters": {"t": 0.25}}
    fusion = MergeSpace("arcee_fusion", MEMBERS, "o", "layer", 7)
    assert fusion.space.grid(5) == [{"model": "a"}, {"model": "b"}, {"model": "c"}]
    assert fusion.candidate({"model": "c"}) == Candidate.of({"method": "arcee_fusion", "base": "o", "models": [{"model": "c"}]})


def test_only_what_a_filter_matches_varies() -> None:
    space = MergeSpace("slerp", ("a", "b"), granularity="gradient:2", layers=7, filters=("mlp",), only_filtered=True)
    assert [parameter.name for parameter in space.space.parameters] == ["g0/mlp/t", "g1/mlp/t", "rest/t"]
    found = space.candidate({"g0/mlp/t": 0.0, "g1/mlp/t": 1.0, "rest/t": 0.25})
    assert found is not None
    assert found.recipe["parameters"]["t"] == [{"filter": "mlp", "value": [0.0, 1.0]}, {"value": 0.25}]
    for wrong in ({"filters": ()}, {"granularity": "model"}):
        with pytest.raises(UserError, match="only_filtered needs filters"):
            MergeSpace("slerp", ("a", "b"), **{"granularity": "layer", "layers": 7, "filters": ("mlp",), "only_filtered": True, **wrong})


# -- refusals ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"method": "ties"}, "ties needs a base"),
        ({"method": "linear", "members": ()}, "at least one"),
        ({"method": "linear", "members": ("a", "a")}, "each named once"),
        ({"method": "linear", "parameters": {"wieght": [0, 1]}}, "no parameter 'wieght'.*Did you mean 'weight'"),
        ({"method": "linear", "parameters": {"weight": [0, 1, 2]}}, r"weight/a is \[0, 1, 2\]; allowed are"),
        ({"method": "ties", "base": "o", "parameters": {"density": [0, 2]}}, r"density/a is searched from 0 to 2: density is 0, allowed"),
        ({"method": "linear", "granularity": "layer"}, "needs the number of layers"),
        ({"method": "linear", "granularity": "layers", "layers": 4}, "granularity is 'layers'; allowed are model, layer"),
        ({"method": "linear", "granularity": "gradient:0", "layers": 4}, "granularity is 'gradient:0'"),
        ({"method": "linear", "parameters": {"weight": 0.5}}, "no parameter that is searched by itself"),
    ],
)
def test_what_cannot_be_searched(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        MergeSpace(**{"members": MEMBERS, **arguments})


# -- near a merge -----------------------------------------------------------------------------------------------------------------


def test_small_changes_to_coefficients() -> None:
    space = NearbySpace({"a": 0.5, "b": 0.05, "c": 0.45, "d": 0.0})
    assert space.candidate({"a": 0.0, "b": 0.0, "c": 0.0, "d": 0.0}) == Candidate.linear({"a": 0.5, "b": 0.05, "c": 0.45})
    moved = space.candidate({"a": 0.1, "b": -0.1, "c": 0.0, "d": 0.05})
    assert moved == Candidate.linear({"a": 0.6, "c": 0.45, "d": 0.05})
    assert NearbySpace({"a": 1.0, "b": 0.0}, free_zero=False).space.dimensions == 1
    assert NearbySpace({"a": 0.05, "b": 0.0}).candidate({"a": -0.1}) == Candidate.linear({"a": 1, "b": 1})
