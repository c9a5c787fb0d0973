"""The arithmetic of one merge: chunks of every input in, a chunk of the output out, and the surveys that come before.

A method first surveys a tensor (or the model) in rounds that reduce over chunks, then maps over chunks; both see one chunk of every
input at a time, so memory is O(chunk x inputs).
"""

from __future__ import annotations

import logging
import math
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from modelglue.checkpoint.engine import compiled, device, native
from modelglue.checkpoint.engine.merge_function import CannotMergeError, MergeFunction, ParameterSource, Round, Unit, unit_shape
from modelglue.checkpoint.engine.scratch import spill
from modelglue.checkpoint.engine.uniform import UniformSource
from modelglue.checkpoint.engine.workers import collector_paused, single_thread
from modelglue.checkpoint.protocol import Checkpoint, TensorInfo
from modelglue.checkpoint.tensors import torch_dtype
from modelglue.errors import MergeError
from modelglue.settings import BLOCK_ELEMENTS, CHUNK_ELEMENTS

if TYPE_CHECKING:
    import torch

_log = logging.getLogger(__name__)

#: chunks of a survey are whole blocks, so that sums come out the same whatever the chunk of the merge
SURVEY_ELEMENTS = max(CHUNK_ELEMENTS // BLOCK_ELEMENTS, 1) * BLOCK_ELEMENTS
#: so many of them at a time where a round takes them as they are stored: it goes through them block by block, so only calls are saved
_RAW_CHUNKS = 4


@dataclass(frozen=True)
class Job:
    """One merge, as the arithmetic sees it.

    `outputs`: shape and stored dtype of every output tensor. `members`: positions of the models that take part in a tensor, for the
    tensors in which not all do; per-model parameters (lists) are narrowed to them. `merged`: the tensors that are computed; the
    others are equal in all models and copied.
    """

    method: MergeFunction
    models: Sequence[Checkpoint]
    base: Checkpoint | None
    labels: Sequence[str]
    base_label: str
    parameters: ParameterSource
    uniforms: UniformSource
    streams: Sequence[int]
    outputs: Mapping[str, TensorInfo]
    merged: frozenset[str]
    members: Mapping[str, Sequence[int]]

    def members_of(self, name: str) -> Sequence[int]:
        return self.members.get(name, range(len(self.models)))

    def inputs_of(self, name: str) -> list[Checkpoint]:
        """What a tensor is read from: the models that take part in it, and the base last."""
        return [*(self.models[position] for position in self.members_of(name)), *([self.base] if self.base is not None else [])]

    def parameters_of(self, name: str) -> Mapping[str, Any]:
        """Resolved values for one output tensor: a number per global parameter, a list with one value per member."""
        values = self.parameters.for_tensor(name)
        if name not in self.members:
            return values
        chosen = self.members[name]
        return {key: [value[i] for i in chosen] if isinstance(value, list) else value for key, value in values.items()}

    def unit(self, name: str) -> Unit:
        return self.method.unit(self.parameters_of(name)) if name in self.merged else "element"

    def rounds(self, name: str) -> Sequence[Round]:
        return self.method.rounds(self.parameters_of(name)) if name in self.merged else ()


class Engine:
    """Evaluates a `Job`. Pickles without what it remembers, so every worker surveys its own tensors."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._surveyed: tuple[str, list[Any]] | None = None  # the last tensor's survey
        self._model_survey: list[Any] | None = None
        self._compiled: Mapping[str, str] | None = None  # chunk functions that run compiled, found by `prepare`
        self._spilled: dict[str, list[Checkpoint]] = {}  # inputs of a surveyed tensor, the computed ones computed once
        self._whole: tuple[str, torch.Tensor] | None = None
        self._dtypes: dict[str, tuple[str, ...]] = {}  # of the inputs of a tensor
        self._lock = threading.RLock()  # over what is remembered: the lanes of a device read beside each other

    def __getstate__(self) -> dict[str, Any]:
        state = {**self.__dict__, "_surveyed": None, "_spilled": {}, "_whole": None}
        del state["_lock"]
        return state

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        self.__dict__.update(state)
        self._lock = threading.RLock()

    def over(self, job: Job) -> Engine:
        """One for the same inputs with other parameters."""
        other = Engine(job)
        other._dtypes = self._dtypes
        return other

    def prepare(self, names: Sequence[str]) -> None:
        """Run the rounds that look at the whole model, and look for compiled chunk functions; called before workers start."""
        with collector_paused():
            import torch  # noqa: F401 - here and not in every worker: forked workers share its memory

        job = self._job
        merged = [name for name in names if name in job.merged and job.outputs[name].numel]
        if not merged:
            return
        if self._model_survey is None:
            with single_thread(), device.wide():
                self._survey_model()
        if device.current() is not None:
            return  # what is compiled is for the processor
        elements = sum(job.outputs[name].numel for name in merged)
        if self._raw(merged[0]):
            native.ready(elements * (len(job.models) + (job.base is not None)))  # made here, if it pays, and not by every worker
        smallest = min(merged, key=lambda name: (job.outputs[name].numel, name))
        numel = job.outputs[smallest].numel
        stop = numel if job.unit(smallest) == "matrix" else min(CHUNK_ELEMENTS, numel)
        self._compiled = compiled.find(lambda: self._merge(smallest, 0, stop), elements)

    def working_bytes(self, name: str, elements: int) -> int:
        """See `Checkpoint.working_bytes`: a chunk of every input in the dtype of the arithmetic, as read and as the method changes it, and
        a few temporaries; a method that needs a whole matrix holds every input's and three more.
        """
        job, info = self._job, self._job.outputs[name]
        inputs = job.inputs_of(name)
        below = sum(checkpoint.working_bytes(name, elements) for checkpoint in inputs)
        if name not in job.merged:
            return below
        item = 8 if any(checkpoint.info(name).dtype == "F64" for checkpoint in inputs) else 4
        rounds = job.rounds(name)
        units = {job.unit(name), *(round_.unit for round_ in rounds)}
        if "matrix" in units:
            return below + (len(inputs) + 3) * info.numel * item
        part = max(math.prod(unit_shape(unit, info.shape)) for unit in units)
        held = min(max(elements, part, SURVEY_ELEMENTS if rounds else 0), info.numel)
        return below + (3 * len(inputs) + 8) * held * item

    def read(self, name: str, start: int, stop: int, out: torch.Tensor | None = None) -> torch.Tensor:
        """Elements start..stop of an output tensor in its stored dtype; or `out` (1-D, of that dtype or another), into which they were
        written. A range that does not respect the method's unit costs the rows or the matrix around it.
        """
        import torch

        if out is not None:
            step = CHUNK_ELEMENTS if self._job.unit(name) == "element" else max(stop - start, 1)
            if not self._landed(name, start, stop, out):
                for at in range(start, stop, step):
                    out[at - start : min(at + step, stop) - start].copy_(self.read(name, at, min(at + step, stop)))
            return out
        if stop <= start:
            return torch.empty(0, dtype=torch_dtype(self._job.outputs[name].dtype))
        if name not in self._job.merged:
            return self._copy(name, start, stop)
        with compiled.using(self._compiled), single_thread():
            return self._merge(name, start, stop)

    def _landed(self, name: str, start: int, stop: int, out: torch.Tensor) -> bool:
        """Whether the elements were written into `out` in one pass over the inputs; if not, what stands there means nothing."""
        job = self._job
        if stop <= start or name not in job.merged or not self._raw(name) or device.current() is not None:
            return False
        if not native.ready((stop - start) * len(job.inputs_of(name))):
            return False
        with single_thread():
            survey = self._survey(name)
        models, base, _ = self._inputs(name, start, stop, None, raw=True, check=False)
        return native.lands(
            lambda: job.method.merge(models, base, None, survey, start, job.parameters_of(name)), out, torch_dtype(job.outputs[name].dtype)
        )

    def together(self, names: Sequence[str]) -> torch.Tensor:
        """Whole output tensors of one stored dtype, end to end.

        Neighbours that are merged element by element with the same values are one chunk: the method cannot tell, and the values are the
        same. Memory: all of them at once.
        """
        import torch

        runs = self._runs(names) if device.current() is None else [[name] for name in names]
        parts = [self._merge_run(run) if len(run) > 1 else self.read(run[0], 0, self._job.outputs[run[0]].numel) for run in runs]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _runs(self, names: Sequence[str]) -> list[list[str]]:
        """Neighbours that may be merged as one."""
        job = self._job
        runs: list[list[str]] = []
        last: Any = None
        asked: tuple[Mapping[str, Any] | None, bool] = (None, False)  # many tensors have the same parameters
        for name in names:
            kind = None
            if name in job.merged and name not in job.members and not job.method.needs_uniform:
                values = job.parameters_of(name)
                if values is not asked[0]:
                    asked = (values, not job.method.rounds(values) and job.method.unit(values) == "element")
                kind = (job.outputs[name].dtype, self._dtypes_of(name), values) if asked[1] else None
            if kind is not None and kind == last:
                runs[-1].append(name)
            else:
                runs.append([name])
            last = kind
        return runs

    def _dtypes_of(self, name: str) -> tuple[str, ...]:
        if name not in self._dtypes:
            self._dtypes[name] = tuple(one.info(name).dtype for one in self._job.inputs_of(name))
        return self._dtypes[name]

    def _merge_run(self, names: Sequence[str]) -> torch.Tensor:
        import torch

        job = self._job
        parameters = job.parameters_of(names[0])
        inputs = job.inputs_of(names[0])
        compute = torch.float64 if any(one.info(names[0]).dtype == "F64" for one in inputs) else torch.float32
        raw = getattr(job.method, "raw", False) and compute == torch.float32
        with compiled.using(self._compiled), single_thread():
            chunks = [one.together(names) for one in inputs]
            chunks = chunks if raw else [chunk.to(compute) for chunk in chunks]
            models, base = (chunks[:-1], chunks[-1]) if job.base is not None else (chunks, None)
            if raw and device.current() is None and native.ready(sum(map(len, chunks))):
                out = torch.empty(len(chunks[0]), dtype=torch_dtype(job.outputs[names[0]].dtype))
                if native.lands(lambda: job.method.merge(models, base, None, [], 0, parameters), out, out.dtype):
                    return out
            sound = raw or all(math.isfinite(chunk.sum().item()) for chunk in chunks)
            result = job.method.merge(models, base, None, [], 0, parameters)
            stored = result.reshape(-1).to(torch_dtype(job.outputs[names[0]].dtype))
            total = stored.sum(dtype=torch.float32 if stored.dtype == torch.float16 else None)
        if sound and math.isfinite(total.item()):
            return stored
        return torch.cat([self.read(name, 0, job.outputs[name].numel) for name in names])  # which says what is wrong, and where

    # -- chunks ---------------------------------------------------------------------------------------------------------

    def _merge(self, name: str, start: int, stop: int) -> torch.Tensor:
        unit = self._job.unit(name)
        if unit == "element":
            return self._merge_chunk(name, start, stop, None)
        with device.wide():
            return self._merge_parts(name, unit, start, stop)

    def _merge_parts(self, name: str, unit: Unit, start: int, stop: int) -> torch.Tensor:
        info = self._job.outputs[name]
        if unit != "matrix":
            shape = unit_shape(unit, info.shape)
            part = math.prod(shape)
            first, last = start // part * part, -(-stop // part) * part
            return self._merge_chunk(name, first, last, (-1, *shape))[start - first : stop - first]
        with self._lock:
            if self._whole is None or self._whole[0] != name:
                self._whole = None
                self._whole = (name, self._merge_chunk(name, 0, info.numel, info.shape))
                if device.current() is not None:  # a lane lends its buffer
                    self._whole = (name, self._whole[1].clone())
            return self._whole[1][start:stop]

    def _merge_chunk(self, name: str, start: int, stop: int, shape: Sequence[int] | None) -> torch.Tensor:
        import torch

        dtype = torch_dtype(self._job.outputs[name].dtype)
        if self._raw(name):
            stored = torch.empty(stop - start, dtype=dtype)
            if self._landed(name, start, stop, stored):
                return stored
        parameters = self._job.parameters_of(name)
        survey = self._survey(name)
        raw = self._raw(name)
        surveyed = any(round_.ranges is None for round_ in self._job.rounds(name))  # every element has been looked at
        models, base, uniform = self._inputs(name, start, stop, shape, raw=raw, check=not surveyed and not raw)
        with device.there():
            result = self._job.method.merge(models, base, uniform, survey, start, parameters)
        if raw and not surveyed and any(result is given for given in (*models, base)):
            self._load(name, start, stop, raw=False, check=True)  # nothing was computed in which the others could show
        stored = result.reshape(-1).to(dtype)
        # The sum of a chunk is finite unless an element is not (or the sum overflows, so look again before complaining).
        total = stored.sum(dtype=torch.float32 if dtype == torch.float16 else None)
        if not math.isfinite(total.item()) and not bool(torch.isfinite(stored).all()):
            self._load(name, start, stop, raw=False, check=True)  # which says so where an input is to blame
            if bool(torch.isfinite(result).all()):
                largest, kind = torch.finfo(dtype).max, str(dtype).removeprefix("torch.")
                raise MergeError(
                    f"{self._job.method.id}: tensor '{name}' does not fit {kind} (largest number {largest:g}). Store a wider dtype."
                )
            raise MergeError(f"{self._job.method.id}: tensor '{name}' comes out with NaN or infinity. Change the parameters.")
        lane = device.current()
        return stored if lane is None else lane.download(stored)

    def _raw(self, name: str) -> bool:
        """Whether the method takes this tensor's inputs as they are stored; what is no number in them then shows in the result."""
        return bool(getattr(self._job.method, "raw", False)) and self._job.unit(name) == "element"

    def _copy(self, name: str, start: int, stop: int) -> torch.Tensor:
        import torch

        job = self._job
        chosen = [(job.labels[position], job.models[position]) for position in job.members_of(name)]
        if not chosen:  # only the base has it
            assert job.base is not None
            return job.base.read(name, start, stop)
        (first_label, first_model), *others = chosen
        first = first_model.read(name, start, stop)
        for label, model in others:
            if not torch.equal(first, model.read(name, start, stop)):
                dtype = first_model.info(name).dtype
                raise MergeError(
                    f"{job.method.id}: tensor '{name}' is {dtype}, which cannot be merged, and {label} differs from {first_label}. "
                    "Merge models in which it is equal, or convert it to a floating dtype first."
                )
        return first

    def _inputs(
        self, name: str, start: int, stop: int, shape: Sequence[int] | None, *, raw: bool = False, check: bool = True
    ) -> tuple[list[torch.Tensor], torch.Tensor | None, Sequence[torch.Tensor] | None]:
        """One chunk of every model, of the base, and of the uniform numbers, in the given shape (default: as they lie)."""
        models, base = self._load(name, start, stop, raw=raw, check=check)
        if shape is not None:
            models = [model.view(tuple(shape)) for model in models]
            base = base.view(tuple(shape)) if base is not None else None
        if not self._job.method.needs_uniform:
            return models, base, None
        streams = [self._job.streams[position] for position in self._job.members_of(name)]
        return models, base, _Uniforms(self._job.uniforms, name, streams, start, stop, shape)

    def _load(self, name: str, start: int, stop: int, *, raw: bool, check: bool) -> tuple[list[torch.Tensor], torch.Tensor | None]:
        """One chunk of every input, in the compute dtype, or as it is stored if `raw` and that is no more than float32.

        With `check` NaN and infinity are refused by model and tensor.
        """
        import torch

        job = self._job
        inputs = self._sources(name)
        compute = torch.float64 if any(checkpoint.info(name).dtype == "F64" for checkpoint in inputs) else torch.float32
        labels = [*(job.labels[position] for position in job.members_of(name)), *([job.base_label] if job.base is not None else [])]
        chunks = []
        lane = device.current()
        for slot, (label, checkpoint) in enumerate(zip(labels, inputs, strict=True)):
            values = checkpoint.read(name, start, stop)
            chunk = values if lane is None else lane.upload((id(self), slot), values)
            if not raw or compute == torch.float64:
                chunk = chunk.to(compute)
            if check and not math.isfinite(chunk.sum().item()) and not bool(torch.isfinite(chunk).all()):
                raise MergeError(
                    f"{label}: tensor '{name}' holds NaN or infinity near element {start + _first_bad(chunk):,}. "
                    "Repair or leave out this model."
                )
            chunks.append(chunk)
        return (chunks[:-1], chunks[-1]) if job.base is not None else (chunks, None)

    # -- surveys --------------------------------------------------------------------------------------------------------

    def _survey(self, name: str) -> list[Any]:
        with self._lock:
            if self._model_survey is None:
                with device.wide():
                    self._survey_model()
            if self._surveyed is None or self._surveyed[0] != name:
                known = list(self._model_survey or [])
                for round_ in self._job.rounds(name):
                    if round_.scope == "tensor":
                        with device.wide():
                            known.append(self._reduce(round_, [name], known))
                self._surveyed = (name, known)
            known = self._surveyed[1]
        return [result.at(name) if hasattr(result, "at") else result for result in known]

    def _survey_model(self) -> None:
        job = self._job
        names = sorted(job.merged)
        rounds = [round_ for round_ in job.rounds(names[0]) if round_.scope == "model"] if names else []
        known: list[Any] = []
        if rounds:
            self._check_one_for_all(names)
            for round_ in rounds:
                known.append(self._reduce(round_, names, known))
            offsets = self._offsets(names)
            known = [_Placed(result, offsets) for result in known]
        self._model_survey = known

    def _check_one_for_all(self, names: Sequence[str]) -> None:
        """What looks at the whole model at once cannot take one value here and another there."""
        job = self._job
        first = job.parameters_of(names[0])
        for name in names:
            if name in job.members:
                raise MergeError(
                    f"{job.method.id}: looks at the whole model at once, and tensor '{name}' is missing in some models. "
                    "Leave those models out, or let the method look at one tensor at a time."
                )
            found = job.parameters_of(name)
            if differing := [key for key in first if found[key] != first[key]]:
                raise MergeError(
                    f"{job.method.id}: looks at the whole model at once, so '{differing[0]}' must be the same for all tensors; it is "
                    f"{first[differing[0]]} for '{names[0]}' and {found[differing[0]]} for '{name}'. Give one number, "
                    "or let the method look at one tensor at a time."
                )

    def _offsets(self, names: Sequence[str]) -> dict[str, int]:
        offsets, position = {}, 0
        for name in names:
            offsets[name] = position
            position += self._job.outputs[name].numel
        return offsets

    def _reduce(self, round_: Round, names: Sequence[str], known: Sequence[Any]) -> Any:
        """Visit the chunks of `names`, laid end to end, in order, and combine what they give."""
        offsets = self._offsets(names)
        total = sum(self._job.outputs[name].numel for name in names)
        parameters = self._job.parameters_of(names[0])
        wanted = None if round_.ranges is None else sorted(round_.ranges(known, total, parameters))
        partials: list[Any] = []
        for name in names:
            begin, info = offsets[name], self._job.outputs[name]
            part = unit_shape(round_.unit, info.shape)
            shape = {"element": None, "matrix": info.shape}.get(round_.unit, (-1, *part))
            raw = round_.sound is not None
            for start, stop in _survey_chunks(info.numel, math.prod(part), begin, wanted, raw=raw):
                models, base, uniform = self._inputs(name, start, stop, shape, raw=raw, check=not raw)
                with device.there():
                    partial = round_.gather(models, base, uniform, known, begin + start, parameters)
                if round_.sound is not None and not round_.sound(partial):
                    self._load(name, start, stop, raw=False, check=True)
                if round_.fold is not None and partials:
                    partials[0] = round_.fold(partials[0], partial)
                else:
                    partials.append(partial)
        where = f"{self._job.method.id}: tensor '{names[0]}'" if round_.scope == "tensor" else self._job.method.id
        try:
            result = round_.combine(partials, known, total, parameters)
        except CannotMergeError as error:
            raise MergeError(f"{where}: {error}") from None
        if round_.note is not None and (note := round_.note(result)) is not None:
            _log.warning("%s: %s", where, note)
        return result

    def _sources(self, name: str) -> list[Checkpoint]:
        """The inputs to read from: what rounds and merge would compute again each is computed once, into an unlinked scratch file.

        The file lasts until the next tensor; a survey of the whole model comes back to every tensor, so it keeps them all.
        """
        job = self._job
        inputs = job.inputs_of(name)
        rounds = job.rounds(name)
        if not rounds or not any(checkpoint.computed(name) for checkpoint in inputs):
            return inputs
        with self._lock:
            if name not in self._spilled:
                if not any(round_.scope == "model" for round_ in rounds):
                    self._spilled.clear()
                self._spilled[name] = [spill(c, name) if c.computed(name) else c for c in inputs]
            return self._spilled[name]


def _survey_chunks(
    numel: int, part: int, begin: int, wanted: Sequence[tuple[int, int]] | None, *, raw: bool = False
) -> list[tuple[int, int]]:
    """The chunks that a round visits: whole parts, all of them or those that the wanted ranges (shifted by `begin`) touch, once each."""
    if wanted is None:
        most = (
            SURVEY_ELEMENTS * (_RAW_CHUNKS if raw else 1)
            if device.current() is None
            else max(SURVEY_ELEMENTS, device.DEVICE_CHUNK_ELEMENTS)
        )
        step = max(most // part, 1) * part if part else 1
        return [(at, min(at + step, numel)) for at in range(0, numel, step)]
    chunks: list[tuple[int, int]] = []
    for a, b in wanted:
        start, stop = max(a - begin, 0) // part * part, min(-(-(b - begin) // part) * part, numel)
        if chunks and part > 1:
            start = max(start, chunks[-1][1])
        if start < stop:
            chunks.append((start, stop))
    return chunks


@dataclass(frozen=True)
class _Uniforms(Sequence["torch.Tensor"]):
    """The uniform numbers of one chunk, one tensor per model, made when they are asked for: a method may know what they said."""

    source: UniformSource
    name: str
    streams: Sequence[int]
    start: int
    stop: int
    shape: Sequence[int] | None

    def __len__(self) -> int:
        return len(self.streams)

    def __getitem__(self, position: Any) -> Any:
        with device.there():
            numbers = self.source.numbers(self.name, self.streams[position], self.start, self.stop)
        lane = device.current()
        if lane is not None:
            numbers = numbers.to(lane.device)
        return numbers if self.shape is None else numbers.view(tuple(self.shape))


@dataclass(frozen=True)
class _Placed:
    """A model-wide result that speaks in positions of the laid-out model, seen from one tensor."""

    result: Any
    offsets: Mapping[str, int]

    def at(self, name: str) -> Any:
        return self.result.shifted(self.offsets[name]) if hasattr(self.result, "shifted") else self.result


def _first_bad(chunk: torch.Tensor) -> int:
    import torch

    return int((~torch.isfinite(chunk)).nonzero()[0, 0])
