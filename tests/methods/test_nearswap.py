from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.methods.merging import family, lengths, merge, randn, seeds


@settings(max_examples=25, deadline=None)
@given(lengths, seeds, st.floats(0, 0.5))
def test_moves_by_t_at_most_and_not_past_the_model(length: int, seed: int, t: float) -> None:
    base, (model, *_) = family(length, seed)
    found = merge("nearswap", [model], base, t=t)
    moved = (found.double() - base.double()).abs()
    assert bool((moved <= t * (1 + 1e-6) + 1e-6).all())
    assert bool(((found >= torch.minimum(base, model)) & (found <= torch.maximum(base, model))).all())
    near = (model - base).abs() <= t * (1 - 1e-6)
    assert torch.equal(found[near], model[near])
    far = (model - base).abs() > t * (1 + 1e-6) + 1e-6
    torch.testing.assert_close(moved[far], torch.full_like(moved[far], t), rtol=1e-3, atol=1e-6)


def test_the_formula() -> None:
    base = torch.tensor([1.0, 1.0, 1.0, 1.0])
    model = torch.tensor([1.25, 1.5, 3.0, 0.0])
    assert torch.equal(merge("nearswap", [model], base, t=0.5), torch.tensor([1.25, 1.5, 1.5, 0.5]))


def test_no_step_gives_the_base_bit_by_bit() -> None:
    base, (model, *_) = family(90, 1)
    for t in (0.0, -0.3):
        assert torch.equal(merge("nearswap", [model], base, t=t), base)


def test_a_long_step_gives_the_model_bit_by_bit() -> None:
    base, model = 100 * randn(90), 1e-3 * randn(90, seed=1)
    assert torch.equal(merge("nearswap", [model], base, t=1e4), model)
