"""A merge as a checkpoint: reading a tensor reads the same tensor of every input and calls the merge method.

What is merged with what is decided here; the arithmetic is the engine's.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from modelglue.checkpoint.engine.arithmetic import Engine, Job
from modelglue.checkpoint.engine.fit import Missing, ShapeMismatch, fit, label_of, promoted, widest
from modelglue.checkpoint.engine.merge_function import Constant, MergeFunction, ParameterSource, unit_shape
from modelglue.checkpoint.engine.uniform import CounterHash, UniformSource
from modelglue.checkpoint.protocol import FLOATING, Checkpoint, SideFile, TensorInfo
from modelglue.checkpoint.tensors import STORE_DTYPES, torch_dtype
from modelglue.errors import CheckpointError, MergeError, did_you_mean

if TYPE_CHECKING:
    import torch

#: part of every key that a merge is known by: raise it when equal recipes give other bytes
ENGINE_VERSION = 2
_SHORT = {short: long for long, short in STORE_DTYPES.items()}


class MergedCheckpoint(Checkpoint):
    """`method` over `models` (and `base`), tensor by tensor, computed when read.

    Shapes, config and side files are the `donor`'s (default: the base, else the first model). Every input must have the same tensors in
    the same shapes, unless `missing` and `shape_mismatch` say what to do with the others (see `fit`; `warnings` then names them).
    Arithmetic is float32 (float64 for float64 inputs) with one rounding at the end, to `store` (a dtype name, or "widest" for the one
    to which the inputs' dtypes promote; default: the donor's dtype of that tensor). It runs in one thread, because sums and
    decompositions depend on how many share the work; `save` uses several processes. Tensors that are not floating point must be equal
    in all models and are copied.

    `streams` numbers the models for the uniform numbers (default: their positions), so that dropping a member shifts nobody;
    `uniform_source` replaces the counter hash of the seed. `description` is the recipe that `describe` answers with, where it says more
    than method, inputs and values.
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
        least: int = 1,
        missing: Missing = "error",
        shape_mismatch: ShapeMismatch = "error",
        description: Mapping[str, Any] | None = None,
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
        self._policies = [missing, shape_mismatch]
        self._description = description
        self._fit = fit(
            method.id, self._donor, self._models, base, self._labels,
            least=least, missing=missing, shape_mismatch=shape_mismatch,
        )  # fmt: skip
        self._names = tuple(self._fit.infos)
        self._job = Job(
            method, self._models, base, self._labels, label_of(base) if base is not None else "", self._parameters, self._uniforms,
            self._streams, {name: self._output(name) for name in self._names}, self._merged_names(), self._fit.members,
        )  # fmt: skip
        self._engine = Engine(self._job)
        self._fixed: dict[str, Hashable] = {}  # of what a tensor's values are a function of: all but the parameters
        self._last: tuple[Mapping[str, Any], Hashable] = ({}, ())  # parameters as they were asked for last, and frozen

    def __repr__(self) -> str:
        return f"MergedCheckpoint({self._method.id!r}, {self._labels!r})"

    # -- what it is -----------------------------------------------------------------------------------------------------

    def names(self) -> Sequence[str]:
        return self._names

    def sources(self) -> Sequence[Checkpoint]:
        return [source for checkpoint in [self._donor, *self._inputs()] for source in checkpoint.sources()]

    def origins(self, name: str) -> Sequence[tuple[Checkpoint, str]]:
        return [origin for checkpoint in self._holders(name) for origin in checkpoint.origins(name)]

    def info(self, name: str) -> TensorInfo:
        try:
            return self._job.outputs[name]
        except KeyError:
            raise CheckpointError(f"{self!r}: has no tensor '{name}'.{did_you_mean(name, self._names)}") from None

    def _output(self, name: str) -> TensorInfo:
        info = self._models[0].info(name) if self._copies(name) else self._fit.infos[name]
        if info.dtype not in FLOATING or not self._store:
            return info
        if self._store != "widest":
            return TensorInfo(info.shape, self._store)
        return TensorInfo(info.shape, widest([checkpoint.info(name).dtype for checkpoint in self._holders(name)]))

    def _holders(self, name: str) -> list[Checkpoint]:
        """The inputs of one tensor."""
        members = self._fit.members.get(name, range(len(self._models)))
        in_base = self._base is not None and not (members and name in self._fit.copied)
        return [*(self._models[i] for i in members), *([self._base] if self._base is not None and in_base else [])]

    def _copies(self, name: str) -> bool:
        """Whether the method takes the first model's tensor as it is, NaN and all."""
        return self._method.copies(self._parameters.for_tensor(name))

    @cached_property
    def config(self) -> Mapping[str, Any]:
        """The donor's config with the dtype field patched; nothing else is touched."""
        config = dict(self._donor.config)
        store = promoted(self, self._donor) if self._store == "widest" else self._store
        if store in _SHORT and config:
            config["torch_dtype" if "torch_dtype" in config and "dtype" not in config else "dtype"] = _SHORT[store]
        return config

    @property
    def files(self) -> Mapping[str, SideFile]:
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
            self._parameters.describe(), self._store, self._uniforms.describe(), self._streams, self._policies,
        ]  # fmt: skip
        return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()

    @property
    def warnings(self) -> Sequence[str]:
        """Tensors that are merged from some of the inputs only, copied or left out."""
        return self._fit.warnings

    def describe(self) -> dict[str, Any]:
        if self._description is not None:
            return dict(self._description)
        values = self._parameters.describe()
        per_model = {key: value for key, value in values.items() if isinstance(value, list)}
        models = [
            {**_reference(model), **{key: value[position] for key, value in per_model.items()}}
            for position, model in enumerate(self._models)
        ]
        description: dict[str, Any] = {"format": "modelglue/1", "method": self._method.id}
        if self._base is not None:
            description["base"] = _reference(self._base)["model"]
        elif _root(self._donor) is not _root(self._models[0]):  # the method takes no base; config and tokenizer do
            if self._method.takes_base:
                raise MergeError(
                    f"{self._method.id}: config and tokenizer come from {label_of(self._donor)}, which is no input of the merge. "
                    "A recipe would make it the base, and this method computes with a base. Take them from the first model, or give a base."
                )
            description["base"] = _reference(self._donor)["model"]
        description["models"] = models
        parameters = {key: value for key, value in values.items() if key not in per_model}
        if parameters:
            description["parameters"] = parameters
        description["seed"] = self._seed
        if self._store:
            description["dtype"] = {"compute": "float32", "store": _SHORT.get(self._store, self._store)}
        return description

    # -- reading --------------------------------------------------------------------------------------------------------

    def pieces(self, name: str, limit: int) -> Sequence[tuple[int, int]]:
        info = self.info(name)
        unit = self._job.unit(name)
        if unit == "matrix":
            return [(0, info.numel)]
        if unit != "element" and info.numel:
            part = math.prod(unit_shape(unit, info.shape))
            limit = max(limit // part, 1) * part
        return super().pieces(name, limit)

    def together(self, names: Sequence[str]) -> torch.Tensor:
        """As few calls of the method as its arithmetic allows; the values are those of `read`."""
        if any(name in self._fit.copied for name in names):
            return super().together(names)
        return self._engine.together(names)

    def values_of(self, name: str) -> Hashable:
        job = self._job
        if name not in job.merged or name in self._fit.copied:
            return (self.info(name).dtype, *(one.values_of(name) for one in self._holders(name)))
        if any(round_.scope == "model" for round_ in job.rounds(name)):
            return super().values_of(name)
        if name not in self._fixed:
            random = (name, str(self._uniforms.describe()), tuple(job.streams[i] for i in job.members_of(name)))
            self._fixed[name] = (
                ENGINE_VERSION, self._method.id, tuple(job.models[i].values_of(name) for i in job.members_of(name)),
                job.base.values_of(name) if job.base is not None else None, random if self._method.needs_uniform else None,
            )  # fmt: skip
        values = job.parameters_of(name)
        if values is not self._last[0]:  # many tensors have the same
            self._last = (values, _frozen(values))
        info = job.outputs[name]
        return self._fixed[name], info.dtype, info.shape, self._last[1]

    @property
    def parameters(self) -> ParameterSource:
        """The values of the method's parameters, by tensor."""
        return self._parameters

    def with_parameters(self, parameters: ParameterSource | Mapping[str, Any]) -> MergedCheckpoint:
        """The same merge with other values: what fits what is not looked at again. Takes a fraction of the time of a new merge.

        The values must be of the kind of those before: the recipe that the merge was made of is forgotten, `describe` makes one.
        """
        other = copy.copy(self)
        other._parameters = parameters if isinstance(parameters, ParameterSource) else Constant(dict(parameters))
        other._description = None
        for key in ("identity", "stamp"):
            other.__dict__.pop(key, None)
        other._job = replace(self._job, parameters=other._parameters)
        old, new = self._parameters, other._parameters
        alike = (
            isinstance(old, Constant) and isinstance(new, Constant) and self._method.copies(old.values) == self._method.copies(new.values)
        )
        if not alike:
            other._job = replace(other._job, outputs={name: other._output(name) for name in self._names})
            other._job = replace(other._job, merged=other._merged_names())
        other._engine = self._engine.over(other._job)
        other._last = ({}, ())
        return other

    def splittable(self, name: str) -> bool:
        """A surveyed tensor stays with one worker, which then surveys it once."""
        return not self._job.rounds(name)

    def computed(self, name: str) -> bool:
        return name in self._job.merged

    def reads_twice(self, name: str) -> bool:
        return bool(self._job.rounds(name)) or any(checkpoint.reads_twice(name) for checkpoint in self._job.inputs_of(name))

    def working_bytes(self, name: str, elements: int) -> int:
        return self._engine.working_bytes(name, elements)

    def prepare(self, names: Sequence[str] | None = None) -> None:
        """Run the rounds that look at the whole model, here and in nested merges; look for compiled chunk functions."""
        for checkpoint in self._inputs():
            checkpoint.prepare(None)
        self._engine.prepare(self._names if names is None else names)

    def read(self, name: str, start: int = 0, stop: int | None = None, out: torch.Tensor | None = None) -> torch.Tensor:
        """Compute elements start..stop. A range that does not respect the method's unit costs the rows or the matrix around it."""
        stop = self.info(name).numel if stop is None else stop
        if name not in self._fit.copied:
            return self._engine.read(name, start, stop, out)
        values = self._stored(name, self._engine.read(name, start, stop))
        return values if out is None else out.copy_(values)

    def _stored(self, name: str, values: torch.Tensor) -> torch.Tensor:
        """A copied tensor in the dtype of the output."""
        import torch

        stored = values.to(torch_dtype(self.info(name).dtype))
        if stored.dtype.is_floating_point and stored.dtype != values.dtype and not bool(torch.isfinite(stored).all()):
            raise MergeError(f"{self._method.id}: tensor '{name}' does not fit {_SHORT[self.info(name).dtype]}. Store a wider dtype.")
        return stored

    def _inputs(self) -> list[Checkpoint]:
        return [*self._models, *([self._base] if self._base is not None else [])]

    def _merged_names(self) -> frozenset[str]:
        """The tensors that are computed, or stored in another dtype; those that are not floating point are copied, 8-bit floats are
        refused by name unless the method copies.
        """
        copied = {name for name in self._names if self._copies(name) and self._output(name) == self._models[0].info(name)}
        copied |= self._fit.copied
        for name in self._names:
            dtype = self._fit.infos[name].dtype
            if dtype.startswith("F8") and name not in copied:
                raise MergeError(
                    f"{self._method.id}: tensor '{name}' of {label_of(self._donor)} is {dtype}; 8-bit floats are not merged elementwise. "
                    "Dequantise the models first."
                )
        return frozenset(name for name in self._names if self._fit.infos[name].dtype in FLOATING and name not in copied)


def _frozen(values: Mapping[str, Any]) -> Hashable:
    """Parameters as something that can be compared and hashed."""
    return tuple((key, tuple(value) if isinstance(value, list) else value) for key, value in sorted(values.items()))


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
