"""Routers that learn: from the scores of every expert, or by gradients through a mixture."""

from modelglue.mixture.routing.fit import Fit, Frame, fit_gate, temperature_of
from modelglue.mixture.routing.learn import LearnedRouter, learn_router
from modelglue.mixture.routing.scored import ScoredItem, ScoredItems

__all__ = ["Fit", "Frame", "LearnedRouter", "ScoredItem", "ScoredItems", "fit_gate", "learn_router", "temperature_of"]
