from __future__ import annotations

import logging
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from modelglue.methods import get
from tests.methods.merging import Tensor, merge, randn, seeds


def expected(models: list[Tensor], max_iter: int = 10, tol: float = 1e-5) -> Tensor:
    """The definition, on whole vectors in float64."""
    flat = [model.double().flatten() for model in models]
    lengths = [float(vector.norm()) for vector in flat]
    units = [vector / length for vector, length in zip(flat, lengths, strict=True) if length > tol]
    share = 1 / len(units)
    u = torch.stack(units).sum(0) * share
    u = u / u.norm()
    for _ in range(max_iter):
        step = torch.zeros_like(u)
        for unit in units:
            cosine = max(-1.0, min(1.0, float(u @ unit)))
            angle = math.acos(cosine)
            if angle >= tol:
                step += share * angle / math.sin(angle) * (unit - cosine * u)
        length = float(step.norm())
        if length < tol:
            break
        u = math.cos(length) * u + math.sin(length) * step / length
        u = u / u.norm()
    return (u * sum(lengths) / len(lengths)).view(models[0].shape).float()


@settings(max_examples=25, deadline=None)
@given(st.integers(2, 5), st.integers(8, 90), seeds, st.integers(0, 12))
def test_is_the_formula(n: int, length: int, seed: int, max_iter: int) -> None:
    models = [(1 + i) * (randn(length, seed=seed + i) + 0.6) for i in range(n)]
    found = merge("karcher", models, max_iter=max_iter, tol=1e-5)
    torch.testing.assert_close(found, expected(models, max_iter), rtol=1e-4, atol=1e-4)


@settings(max_examples=15, deadline=None)
@given(st.integers(4, 60), seeds)
def test_two_models_of_equal_length_meet_in_the_middle_of_the_arc(length: int, seed: int) -> None:
    one, two = (v / v.norm() for v in (randn(length, seed=seed), randn(length, seed=seed + 1)))
    if abs(float(one @ two)) < 0.99:
        torch.testing.assert_close(merge("karcher", [one, two]), merge("slerp", [two], one, t=0.5), rtol=1e-4, atol=1e-6)


@settings(max_examples=15, deadline=None)
@given(seeds, st.floats(0.1, 100))
def test_scales_with_the_models_and_knows_no_order(seed: int, scale: float) -> None:
    models = [randn(6, 7, seed=seed + i) for i in range(3)]
    found = merge("karcher", models)
    torch.testing.assert_close(merge("karcher", [scale * model for model in models]), scale * found, rtol=1e-4, atol=1e-5 * scale)
    torch.testing.assert_close(merge("karcher", models[::-1]), found, rtol=1e-4, atol=1e-5)


def test_iterations_matter_for_three_models() -> None:
    models = [randn(40, seed=i) for i in range(3)]
    assert not torch.allclose(merge("karcher", [*models, models[0]], max_iter=0), merge("karcher", [*models, models[0]]), atol=1e-4)


def test_one_model_is_returned_bit_by_bit() -> None:
    assert torch.equal(merge("karcher", [randn(50)]), randn(50))


def test_a_zero_tensor_lowers_the_length() -> None:
    model = randn(40)
    torch.testing.assert_close(merge("karcher", [model, torch.zeros(40)]), 0.5 * model)
    assert torch.equal(merge("karcher", [torch.zeros(40)] * 2), torch.zeros(40))


def test_opposite_models_are_averaged_linearly_and_named(caplog: pytest.LogCaptureFixture) -> None:
    model = randn(40)
    with caplog.at_level(logging.WARNING):
        torch.testing.assert_close(merge("karcher", [model, -3 * model]), -model)
    assert [record.getMessage() for record in caplog.records] == [
        "karcher: tensor 't': models point in opposite directions, which have no mean on the sphere; averaged linearly"
    ]


def test_what_has_a_mean_warns_of_nothing(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        merge("karcher", [randn(40), randn(40, seed=1)])
    assert caplog.records == []


def test_max_iter_is_a_whole_number() -> None:
    values, faults = get("karcher").resolve({"max_iter": 7.0}, [{}], ["a"])
    assert faults == []
    assert values["max_iter"] == 7
    assert isinstance(values["max_iter"], int)
    for bad, fault in (
        (2.5, "is 2.5, allowed is a whole number"),
        (-1, "is -1, allowed is [0, inf)"),
        (True, "is True, allowed is a number"),
    ):
        _, faults = get("karcher").resolve({"max_iter": bad}, [{}], ["a"])
        assert faults == [f"parameters: max_iter {fault}"]
