"""A checkpoint becomes a live `torch.nn.Module`; nothing touches the disk on the way."""

from __future__ import annotations

import json
import weakref
from collections.abc import Container, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from modelglue.checkpoint import Checkpoint, file_bytes, file_place
from modelglue.checkpoint.engine.workers import keep_freed_memory, single_thread
from modelglue.errors import CheckpointError
from modelglue.models.build import check_claims, empty_model
from modelglue.models.names import Step, loading_steps, some, uncovered
from modelglue.settings import CHUNK_ELEMENTS

if TYPE_CHECKING:
    import torch

#: what is on disk (names and shapes) and how it gets into a model: worked out once, however many candidates pass through the model
_STEPS: weakref.WeakKeyDictionary[Any, tuple[list[tuple[str, tuple[int, ...]]], list[Step]]] = weakref.WeakKeyDictionary()

#: elements of a large tensor that are written by one call: who computes them divides them further as it likes
_PIECE_ELEMENTS = 2**22
#: elements below which threads are not worth starting
_WORTH_THREADS = 2**24


def load_live(checkpoint: Checkpoint, *, dtype: str | None = None) -> Any:
    """The transformers model of a checkpoint (a model on disk or an expression), on the CPU, in evaluation mode.

    Weights are float32 unless `dtype` says otherwise ("bfloat16"). The ids that end a text are those of generation_config.json. Memory:
    the model plus one chunk of each input. Raises CheckpointError when config and weights do not fit each other.
    """
    model = empty_for(checkpoint, dtype=dtype or "float32")
    load_into(checkpoint, model)
    set_ends(checkpoint, model)
    return model


def load_into(checkpoint: Checkpoint, model: Any, *, keep: Container[str] = (), places: Mapping[str, torch.Tensor] | None = None) -> None:
    """Write every tensor of the checkpoint into the model, in place; what stood there is gone.

    Shapes and names must fit exactly, which is checked before anything is written: no tensor is dropped, none is left as it was but those
    that `keep` names, which the caller knows to be there already. Values are cast to the model's dtypes. Time: one read of the checkpoint,
    by as many threads as torch may use; every element is computed by one of them, so its value does not depend on how many there are.
    Memory: one chunk of each input for every thread; for tensors that transformers fuses (experts), twice one fused tensor. `places`: the
    model's `places_of`, where many checkpoints go into it.
    """
    import torch

    steps = fitting_steps(checkpoint, model)
    places = places_of(model) if places is None else places
    seen: dict[int, str] = {}
    plain: list[tuple[str, torch.Tensor]] = []
    with torch.no_grad():
        for step in steps:
            sources = [name for name, _ in step.sources]
            kept = all(name in keep for name in sources)
            if step.converter is not None:
                if not kept:
                    for live, value in step.convert([checkpoint.tensor(name) for name in sources], model).items():
                        places[live].copy_(value)
                continue
            place, name = places[step.live], sources[0]
            if id(place) not in seen:
                seen[id(place)] = name
                if not kept:
                    plain.append((name, place))
            elif not (kept and seen[id(place)] in keep):
                check_tied(checkpoint, name, seen[id(place)])
        _write(checkpoint, plain)


def places_of(model: Any) -> Mapping[str, torch.Tensor]:
    """The live tensors by name, for as long as nobody exchanges one of them."""
    places: Mapping[str, torch.Tensor] = model.state_dict(keep_vars=True)
    return places


def check_fit(checkpoint: Checkpoint) -> None:
    """Raise the CheckpointError that loading would raise for config, names or shapes. Reads headers only, allocates nothing."""
    fitting_steps(checkpoint, empty_for(checkpoint, meta=True))


def set_ends(checkpoint: Checkpoint, model: Any) -> None:
    """The model ends its texts with the ids of the checkpoint's generation_config.json, where that names any."""
    if (ends := _end_ids(checkpoint)) is not None:
        model.generation_config.eos_token_id = ends


def _end_ids(checkpoint: Checkpoint) -> int | list[int] | None:
    """The ids that end a text by the checkpoint's generation_config.json, which knows those of chat models; None where it says nothing."""
    file = checkpoint.files.get("generation_config.json")
    if file is None:
        return None
    place = file_place("generation_config.json", file)
    try:
        ends = json.loads(file_bytes(file).decode()).get("eos_token_id")
    except (ValueError, AttributeError) as error:
        raise CheckpointError(f"{place}: is not a JSON object ({error}). Restore it, or remove it.") from error
    if ends is None or isinstance(ends, int) or (isinstance(ends, list) and all(isinstance(end, int) for end in ends)):
        return ends
    raise CheckpointError(f"{place}: eos_token_id is {ends!r}; allowed is an id or a list of ids. Restore the file.")


def empty_for(checkpoint: Checkpoint, *, meta: bool = False, dtype: str = "float32") -> Any:
    """The `empty_model` of a checkpoint's config. CheckpointError where the config claims more than there are tensors for."""
    check_claims(checkpoint, repr(checkpoint))
    return empty_model(checkpoint.config, repr(checkpoint), meta=meta, dtype=dtype)


