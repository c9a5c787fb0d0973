"""Floor 6: the Model-GLUE recipe, from a zoo to one model."""

from modelglue.glue.experts import Verdict, choose_experts
from modelglue.glue.pipeline import GlueResult, glue
from modelglue.glue.schema import GlueFile

__all__ = ["GlueFile", "GlueResult", "Verdict", "choose_experts", "glue"]
