"""Floor 6: the Model-GLUE recipe, from a zoo to one model."""

import sys
from types import ModuleType

from modelglue.glue.experts import Verdict, choose_experts
from modelglue.glue.pipeline import GlueResult, glue
from modelglue.glue.schema import GlueFile

__all__ = ["GlueFile", "GlueResult", "Verdict", "choose_experts", "glue"]


class _Glue(ModuleType):
    """This package, which can be called: Python gives `modelglue.glue`, the function's public name, to the package once it is imported."""

    __call__ = staticmethod(glue)


sys.modules[__name__].__class__ = _Glue
