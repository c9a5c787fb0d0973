"""Which tensors are trained: those of new layers, routers, all, or named ones; and their way from the live model back to the disk."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from modelglue.checkpoint import FLOATING, Checkpoint
from modelglue.errors import CheckpointError, UserError, did_you_mean
from modelglue.models.live import fitting_steps, places_of
from modelglue.models.names import on_disk, some
from modelglue.recipe.stacking import TRAINABLE_FILE

if TYPE_CHECKING:
    import torch

Which = Literal["all", "new", "routers"] | Sequence[str]
_ROUTER = re.compile(r"(?:^|\.)(?:gate|router|shared_expert_gate)(?:\.\w+)+$")


def names_of(checkpoint: Checkpoint, which: Which) -> list[str]:
    """The names on disk of what is trained. UserError for names that are not there, CheckpointError where there is nothing of the kind."""
    every = [name for name in checkpoint.names() if checkpoint.info(name).dtype in FLOATING]
    if which == "all":
        return every
    if which == "routers":
        found = [name for name in every if is_router(name)]
        if not found:
            raise CheckpointError(f"{checkpoint!r}: has no routers: no tensor's name ends in gate or router. Train `new` layers, or `all`.")
        return found
    named = _new(checkpoint) if which == "new" else list(which)
    odd = [name for name in named if name not in every]
    if odd or not named:
        said = f"'{odd[0]}' is no tensor to train.{did_you_mean(odd[0], every)}" if odd else "no tensors are named."
        raise UserError(f"{checkpoint!r}: {said} Allowed are the model's own floating-point tensors.")
    return sorted(set(named))


def is_router(name: str) -> bool:
    """Whether a tensor says which experts work."""
    return _ROUTER.search(name) is not None


def _new(checkpoint: Checkpoint) -> list[str]:
    """What `modelglue stack` has written beside the model."""
    for place in checkpoint.places:
        file = place / TRAINABLE_FILE
        if file.is_file():
            try:
                named = json.loads(file.read_text(encoding="utf-8"))["tensors"]
            except (ValueError, KeyError, TypeError) as error:
                raise CheckpointError(f'{file}: is not {{"tensors": [names]}} ({error}). Write the stack again.') from error
            if isinstance(named, list) and all(isinstance(name, str) for name in named):
                return named
            raise CheckpointError(f"{file}: 'tensors' is no list of names. Write the stack again.")
    raise CheckpointError(
        f"{checkpoint!r}: has no {TRAINABLE_FILE}, so it has no new layers to train. Expand a model with `modelglue stack`, or train `all`."
    )


def live_parameters(checkpoint: Checkpoint, model: Any, names: Sequence[str]) -> dict[str, torch.nn.Parameter]:
    """The live parameters of tensors on disk, by their live names, each once. CheckpointError where others are fused with them."""
    import torch

    wanted = set(names)
    places = places_of(model)
    found: dict[str, torch.nn.Parameter] = {}
    seen: set[int] = set()
    for step in fitting_steps(checkpoint, model):
        sources = [name for name, _ in step.sources]
        if not wanted & set(sources):
            continue
        if left := [name for name in sources if name not in wanted]:
            raise CheckpointError(f"{step.live}: is made of trained tensors and of {some(left)}. Train all of them, or none.")
        lives = [step.live] if step.converter is None else list(step.convert([_meta(checkpoint, name) for name in sources], model))
        for live in lives:
            value = places[live]
            if isinstance(value, torch.nn.Parameter) and id(value) not in seen:
                seen.add(id(value))
                found[live] = value
    return dict(sorted(found.items()))


def _meta(checkpoint: Checkpoint, name: str) -> torch.Tensor:
    import torch

    return torch.empty(checkpoint.info(name).shape, device="meta")


def trained_tensors(checkpoint: Checkpoint, model: Any, lives: Mapping[str, torch.nn.Parameter]) -> dict[str, torch.Tensor]:
    """The trained tensors under their names on disk, in the dtypes in which they are stored."""
    from modelglue.checkpoint.tensors import torch_dtype

    plain = {step.live: step.sources[0][0] for step in fitting_steps(checkpoint, model) if step.converter is None}
    values = {live: value.detach().cpu() for live, value in lives.items()}
    found = {plain[live]: value for live, value in values.items() if live in plain}
    found |= on_disk(model, {live: value for live, value in values.items() if live not in plain})
    known = set(checkpoint.names())
    if odd := [name for name in found if name not in known]:
        raise CheckpointError(f"{type(model).__name__}: writes {some(odd)}, which the model on disk does not have. It is not trained here.")
    return {name: value.to(torch_dtype(checkpoint.info(name).dtype)) for name, value in found.items()}
