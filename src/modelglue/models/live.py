"""A checkpoint becomes a live `torch.nn.Module`; nothing touches the disk on the way."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

from modelglue.checkpoint import Checkpoint
from modelglue.errors import CheckpointError
from modelglue.models.build import empty_model
from modelglue.models.names import Step, _some, loading_steps, uncovered
from modelglue.settings import CHUNK_ELEMENTS

if TYPE_CHECKING:
    import torch

#: the table of names of a model is worked out once, however many candidates pass through it
_STEPS: weakref.WeakKeyDictionary[Any, tuple[tuple[str, ...], list[Step]]] = weakref.WeakKeyDictionary()


def load_live(checkpoint: Checkpoint, *, dtype: str | None = None) -> Any:
    """The transformers model of a checkpoint (a model on disk or an expression), on the CPU, in evaluation mode.

    Weights are float32 unless `dtype` says otherwise ("bfloat16"). Memory: the model plus one chunk of each input. Raises CheckpointError
    when config and weights do not fit each other.
    """
    import torch

    model = empty_model(checkpoint.config, repr(checkpoint))
    if dtype is not None:
        model = model.to(getattr(torch, dtype))
    load_into(checkpoint, model)
    return model


def load_into(checkpoint: Checkpoint, model: Any) -> None:
    """Write every tensor of the checkpoint into the model, in place; what stood there is gone.

    Shapes and names must fit exactly: no tensor is dropped, none is left as it was. Values are cast to the model's dtypes.
    Time: one read of the checkpoint. Memory: one chunk; for tensors that transformers fuses (experts), one fused tensor.
    """
    import torch

    label = repr(checkpoint)
    steps = _steps_for(checkpoint, model, label)
    places: dict[str, torch.Tensor] = model.state_dict(keep_vars=True)
    seen: dict[int, str] = {}
    with torch.no_grad():
        for step in steps:
            if step.converter is None:
                place = places[step.live]
                name = step.sources[0][0]
                _check_shape(label, name, checkpoint.info(name).shape, tuple(place.shape), type(model).__name__)
                if id(place) in seen:
                    _check_tied(checkpoint, name, seen[id(place)], label)
                else:
                    seen[id(place)] = name
                    _stream(checkpoint, name, place)
            else:
                for live, value in _convert(checkpoint, model, step).items():
                    if live not in places:
                        raise CheckpointError(f"{label}: {type(model).__name__} has no place for '{live}'.")
                    _check_shape(label, live, tuple(value.shape), tuple(places[live].shape), type(model).__name__)
                    places[live].copy_(value)


def _steps_for(checkpoint: Checkpoint, model: Any, label: str) -> list[Step]:
    names = tuple(checkpoint.names())
    known = _STEPS.get(model)
    if known is None or known[0] != names:
        steps = loading_steps(model, names, label)
        covered = [step.live for step in steps if step.converter is None]
        for step in (step for step in steps if step.converter is not None):
            covered += list(_convert(checkpoint, model, step))
        missing = uncovered(model, [name for name in covered if name in model.state_dict()])
        if missing:
            raise CheckpointError(f"{label}: holds no values for {_some(missing)} of {type(model).__name__}.")
        known = (names, steps)
        _STEPS[model] = known
    return known[1]


def _convert(checkpoint: Checkpoint, model: Any, step: Step) -> dict[str, torch.Tensor]:
    """Run one conversion of transformers' table on the tensors that it wants."""
    import copy

    converter = copy.deepcopy(step.converter)
    for name, pattern in step.sources:
        converter.add_tensor(step.live, name, pattern, checkpoint.tensor(name).clone())
    result = converter.convert(step.live, model=model, config=model.config)
    return {name: value[0] if isinstance(value, list) else value for name, value in result.items()}


def _stream(checkpoint: Checkpoint, name: str, place: torch.Tensor) -> None:
    if not place.is_contiguous():
        place.copy_(checkpoint.tensor(name))
        return
    flat = place.detach().view(-1)
    for start, stop in checkpoint.pieces(name, CHUNK_ELEMENTS):
        flat[start:stop].copy_(checkpoint.read(name, start, stop))


def _check_shape(label: str, name: str, found: tuple[int, ...], wanted: tuple[int, ...], kind: str) -> None:
    if found != wanted:
        raise CheckpointError(f"{label}: tensor '{name}' has the shape {list(found)}, {kind} with this config needs {list(wanted)}.")


def _check_tied(checkpoint: Checkpoint, name: str, other: str, label: str) -> None:
    """Two tensors on disk for one place: fine while they say the same."""
    for start, stop in checkpoint.pieces(name, CHUNK_ELEMENTS):
        if not bool((checkpoint.read(name, start, stop) == checkpoint.read(other, start, stop)).all()):
            raise CheckpointError(
                f"{label}: the config ties '{name}' to '{other}', but their values differ. "
                "Set tie_word_embeddings to false in config.json, or drop one of the two."
            )
