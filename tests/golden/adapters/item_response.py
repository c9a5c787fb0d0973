"""MERGE^3: abilities, mixtures of abilities, and the accuracies that are estimated from them."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from modelglue.search.estimators import Estimator, Extract, balance_weights, generalised, pirt, weighted_mean
from modelglue.search.item_response import ItemParameters, fit_ability, fit_mixture, negative_log_likelihood, probabilities
from tests.golden.cases import Adapter, Answer, Case


def _array(case: Case, name: str) -> Any:
    return case.all_tensors[f"data.{name}"].numpy()


def _items(case: Case) -> ItemParameters:
    return ItemParameters(_array(case, "A").T, _array(case, "B").T)


def _answer(**found: Any) -> Answer:
    values = {name.replace("__", "."): np.atleast_1d(np.asarray(value, dtype=np.float64)) for name, value in found.items()}
    return Answer({name: torch.from_numpy(value.copy()) for name, value in values.items()})


def _merged(case: Case) -> Answer:
    everything, members = _items(case), _array(case, "scenario_items")
    items = everything.at(members)
    extract = Extract(_array(case, "anchors"), _array(case, "anchor_weights"))
    seen, y = items.at(extract.positions), _array(case, "y_anchor")
    count, share = case.params["n_models"], case.params["delta"]
    endpoints = np.stack([fit_ability(_array(case, f"model{number}.y"), items) for number in range(count)])
    mixture = fit_mixture(y, seen, endpoints)
    observed = weighted_mean(y, extract)
    one = pirt(y, extract, probabilities(items, endpoints[0]))
    return _answer(
        **{f"model{number}__theta": ability for number, ability in enumerate(endpoints)},
        **{"lambda": mixture},
        nll_at_lambda=negative_log_likelihood(y, seen, mixture @ endpoints),
        theta_direct=fit_ability(y, seen),
        item_prob_model0=probabilities(everything, endpoints[0]),
        weighted_avg=observed,
        mpirt=Estimator(extract, "mpirt", items, endpoints)(y),
        gmpirt=Estimator(extract, "gmpirt", items, endpoints, share=share)(y),
        pirt_model0=one,
        gpirt_model0=generalised(share, observed, one),
    )


def _classic(case: Case) -> Answer:
    items, y = _items(case), _array(case, "y_seen")
    extract = Extract(_array(case, "seen"), _array(case, "anchor_weights"))
    balance = balance_weights(_array(case, "subscenario").tolist())
    return _answer(
        balance_weights=balance,
        theta=fit_ability(y, items.at(extract.positions)),
        irt=weighted_mean(y, extract),
        pirt=Estimator(extract, "pirt", items, balance=balance)(y),
        gpirt=Estimator(extract, "gpirt", items, share=float(_array(case, "lambda")[0]), balance=balance)(y),
    )


ADAPTERS: dict[str, Adapter] = {"merge3_irt/mpirt": _merged, "merge3_irt/gpirt": _classic}
