"""Mixtures written as sparse models that transformers and inference engines have a class for: no code of ours is needed to run them."""

from modelglue.mixture.exports.choose import EXPORTS, choose, named
from modelglue.mixture.exports.dense import Dense, dense
from modelglue.mixture.exports.export import Export
from modelglue.mixture.exports.finished import FinishedCheckpoint
from modelglue.mixture.exports.parts import Gates, Parts, check, warnings
from modelglue.mixture.exports.recipe import MoeRecipe, is_moe_recipe, read_moe_recipe
from modelglue.mixture.exports.upcycle import Upcycled, upcycle

__all__ = [
    "EXPORTS",
    "Dense",
    "Export",
    "FinishedCheckpoint",
    "Gates",
    "MoeRecipe",
    "Parts",
    "Upcycled",
    "check",
    "choose",
    "dense",
    "is_moe_recipe",
    "named",
    "read_moe_recipe",
    "upcycle",
    "warnings",
]
