"""What a command may be given as a model: a folder or hub id, a recipe, or a mixture."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from modelglue.checkpoint import Checkpoint
    from modelglue.mixture import Mixture
    from modelglue.models import LiveTextModel

_WEIGHTS = (".safetensors", ".bin", ".pt")


def open_model(model: str, **running: Any) -> Checkpoint | Mixture:
    """A mixture, the merge of a recipe (as an expression), or the model that a reference means.

    Reads headers, and of a mixture's experts what tells that they have not changed. `running` goes to `Mixture.load`. UserError names
    what a folder is instead.
    """
    from modelglue.checkpoint import open_checkpoint
    from modelglue.errors import UserError
    from modelglue.mixture import Mixture, is_mixture
    from modelglue.recipe import merge

    path = Path(model)
    if is_mixture(path):
        return Mixture.load(path, **running)
    if is_mixture(path / "mixture"):
        raise UserError(f"{model}: is the folder of a run. Give its mixture, {path / 'mixture'}, or one of the models in it.")
    if path.is_dir() and not any(any(path.glob(f"*{ending}")) for ending in _WEIGHTS):
        raise UserError(
            f"{model}: is neither a model (it holds no .safetensors file) nor a mixture (it holds no mixture.json). "
            "Give the folder of either."
        )
    return merge(path) if path.suffix in (".yaml", ".yml") and path.is_file() else open_checkpoint(model)


def open_live(model: str, *, residency: str | None, dtype: Literal["float32", "stored"]) -> Mixture | LiveTextModel:
    """The same, ready to answer texts. UserError for a `residency` of what is no mixture."""
    from modelglue.checkpoint import Checkpoint
    from modelglue.errors import UserError
    from modelglue.models import LiveTextModel, load_live, load_tokenizer
    from modelglue.models.mapped import load_mapped

    opened = open_model(model, residency=residency or "lazy", dtype=dtype)
    if not isinstance(opened, Checkpoint):
        return opened
    if residency is not None:
        raise UserError(f"{model}: is one model, and --residency says which experts of a mixture are in memory. Leave it out.")
    return LiveTextModel(load_mapped(opened) if dtype == "stored" else load_live(opened), load_tokenizer(opened))