def fitting_steps(checkpoint: Checkpoint, model: Any) -> list[Step]:
    """How the checkpoint gets into the model; CheckpointError for a tensor without place, a place without tensor, or a wrong shape."""
    tensors = [(name, checkpoint.info(name).shape) for name in checkpoint.names()]
    known = _STEPS.get(model)
    if known is None or known[0] != tensors:
        label, kind = repr(checkpoint), type(model).__name__
        steps = loading_steps(model, [name for name, _ in tensors], label)
        places = model.state_dict(keep_vars=True)
        covered, shapes = [], dict(tensors)
        for step in steps:
            for live, shape in _live_shapes(step, shapes, model, label).items():
                if live not in places:
                    raise CheckpointError(f"{label}: {kind} has no place for '{live}'. The config does not describe these weights.")
                if shape != tuple(places[live].shape):
                    name = step.sources[0][0] if step.converter is None else live
                    wanted = list(places[live].shape)
                    raise CheckpointError(f"{label}: tensor '{name}' has the shape {list(shape)}, {kind} with this config needs {wanted}.")
                covered.append(live)
        if missing := uncovered(model, covered):
            raise CheckpointError(f"{label}: holds no values for {some(missing)} of {kind}. Restore the model's files.")
        known = (tensors, steps)
        _STEPS[model] = known
    return known[1]


def _live_shapes(step: Step, shapes: dict[str, tuple[int, ...]], model: Any, label: str) -> dict[str, tuple[int, ...]]:
    """Name and shape of every live tensor that a step makes, from shapes alone."""
    import torch

    if step.converter is None:
        return {step.live: shapes[step.sources[0][0]]}
    try:
        made = step.convert([torch.empty(shapes[name], device="meta") for name, _ in step.sources], model)
    except (RuntimeError, ValueError, IndexError, KeyError) as error:
        names = [name for name, _ in step.sources]
        raise CheckpointError(f"{label}: '{step.live}' cannot be made of {some(names)}: {error}") from error
    return {live: tuple(value.shape) for live, value in made.items()}


def _write(checkpoint: Checkpoint, plain: Sequence[tuple[str, torch.Tensor]]) -> None:
    """Tensors to their places: small neighbours together, large ones by threads if each can be read by itself."""
    import torch

    jobs = list(_runs(checkpoint, plain))
    threads = min(torch.get_num_threads(), len(jobs))
    if sum(place.numel() for _, place in plain) < _WORTH_THREADS or not all(checkpoint.splittable(name) for name, _ in plain):
        threads = 1
    if threads < 2:
        with single_thread():
            for job in jobs:
                _write_run(checkpoint, job)
        return
    checkpoint.prepare([name for name, _ in plain])
    keep_freed_memory()
    with single_thread(), ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        for done in [pool.submit(_write_run, checkpoint, job) for job in sorted(jobs, key=lambda job: -sum(p.numel() for _, p in job))]:
            done.result()


def _runs(checkpoint: Checkpoint, plain: Sequence[tuple[str, torch.Tensor]]) -> Iterator[list[tuple[str, torch.Tensor]]]:
    """Neighbours of one stored dtype that make no more than a chunk; whoever is more is alone."""
    run: list[tuple[str, torch.Tensor]] = []
    size, dtype = 0, ""
    for name, place in plain:
        info = checkpoint.info(name)
        if run and (size + info.numel > CHUNK_ELEMENTS or info.dtype != dtype):
            yield run
            run, size = [], 0
        run.append((name, place))
        size, dtype = size + info.numel, info.dtype
    if run:
        yield run


def _write_run(checkpoint: Checkpoint, run: Sequence[tuple[str, torch.Tensor]]) -> None:
    import torch

    with torch.no_grad():
        if len(run) == 1:
            _stream(checkpoint, *run[0])
            return
        values = torch.split_with_sizes(checkpoint.together([name for name, _ in run]), [place.numel() for _, place in run])
        if all(place.is_contiguous() for _, place in run):
            torch._foreach_copy_([place.view(-1) for _, place in run], list(values))
            return
        for (_, place), value in zip(run, values, strict=True):
            place.copy_(value.view(place.shape))


def _stream(checkpoint: Checkpoint, name: str, place: torch.Tensor) -> None:
    if not place.is_contiguous():
        place.copy_(checkpoint.tensor(name))
        return
    flat = place.detach().view(-1)
    for start, stop in checkpoint.pieces(name, _PIECE_ELEMENTS if place.device.type == "cpu" else CHUNK_ELEMENTS):
        if place.device.type == "cpu":
            checkpoint.read(name, start, stop, out=flat[start:stop])
        else:
            flat[start:stop].copy_(checkpoint.read(name, start, stop))


def check_tied(checkpoint: Checkpoint, name: str, other: str) -> None:
    """Two tensors on disk for one place: fine while they say the same."""
    for start, stop in checkpoint.pieces(name, CHUNK_ELEMENTS):
        if not bool((checkpoint.read(name, start, stop) == checkpoint.read(other, start, stop)).all()):
            raise CheckpointError(
                f"{checkpoint!r}: the config ties '{name}' to '{other}', but their values differ. "
                "Set tie_word_embeddings to false in config.json, or drop one of the two."
            )
