"""MAP: quadratic surrogates, hyperspherical directions, the choice by preference, the pair that is merged first."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from modelglue.search.surrogate import Quadratic, fit_from_ones, preferred
from modelglue.search.surrogate_design import closest_pair, hyperspherical
from tests.golden.cases import Adapter, Answer, Case


def _answer(case: Case) -> Answer:
    data = {name: value.numpy() for name, value in case.tensors("data").items()}
    radius, angles = hyperspherical(data["coef"])
    found: dict[str, Any] = {
        "hyperspherical.r": radius,
        "hyperspherical.phi": angles,
        "preferred_coef": data["pf.coef"][preferred(data["pf.points"], data["preference"])],
        "closest_pair": np.array(closest_pair(data["individual_score"])),
    }
    for name in case.tensors("expected.params"):  # fits that went astray in the official code are not in the file
        link, _ = name.split(".", 1)
        metric = data[f"metric.{name}"]
        surrogate = Quadratic(fit_from_ones(data["coef"], metric, link), link, float("nan"))  # type: ignore[arg-type]
        found[f"params.{name}"] = surrogate.coefficients
        found[f"pred.{name}"] = surrogate(data["coef"])
        found[f"sse.{name}"] = np.array([((surrogate(data["coef"]) - metric) ** 2).sum()])
    return Answer({name: torch.from_numpy(np.ascontiguousarray(value)) for name, value in found.items()})


ADAPTERS: dict[str, Adapter] = {"map_pareto/": _answer}
