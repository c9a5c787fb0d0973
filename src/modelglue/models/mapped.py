"""A live model whose weights are the pages of its files: nothing is copied, and what is not used is not read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from modelglue.checkpoint import Checkpoint
from modelglue.models.live import check_tied, empty_for, fitting_steps, set_ends

if TYPE_CHECKING:
    import torch

#: stored dtypes that models compute in as they are
_COMPUTED = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}


def stored_dtype(checkpoint: Checkpoint) -> str:
    """The dtype that most of a checkpoint's elements are stored in, where models can compute in it; else float32."""
    elements: Counter[str] = Counter()
    for name in checkpoint.names():
        info = checkpoint.info(name)
        elements[info.dtype] += info.numel
    return _COMPUTED.get(max(elements, key=lambda dtype: (elements[dtype], dtype)), "float32") if elements else "float32"


def load_mapped(checkpoint: Checkpoint, *, wanted: Callable[[str], bool] | None = None) -> Any:
    """The transformers model of a checkpoint in the dtype that it is stored in, on the CPU, in evaluation mode.

    Memory: what is stored in that dtype stays in the files and is mapped, so its pages are shared with the page cache and with every
    other process; only what is stored otherwise, or fused when it is loaded, is copied. The files must not be changed while the
    model lives. `wanted` says which live tensors are needed at all; the others stay uninitialised. Raises CheckpointError when config
    and weights do not fit each other, and for two tensors on disk that are one in the model and differ.
    """
    import torch

    model = empty_for(checkpoint, dtype=stored_dtype(checkpoint))  # uninitialised memory that nobody touches costs nothing
    steps = fitting_steps(checkpoint, model)
    places: dict[str, torch.Tensor] = model.state_dict(keep_vars=True)
    mapped: dict[int, torch.nn.Parameter] = {}
    seen: dict[int, str] = {}
    with torch.no_grad():
        for step in steps:
            if wanted is not None and not wanted(step.live):
                continue
            names = [name for name, _ in step.sources]
            if step.converter is not None:
                for live, value in step.convert([checkpoint.tensor(name) for name in names], model).items():
                    places[live].copy_(value)
                continue
            place = places[step.live]
            if (twin := seen.setdefault(id(place), names[0])) != names[0]:
                check_tied(checkpoint, names[0], twin)
                continue
            value = checkpoint.tensor(names[0])
            if isinstance(place, torch.nn.Parameter) and value.dtype == place.dtype:
                mapped[id(place)] = torch.nn.Parameter(value, requires_grad=False)
            else:
                place.copy_(value)
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) in mapped:  # a tied weight is in several places
                setattr(module, name, mapped[id(parameter)])
    set_ends(checkpoint, model)
    return model
