"""Mixtures inside one model: experts are feed-forward networks or decoder layers, the rest is shared."""

from modelglue.mixture.levels.assemble import LevelSpec, deciding_layers, join
from modelglue.mixture.levels.gates import gates_for
from modelglue.mixture.levels.learning import Scorer
from modelglue.mixture.levels.make import Mixed, Prepared, mix, prepare
from modelglue.mixture.levels.members import Member
from modelglue.mixture.levels.recipe import MixRecipe, MixRouter, read_mix
from modelglue.mixture.levels.requirements import best_level, reasons, require

__all__ = [
    "LevelSpec",
    "Member",
    "MixRecipe",
    "MixRouter",
    "Mixed",
    "Prepared",
    "Scorer",
    "best_level",
    "deciding_layers",
    "gates_for",
    "join",
    "mix",
    "prepare",
    "read_mix",
    "reasons",
    "require",
]
