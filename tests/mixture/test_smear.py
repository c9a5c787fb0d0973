"""Soft merging of experts: what averaging parameters must come to where the answer is known."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from modelglue.errors import UserError
from modelglue.mixture.smear import Adapter, Smear, SmearRouter

WIDTH, EXPERTS = 6, 3


def _nonlinear(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(WIDTH, 5), nn.SiLU(), nn.Linear(5, WIDTH))


def _smear(experts: list[nn.Module], **router: object) -> Smear:
    torch.manual_seed(9)
    return Smear(experts, SmearRouter(WIDTH, len(experts), init_scale=1.0, **router))  # type: ignore[arg-type]


X = torch.randn(4, 5, WIDTH, generator=torch.Generator().manual_seed(0))


def test_a_sure_router_runs_its_expert() -> None:
    experts = [_nonlinear(seed) for seed in range(EXPERTS)]
    sure = torch.eye(EXPERTS)[[2, 0, 1, 2]]
    found = _smear(experts)(X, p=sure)
    torch.testing.assert_close(found, torch.stack([experts[e](row) for e, row in zip([2, 0, 1, 2], X, strict=True)]))


def test_equal_experts_are_one() -> None:
    expert = _nonlinear(1)
    torch.testing.assert_close(_smear([copy.deepcopy(expert) for _ in range(EXPERTS)], bias=True)(X), expert(X))


def test_linear_experts_average_their_outputs_and_others_do_not() -> None:
    linear: list[nn.Module] = [nn.Linear(WIDTH, 2) for _ in range(EXPERTS)]
    module = _smear(linear)
    p = module.probabilities(X)
    assert float((p.detach() - 1 / EXPERTS).abs().max()) > 0.05
    mixed = sum(p[:, e, None, None] * linear[e](X) for e in range(EXPERTS))
    torch.testing.assert_close(module(X), mixed)
    other = _smear([_nonlinear(seed) for seed in range(EXPERTS)])
    p = other.probabilities(X)
    outputs = sum(p[:, e, None, None] * other.experts[e](X) for e in range(EXPERTS))
    assert float((other(X) - outputs).detach().abs().max()) > 1e-3


def test_gradients_reach_router_and_experts() -> None:
    module = _smear([_nonlinear(seed) for seed in range(EXPERTS)], bias=True)
    module(X).square().sum().backward()
    assert all(parameter.grad is not None and float(parameter.grad.abs().max()) > 0 for parameter in module.parameters())


def test_pads_are_not_read() -> None:
    module = _smear([_nonlinear(seed) for seed in range(EXPERTS)])
    mask = torch.ones(4, 5)
    mask[1, 3:] = 0
    mask[2] = 0
    changed = X.clone()
    changed[1, 3:] = 100.0
    changed[2] = -7.0
    torch.testing.assert_close(module.probabilities(changed, mask), module.probabilities(X, mask))
    torch.testing.assert_close(module.probabilities(X[1:2, :3]), module.probabilities(X, mask)[1:2])
    torch.testing.assert_close(module.probabilities(X, torch.ones(4, 5)), module.probabilities(X))
    assert bool(module.probabilities(X, mask)[2].isfinite().all())


def test_columns_of_any_length_route_alike_where_they_are_normalised() -> None:
    module = _smear([_nonlinear(seed) for seed in range(EXPERTS)])
    before = module.probabilities(X)
    module.router.weight.data *= torch.tensor([3.0, 0.5, 8.0])
    torch.testing.assert_close(module.probabilities(X), before, atol=1e-4, rtol=1e-4)
    plain = _smear([_nonlinear(seed) for seed in range(EXPERTS)], normalize_weights=False)
    before = plain.probabilities(X)
    plain.router.weight.data *= 3
    assert float((plain.probabilities(X) - before).detach().abs().max()) > 0.01


def test_dropped_experts_leave_their_share_to_the_others() -> None:
    module = _smear([_nonlinear(seed) for seed in range(EXPERTS)])
    module.dropout = 0.5
    torch.manual_seed(3)
    many = X[:1].repeat(400, 1, 1)
    p = module.train().probabilities(many)
    torch.testing.assert_close(p.sum(dim=1), torch.ones(400))
    dropped = (p == 0).float().mean()
    assert 0.35 < float(dropped) < 0.5  # a half, but for the eighth of samples that would have lost all
    torch.testing.assert_close(module.eval().probabilities(many)[0], module.probabilities(X)[0])


def test_experts_that_cannot_be_averaged() -> None:
    with pytest.raises(UserError, match=r"expert 1 has the parameters .* only experts of equal shapes"):
        _smear([nn.Linear(WIDTH, 2), nn.Linear(WIDTH, 3)])
    with pytest.raises(UserError, match="the router has 2 outputs for 3 experts"):
        Smear([nn.Linear(WIDTH, 2) for _ in range(3)], SmearRouter(WIDTH, 2))
    with pytest.raises(UserError, match="activation is 'swoosh'"):
        Adapter(torch.zeros(2, 2), torch.zeros(2, 2), activation="swoosh")
