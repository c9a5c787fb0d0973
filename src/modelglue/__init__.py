"""modelglue: from a zoo of fine-tuned language models to one stronger model.

The names below are the whole public API; each is imported when it is first used, so `import modelglue` is cheap.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from modelglue.checkpoint import Checkpoint, save
    from modelglue.checkpoint import open_checkpoint as open
    from modelglue.errors import ModelGlueError, RunError, UserError
    from modelglue.evaluation import evaluate
    from modelglue.glue import glue
    from modelglue.methods import method
    from modelglue.mixture import Mixture
    from modelglue.mixture.levels import mix
    from modelglue.models import load_into, load_live
    from modelglue.recipe import check, merge, stack
    from modelglue.search import select
    from modelglue.zoo import diff, find_families, similarity

_HOMES = {
    "Checkpoint": "checkpoint", "save": "checkpoint", "ModelGlueError": "errors", "RunError": "errors", "UserError": "errors",
    "evaluate": "evaluation", "glue": "glue", "method": "methods", "mix": "mixture.levels", "Mixture": "mixture", "load_into": "models",
    "load_live": "models", "check": "recipe", "merge": "recipe", "stack": "recipe", "select": "search", "diff": "zoo",
    "find_families": "zoo", "similarity": "zoo",
}  # fmt: skip

__all__ = [
    "Checkpoint",
    "Mixture",
    "ModelGlueError",
    "RunError",
    "UserError",
    "__version__",
    "check",
    "diff",
    "evaluate",
    "find_families",
    "glue",
    "load_into",
    "load_live",
    "merge",
    "method",
    "mix",
    "open",
    "save",
    "select",
    "similarity",
    "stack",
]


def __getattr__(name: str) -> Any:
    if name == "open":
        return importlib.import_module("modelglue.checkpoint").open_checkpoint
    if name in _HOMES:
        return getattr(importlib.import_module(f"modelglue.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'modelglue' has no attribute '{name}'")


def __dir__() -> list[str]:
    return __all__
