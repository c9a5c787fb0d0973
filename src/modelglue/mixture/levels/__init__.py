"""Mixtures inside one model: experts are feed-forward networks or decoder layers, the rest is shared."""

from modelglue.mixture.levels.assemble import LevelSpec, deciding_layers, join
from modelglue.mixture.levels.members import Member
from modelglue.mixture.levels.requirements import best_level, reasons, require

__all__ = ["LevelSpec", "Member", "best_level", "deciding_layers", "join", "reasons", "require"]
