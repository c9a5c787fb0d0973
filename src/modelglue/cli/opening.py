"""What a command may be given as a model: a folder or hub id, a recipe, or a mixture."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from modelglue.checkpoint import Checkpoint
    from modelglue.mixture import Mixture

_WEIGHTS = (".safetensors", ".bin", ".pt")


def open_model(model: str) -> Checkpoint | Mixture:
    """A mixture, the merge of a recipe (as an expression), or the model that a reference means.

    Reads headers, and of a mixture's experts what tells that they have not changed. UserError names what a folder is instead.
    """
    from modelglue.checkpoint import open_checkpoint
    from modelglue.errors import UserError
    from modelglue.mixture import Mixture, is_mixture
    from modelglue.recipe import merge

    path = Path(model)
    if is_mixture(path):
        return Mixture.load(path)
    if is_mixture(path / "mixture"):
        raise UserError(f"{model}: is the folder of a run. Give its mixture, {path / 'mixture'}, or one of the models in it.")
    if path.is_dir() and not any(any(path.glob(f"*{ending}")) for ending in _WEIGHTS):
        raise UserError(
            f"{model}: is neither a model (it holds no .safetensors file) nor a mixture (it holds no mixture.json). "
            "Give the folder of either."
        )
    return merge(path) if path.suffix in (".yaml", ".yml") and path.is_file() else open_checkpoint(model)
