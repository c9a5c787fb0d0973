"""Weights that nearly cancel are warned of, from the weights alone."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modelglue.checkpoint import TensorsCheckpoint
from modelglue.methods import all_methods
from modelglue.methods._weights import some_cancel
from modelglue.recipe import build_with_warnings, read_recipe
from tests.zoo.models import CONFIG, tensors

ALL = "linear: the weights nearly cancel: all is divided by their sum, -0.0001. Change them, or set normalize: false."
SOME = (
    "weights of both signs nearly cancel where the models that have them agree; what is divided by so little comes out far too large. "
    "Give weights of one sign, or set normalize: false."
)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(-100, 100), min_size=1, max_size=7), st.sampled_from([1.0, 1e-3, 37.0]))
def test_it_is_what_trying_every_subset_finds(numbers: list[int], unit: float) -> None:
    """Sums of whole numbers are 0 or at least 1, and a thousandth of all is 0.7 at most: no rounding decides."""
    whole = sum(map(abs, numbers))
    subsets = (one for size in range(2, len(numbers) + 1) for one in itertools.combinations(numbers, size) if min(one) < 0 < max(one))
    assert some_cancel([number * unit for number in numbers]) == any(abs(sum(one)) < 1e-3 * whole for one in subsets)


@pytest.mark.parametrize(
    ("weights", "cancels"),
    [
        ([1.0, -1.0], True), ([0.1, 0.2, -0.3], True), ([1.0, 1e-6], False), ([1.0, -0.99], False), ([1.0, -0.9999], True),
        ([0.0, 0.0], False), ([-1.0, -1e-9], False), ([0.05] * 60 + [-1.5], True), ([0.05] * 60 + [-4.0], False),
    ],
)  # fmt: skip
def test_examples(weights: list[float], cancels: bool) -> None:
    assert some_cancel(weights) == cancels


def warnings_of(method: str, weights: list[float], **parameters: Any) -> tuple[str, ...]:
    models = {f"m{number}": TensorsCheckpoint(tensors(number), CONFIG, label=f"m{number}") for number in range(len(weights) + 1)}
    entries = [{"model": f"m{number}", "weight": weight} for number, weight in enumerate(weights, 1)]
    base = {} if method == "linear" else {"base": "m0"}
    value = {"method": method, **base, "models": entries, "parameters": parameters}
    return build_with_warnings(read_recipe(value), models.__getitem__).warnings


def test_sums_of_all_weights() -> None:
    assert warnings_of("linear", [0.4999, -0.5]) == (f"<recipe>: {ALL}",)
    assert warnings_of("linear", [0.4999, -0.5], normalize=False) == ()
    assert warnings_of("linear", [0.5, -0.4]) == ()
    nothing = "the weights sum to 0, so nothing is divided. Change them, or set normalize: false."
    for method in ("task_arithmetic", "dare_linear", "breadcrumbs", "della_linear"):
        assert warnings_of(method, [0.5, -0.5], normalize=True) == (f"<recipe>: {method}: {nothing}",)
        assert warnings_of(method, [0.5, -0.5]) == ()


def test_sums_of_weights_that_agree() -> None:
    for method in ("ties", "dare_ties", "breadcrumbs_ties", "della"):
        assert warnings_of(method, [1.0, 0.5, -0.5], normalize=True) == (f"<recipe>: {method}: {SOME}",)
        assert warnings_of(method, [1.0, 0.5, -0.5], normalize=False) == ()
        assert warnings_of(method, [1.0, 0.5, -0.3], normalize=True) == ()
    assert warnings_of("ties", [1.0, 0.5, -0.5], agreeing="largest") == ()


def test_every_method_that_divides_by_weights_warns() -> None:
    """A new method with these two parameters says something of them, one way or the other."""
    for method in all_methods():
        if {"weight", "normalize"} <= {parameter.name for parameter in method.parameters}:
            values, _ = method.resolve({"weight": 0.0, "normalize": True}, [{"weight": 0.5}, {"weight": -0.49999}], ["a", "b"])
            assert method.odd(values, ["a", "b"]), method.id


def test_values_of_single_layers_count() -> None:
    models = {name: TensorsCheckpoint(tensors(seed), CONFIG, label=name) for seed, name in enumerate("ab")}
    entries = [{"model": "a", "weight": 0.5}, {"model": "b", "weight": [0.5, -0.4999]}]
    found = build_with_warnings(read_recipe({"method": "linear", "models": entries}), models.__getitem__).warnings
    assert found == (
        "<recipe>: linear: the weights nearly cancel: all is divided by their sum, 0.0001. Change them, or set normalize: false.",
    )
