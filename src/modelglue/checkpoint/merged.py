"""A merge as a checkpoint: reading a tensor reads the same tensor of every input and calls the merge method.

The engine knows methods only through the protocol `MergeFunction`. A method first surveys a tensor (or the model) in rounds that
reduce over chunks, then maps over chunks; both see one chunk of every input at a time, so memory is O(chunk x inputs).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modelglue.checkpoint import compiled
from modelglue.checkpoint.fit import check_same_tensors, label_of
from modelglue.checkpoint.merge_function import Constant, MergeFunction, ParameterSource, Round, Unit
from modelglue.checkpoint.protocol import FLOATING, Checkpoint, TensorInfo
from modelglue.checkpoint.scratch import spill
from modelglue.checkpoint.tensors import STORE_DTYPES, torch_dtype
from modelglue.checkpoint.uniform import CounterHash, UniformSource
from modelglue.checkpoint.workers import single_thread
from modelglue.errors import MergeError
from modelglue.settings import BLOCK_ELEMENTS, CHUNK_ELEMENTS

if TYPE_CHECKING:
    import torch

#: chunks of a survey are whole blocks, so that sums come out the same whatever the chunk of the merge
SURVEY_ELEMENTS = max(CHUNK_ELEMENTS // BLOCK_ELEMENTS, 1) * BLOCK_ELEMENTS

#: part of every key that a merge is known by: raise it when equal recipes give other bytes
ENGINE_VERSION = 1
_SHORT = {short: long for long, short in STORE_DTYPES.items()}


class MergedCheckpoint(Checkpoint):
    """`method` over `models` (and `base`), tensor by tensor, computed when read.

    Names, config and side files are the `donor`'s (default: the base, else the first model); every input must have exactly the
    donor's tensors in the donor's shapes. Arithmetic is float32 (float64 for float64 inputs) with one rounding at the end, to `store` (a
    safetensors dtype name; default: the donor's dtype of that tensor). It runs in one thread, because sums and decompositions
    depend on how many share the work; `save` uses several processes. Tensors that are not floating point must be equal in
    all models and are copied.

    `streams` numbers the models for the uniform numbers (default: their positions), so that dropping a member shifts nobody;
    `uniform_source` replaces the counter hash of the seed.
    """

    def __init__(
        self,
        method: MergeFunction,
        models: Sequence[Checkpoint],
        base: Checkpoint | None = None,
        parameters: ParameterSource | Mapping[str, Any] | None = None,
        *,
        labels: Sequence[str] | None = None,
        store: str | None = None,
        seed: int = 0,
        donor: Checkpoint | None = None,
        streams: Sequence[int] | None = None,
        uniform_source: UniformSource | None = None,
    ) -> None:
        if not models:
            raise MergeError(f"{method.id}: no models to merge. Give at least one.")
        if method.needs_base and base is None:
            raise MergeError(f"{method.id}: needs a base model and none was given. Add base: to the recipe.")
        self._method = method
        self._models = list(models)
        self._base = base
        self._parameters = parameters if isinstance(parameters, ParameterSource) else Constant(dict(parameters or {}))
        self._labels = list(labels or (label_of(model) for model in models))
        self._store = STORE_DTYPES.get(store, store) if store else None
        self._seed = seed
        self._uniforms = uniform_source or CounterHash(seed)
        self._donor = donor or base or models[0]
        self._streams = list(streams if streams is not None else range(len(models)))
        self._names = tuple(sorted(self._donor.names()))
        self._surveyed: tuple[str, list[Any]] | None = None  # the last tensor's survey
        self._model_survey: list[Any] | None = None
        self._compiled: Mapping[str, str] | None = None  # chunk functions that run compiled, found by `prepare`
        self._spilled: dict[str, list[Checkpoint]] = {}  # inputs of a surveyed tensor, the computed ones computed once
        self._whole: tuple[str, torch.Tensor] | None = None
        check_same_tensors(self._donor, self._inputs(), self._method.id)

    def __repr__(self) -> str:
        return f"MergedCheckpoint({self._method.id!r}, {self._labels!r})"

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_surveyed": None, "_spilled": {}, "_whole": None}

    # -- what it is -----------------------------------------------------------------------------------------------------

    def names(self) -> Sequence[str]:
        return self._names

    def sources(self) -> Sequence[Checkpoint]:
        return [source for checkpoint in [self._donor, *self._inputs()] for source in checkpoint.sources()]

    def info(self, name: str) -> TensorInfo:
        info = self._donor.info(name)
        return TensorInfo(info.shape, self._store) if self._store and info.dtype in FLOATING else info

    @cached_property
    def config(self) -> Mapping[str, Any]:
        """The donor's config with the dtype field patched; nothing else is touched."""
        config = dict(self._donor.config)
        if self._store and config:
            config["torch_dtype" if "torch_dtype" in config and "dtype" not in config else "dtype"] = _SHORT[self._store]
        return config

    @property
    def files(self) -> Mapping[str, Path]:
        return self._donor.files

    @cached_property
    def identity(self) -> str:
        return self._digest(lambda checkpoint: checkpoint.identity)

    @cached_property
    def stamp(self) -> str:
        return self._digest(lambda checkpoint: checkpoint.stamp)

    def _digest(self, of: Callable[[Checkpoint], str]) -> str:
        value = [
            ENGINE_VERSION, self._method.id, [of(model) for model in self._models], of(self._base) if self._base else None, of(self._donor),
            self._parameters.describe(), self._store, self._uniforms.describe(), self._streams,
        ]  # fmt: skip
        return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()

    def describe(self) -> dict[str, Any]:
        values = self._parameters.describe()
        per_model = {key: value for key, value in values.items() if isinstance(value, list)}
        models = [
            {**_reference(model), **{key: value[position] for key, value in per_model.items()}}
            for position, model in enumerate(self._models)
        ]
        description: dict[str, Any] = {"format": "modelglue/1", "method": self._method.id}
        if self._base is not None:
            description["base"] = _reference(self._base)["model"]
        elif _root(self._donor) is not _root(self._models[0]):  # the method needs no base; config and tokenizer do
            description["base"] = _reference(self._donor)["model"]
        description["models"] = models
        parameters = {key: value for key, value in values.items() if key not in per_model}
        if parameters:
            description["parameters"] = parameters
        description["seed"] = self._seed
        if self._store:
            description["dtype"] = {"compute": "float32", "store": _SHORT[self._store]}
        return description

    # -- reading --------------------------------------------------------------------------------------------------------

    def pieces(self, name: str, limit: int) -> Sequence[tuple[int, int]]:
        info = self.info(name)
        unit = self._unit(name)
        if unit == "matrix":
            return [(0, info.numel)]
        if unit == "row" and info.numel:
            row = info.shape[-1] if info.shape else 1
            limit = max(limit // row, 1) * row
        return super().pieces(name, limit)

    def splittable(self, name: str) -> bool:
        """A surveyed tensor stays with one worker, which then surveys it once."""
        return not (self._is_merged(name) and self._method.rounds(self._parameters.for_tensor(name)))

    def computed(self, name: str) -> bool:
        return self._is_merged(name)

    def prepare(self, names: Sequence[str] | None = None) -> None:
        """Run the rounds that look at the whole model, here and in nested merges; look for compiled chunk functions."""
        import torch  # noqa: F401 - here and not in every worker: forked workers share its memory

        for checkpoint in self._inputs():
            checkpoint.prepare(None)
        wanted = self._names if names is None else names
        merged = [name for name in wanted if self._is_merged(name) and self.info(name).numel]
        if merged:
            if self._model_survey is None:
                with single_thread():
                    self._survey_model()
            elements = sum(self.info(name).numel for name in merged)
            smallest = min(merged, key=lambda name: (self.info(name).numel, name))
            self._compiled = compiled.find(lambda: self._merge(smallest, *self.pieces(smallest, CHUNK_ELEMENTS)[0]), elements)

    def read(self, name: str, start: int = 0, stop: int | None = None, out: torch.Tensor | None = None) -> torch.Tensor:
        """Compute elements start..stop. A range that does not respect the method's unit costs the rows or the matrix around it."""
        info = self.info(name)
        stop = info.numel if stop is None else stop
        if stop <= start:
            import torch

            return torch.empty(0, dtype=torch_dtype(info.dtype))
        if self._is_merged(name):
            with compiled.using(self._compiled), single_thread():
                values = self._merge(name, start, stop)
        else:
            values = self._copy(name, start, stop)
        return values if out is None else out.copy_(values)

    def _merge(self, name: str, start: int, stop: int) -> torch.Tensor:
        info = self.info(name)
        unit = self._unit(name)
        if unit == "element":
            return self._merge_chunk(name, start, stop, None)
        row = info.shape[-1] if info.shape else 1
        if unit == "row":
            first, last = start // row * row, -(-stop // row) * row
            return self._merge_chunk(name, first, last, (-1, row))[start - first : stop - first]
        if self._whole is None or self._whole[0] != name:
            self._whole = (name, self._merge_chunk(name, 0, info.numel, info.shape))
        return self._whole[1][start:stop]

    def _merge_chunk(self, name: str, start: int, stop: int, shape: Sequence[int] | None) -> torch.Tensor:
        import torch

        parameters = self._parameters.for_tensor(name)
        survey = self._survey(name)
        models, base = self._load(name, start, stop)
        uniform = self._uniform(name, start, stop)
        if shape is not None:
            models = [model.view(*shape) for model in models]
            base = base.view(*shape) if base is not None else None
            uniform = [numbers.view(*shape) for numbers in uniform] if uniform is not None else None
        result = self._method.merge(models, base, uniform, survey, start, parameters)
        dtype = torch_dtype(self.info(name).dtype)
        stored = result.reshape(-1).to(dtype)
        # The sum of a chunk is finite unless an element is not (or the sum overflows, so look again before complaining).
        total = stored.sum(dtype=torch.float32 if dtype == torch.float16 else None)
        if not bool(torch.isfinite(total)) and not bool(torch.isfinite(stored).all()):
            if bool(torch.isfinite(result).all()):
                largest, kind = torch.finfo(dtype).max, str(dtype).removeprefix("torch.")
                raise MergeError(
                    f"{self._method.id}: tensor '{name}' does not fit {kind} (largest number {largest:g}). Store a wider dtype."
                )
            raise MergeError(f"{self._method.id}: tensor '{name}' comes out with NaN or infinity. Change the parameters.")
        return stored

    def _copy(self, name: str, start: int, stop: int) -> torch.Tensor:
        import torch

        first = self._models[0].read(name, start, stop)
        for label, model in zip(self._labels[1:], self._models[1:], strict=True):
            if not torch.equal(first, model.read(name, start, stop)):
                dtype = self._donor.info(name).dtype
                raise MergeError(
                    f"{self._method.id}: tensor '{name}' is {dtype}, which cannot be merged, and {label} differs from {self._labels[0]}. "
                    "Merge models in which it is equal, or convert it to a floating dtype first."
                )
        return first

    def _load(self, name: str, start: int, stop: int) -> tuple[list[torch.Tensor], torch.Tensor | None]:
        """One chunk of every input, in the compute dtype; refuses NaN and infinity by model and tensor."""
        import torch

        checkpoints = self._sources(name)
        wide = any(checkpoint.info(name).dtype == "F64" for checkpoint in checkpoints)
        compute = torch.float64 if wide else torch.float32
        labels = [*self._labels, *([label_of(self._base)] if self._base is not None else [])]
        chunks = []
        for label, checkpoint in zip(labels, checkpoints, strict=True):
            chunk = checkpoint.read(name, start, stop).to(compute)
            if not bool(torch.isfinite(chunk.sum())) and not bool(torch.isfinite(chunk).all()):
                raise MergeError(
                    f"{label}: tensor '{name}' holds NaN or infinity near element {start + _first_bad(chunk):,}. "
                    "Repair or leave out this model."
                )
            chunks.append(chunk)
        return chunks[: len(self._models)], chunks[len(self._models)] if self._base is not None else None

    def _uniform(self, name: str, start: int, stop: int) -> list[torch.Tensor] | None:
        if not self._method.needs_uniform:
            return None
        return [self._uniforms.numbers(name, stream, start, stop) for stream in self._streams]

    # -- surveys --------------------------------------------------------------------------------------------------------

    def _survey(self, name: str) -> list[Any]:
        if self._model_survey is None:
            self._survey_model()
        if self._surveyed is None or self._surveyed[0] != name:
            known = list(self._model_survey or [])
            rounds = self._method.rounds(self._parameters.for_tensor(name))
            for round_ in rounds:
                if round_.scope == "tensor":
                    known.append(self._reduce(round_, [name], known))
            self._surveyed = (name, known)
        known = self._surveyed[1]
        return [result.at(name) if hasattr(result, "at") else result for result in known]

    def _survey_model(self) -> None:
        names = [name for name in self._names if self._is_merged(name)]
        known: list[Any] = []
        rounds = self._method.rounds(self._parameters.for_tensor(names[0])) if names else []
        if any(round_.scope == "model" for round_ in rounds):
            offsets = self._offsets(names)
            for round_ in rounds:
                if round_.scope == "model":
                    known.append(self._reduce(round_, names, known))
            known = [_Placed(result, offsets) for result in known]
        self._model_survey = known

    def _offsets(self, names: Sequence[str]) -> dict[str, int]:
        offsets, position = {}, 0
        for name in names:
            offsets[name] = position
            position += self.info(name).numel
        return offsets

    def _reduce(self, round_: Round, names: Sequence[str], known: Sequence[Any]) -> Any:
        """Visit the chunks of `names`, laid end to end, in order, and combine what they give."""
        offsets = self._offsets(names)
        total = sum(self.info(name).numel for name in names)
        parameters = self._parameters.for_tensor(names[0])
        wanted = None if round_.ranges is None else sorted(round_.ranges(known, total, parameters))
        partials = []
        for name in names:
            begin, numel = offsets[name], self.info(name).numel
            if wanted is None:
                ranges = [(at, min(at + SURVEY_ELEMENTS, numel)) for at in range(0, numel, SURVEY_ELEMENTS)]
            else:
                ranges = [(max(a - begin, 0), min(b - begin, numel)) for a, b in wanted if a < begin + numel and b > begin]
            for start, stop in ranges:
                models, base = self._load(name, start, stop)
                uniform = self._uniform(name, start, stop)
                partials.append(round_.gather(models, base, uniform, known, begin + start, parameters))
        return round_.combine(partials, known, total, parameters)

    def _sources(self, name: str) -> list[Checkpoint]:
        """The inputs to read from: what rounds and merge would compute again each is computed once, into an unlinked scratch file.

        The file lasts until the next tensor; a survey of the whole model comes back to every tensor, so it keeps them all.
        """
        inputs = self._inputs()
        rounds = self._method.rounds(self._parameters.for_tensor(name))
        if not rounds or not any(checkpoint.computed(name) for checkpoint in inputs):
            return inputs
        if name not in self._spilled:
            if not any(round_.scope == "model" for round_ in rounds):
                self._spilled.clear()
            self._spilled[name] = [spill(c, name) if c.computed(name) else c for c in inputs]
        return self._spilled[name]

    def _inputs(self) -> list[Checkpoint]:
        return [*self._models, *([self._base] if self._base is not None else [])]

    def _is_merged(self, name: str) -> bool:
        dtype = self._donor.info(name).dtype
        if dtype in FLOATING:
            return True
        if dtype.startswith("F8"):
            raise MergeError(
                f"{self._method.id}: tensor '{name}' of {label_of(self._donor)} is {dtype}; 8-bit floats are not merged elementwise. "
                "Dequantise the models first."
            )
        return False

    def _unit(self, name: str) -> Unit:
        return self._method.unit(self._parameters.for_tensor(name)) if self._is_merged(name) else "element"


@dataclass(frozen=True)
class _Placed:
    """A model-wide result that speaks in positions of the laid-out model, seen from one tensor."""

    result: Any
    offsets: Mapping[str, int]

    def at(self, name: str) -> Any:
        return self.result.shifted(self.offsets[name]) if hasattr(self.result, "shifted") else self.result


def _reference(checkpoint: Checkpoint) -> dict[str, Any]:
    description = checkpoint.describe()
    if set(description) == {"model"}:
        return description
    if "dtype" not in description:  # a nested recipe without one means float32
        kinds = {checkpoint.info(name).dtype for name in checkpoint.names()} & FLOATING
        if len(kinds) == 1:
            description["dtype"] = {"compute": "float32", "store": _SHORT[kinds.pop()]}
    return {"model": description}


def _root(checkpoint: Checkpoint) -> Checkpoint:
    """The model on disk whose config, tokenizer and dtypes a merge takes."""
    while isinstance(checkpoint, MergedCheckpoint):
        checkpoint = checkpoint._donor
    return checkpoint


def _first_bad(chunk: torch.Tensor) -> int:
    import torch

    return int((~torch.isfinite(chunk)).nonzero()[0, 0])
