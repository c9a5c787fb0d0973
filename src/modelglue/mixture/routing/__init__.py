"""Routers that learn: from the scores of every expert, or by gradients through a mixture."""

from modelglue.mixture.routing.fit import Fit, Frame, fit_gate, temperature_of
from modelglue.mixture.routing.gradient import Gated, GateTraining, Gating, balance_term, schedule, train_gates
from modelglue.mixture.routing.layered import LearnedGates, learn_checked_gates, learn_layer_gates
from modelglue.mixture.routing.learn import LearnedRouter, learn_router
from modelglue.mixture.routing.perplexity import bits_per_character, perplexity_weights
from modelglue.mixture.routing.scored import ScoredItem, ScoredItems
from modelglue.mixture.routing.texts import GatedModel, Row, gates_of, read_rows, rows_of

__all__ = [
    "Fit",
    "Frame",
    "GateTraining",
    "Gated",
    "GatedModel",
    "Gating",
    "LearnedGates",
    "LearnedRouter",
    "Row",
    "ScoredItem",
    "ScoredItems",
    "balance_term",
    "bits_per_character",
    "fit_gate",
    "gates_of",
    "learn_checked_gates",
    "learn_layer_gates",
    "learn_router",
    "perplexity_weights",
    "read_rows",
    "rows_of",
    "schedule",
    "temperature_of",
    "train_gates",
]
