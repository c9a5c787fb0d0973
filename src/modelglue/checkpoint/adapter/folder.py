"""An adapter folder, opened: its modules, their factors, and what it replaces, whatever base it will be laid on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from modelglue.checkpoint.adapter.config import CONFIG_FILE, AdapterConfig, read_config
from modelglue.checkpoint.adapter.keys import Key, read_keys
from modelglue.checkpoint.formats.header import shown
from modelglue.checkpoint.formats.opening import open_folder
from modelglue.checkpoint.formats.shards import WeightFormat, check_index, find_shards
from modelglue.checkpoint.protocol import FLOATING, Checkpoint, TensorInfo
from modelglue.errors import CheckpointError, did_you_mean

if TYPE_CHECKING:
    import torch

WEIGHTS_FILE = "adapter_model.safetensors"
#: the formats that PEFT writes, the usual one first
_FORMATS = (
    WeightFormat((".safetensors",), (WEIGHTS_FILE,), (f"{WEIGHTS_FILE}.index.json",), ()),
    WeightFormat((".bin",), ("adapter_model.bin",), ("adapter_model.bin.index.json",), ()),
)
_STEP = 2**22


@dataclass(frozen=True)
class Factors:
    """The update `scale * B @ A` of one module, float32: A (r, i), B (o, r). For an embedding i counts tokens and o is the width."""

    A: torch.Tensor
    B: torch.Tensor
    scale: float


@dataclass(frozen=True)
class Update:
    """The keys of one low-rank update. `depth`: how many other trained parameters of the module are wrapped inside it."""

    module: str
    depth: int
    A: str
    B: str
    embedding: bool = False
    bias: str | None = None
    magnitude: str | None = None

    @property
    def name(self) -> str:
        """What the update is called: the module, as the adapter calls it."""
        return self.module + ".base_layer" * self.depth


@dataclass(frozen=True)
class Part:
    """What belongs to rows first..last of one expert in the factors of a stack of `experts`."""

    expert: int
    experts: int
    first: int
    last: int


class Adapter:
    """A LoRA adapter on disk. Opening reads the config and the headers; a factor is read when it is asked for. Picklable."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config: AdapterConfig = read_config(path)
        self._tensors = _open_tensors(path)
        keys = read_keys(self._tensors, self.config, path)
        #: name -> update, in the order of names
        self.updates: Mapping[str, Update] = _updates(keys, path)
        #: tensor as the adapter calls it -> key of what replaces it; the copies of base layers are updated after that
        self.replaced: Mapping[str, str] = _replaced(keys, path)
        #: embedding module -> key of the rows that replace rows of it
        self.tokens: Mapping[str, str] = {key.module: key.key for key in keys if key.kind == "tokens"}
        faults = [fault for update in self.updates.values() for fault in self._faults(update)]
        if not self.updates and not self.replaced and not self.tokens:
            faults.append("holds no tensors. Fetch the adapter again.")
        if faults:
            raise CheckpointError("\n".join(f"{path}: {fault}" for fault in faults))

    def __repr__(self) -> str:
        return f"Adapter({str(self.path)!r})"

    @property
    def uses_dora(self) -> bool:
        return any(update.magnitude is not None for update in self.updates.values())

    def info(self, key: str) -> TensorInfo:
        """Shape and dtype of the tensor at a key of the file."""
        return self._tensors[key].info(key)

    def read(self, key: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """Elements start..stop of the tensor at a key, 1-D, in the file's dtype. CheckpointError for NaN and infinity."""
        import torch

        values = self._tensors[key].read(key, start, stop)
        floating = self.info(key).dtype in FLOATING
        if floating and not bool(torch.isfinite(values.sum(dtype=torch.float32))) and not bool(torch.isfinite(values).all()):
            raise CheckpointError(f"{self.path}: tensor '{key}' holds NaN or infinity. Repair or leave out this adapter.")
        return values

    def tensor(self, key: str) -> torch.Tensor:
        """The whole tensor at a key, in its own shape and the file's dtype."""
        return self.read(key).view(self.info(key).shape)

    def scale(self, name: str, parameter: str | None = None) -> float:
        """c of an update: alpha / r, or alpha / sqrt(r); the patterns of the config know a targeted parameter by its own name.

        CheckpointError if `parameter` is not given and the module has several, with different scales.
        """
        module = self._find(name).module
        targets = [target.rpartition(".") for target in self.config.target_parameters]
        names = {tail for head, _, tail in targets if module == head or module.endswith(f".{head}")} if parameter is None else {parameter}
        scales = {self.config.scale(f"{module}.{one}") for one in names} or {self.config.scale(module)}
        if len(scales) > 1:
            raise CheckpointError(
                f"{self.path}: '{name}' updates one of several parameters, and only a base tells which. Open it on its base."
            )
        return scales.pop()

    def factors(self, name: str, scale: float | None = None, part: Part | None = None) -> Factors:
        """The factors of an update (with another scale, if given), without ever forming B A. Memory: the factors in float32.

        A stack of experts keeps the file's order: row e r + j of A and column j E + e of B belong to component j of expert e.
        """
        import torch

        update = self._find(name)
        if part is None:
            A, B = (self.tensor(key).to(torch.float32) for key in (update.A, update.B))
        else:
            (rows, width), (_, columns) = self.info(update.A).shape, self.info(update.B).shape
            rank = rows // part.experts
            A = self.read(update.A, part.expert * rank * width, (part.expert + 1) * rank * width).view(rank, width).to(torch.float32)
            B = (
                self.read(update.B, part.first * columns, part.last * columns)
                .view(-1, columns)[:, part.expert :: part.experts]
                .to(torch.float32)
            )
        return Factors(A.flatten(1), B.flatten(1), self.scale(name) if scale is None else scale)

    @cached_property
    def identity(self) -> str:
        """SHA-256 (hex) of the config and of every tensor's bytes."""
        import torch

        digest = hashlib.sha256(json.dumps(self.config.raw, sort_keys=True).encode())
        for key in sorted(self._tensors):
            info = self.info(key)
            digest.update(json.dumps([key, info.dtype, list(info.shape)]).encode())
            for start in range(0, info.numel, _STEP):
                values = self._tensors[key].read(key, start, min(start + _STEP, info.numel))
                digest.update(values.view(torch.uint8).numpy().data)
        return digest.hexdigest()

    @cached_property
    def stamp(self) -> str:
        """Changes with the config, and with path, size, mtime or inode of a weight file."""
        shards = dict.fromkeys(self._tensors.values())
        value = [json.dumps(self.config.raw, sort_keys=True), *(shard.stamp for shard in shards)]
        return hashlib.sha256("\n".join(value).encode()).hexdigest()

    def _find(self, name: str) -> Update:
        try:
            return self.updates[name]
        except KeyError:
            raise CheckpointError(f"{self.path}: has no update of '{name}'.{did_you_mean(name, self.updates)}") from None

    def _faults(self, update: Update) -> list[str]:
        """What is wrong with an update by itself: its shapes and dtypes."""
        faults = []
        A, B = self.info(update.A), self.info(update.B)
        for key, info in ((update.A, A), (update.B, B)):
            if len(info.shape) < 2 or info.numel == 0:
                faults.append(f"tensor '{key}' has shape {list(info.shape)}, allowed are two or more sizes from 1. Save the adapter again.")
        keys = [key for key in (update.A, update.B, update.bias, update.magnitude) if key is not None]
        faults += [
            f"tensor '{key}' is {self.info(key).dtype}; allowed are {', '.join(sorted(FLOATING))}. Save the adapter again."
            for key in keys
            if self.info(key).dtype not in FLOATING
        ]
        if not faults and A.shape[0] != B.shape[1]:
            faults.append(
                f"'{update.name}' has factors of shapes {list(A.shape)} and {list(B.shape)}, whose ranks ({A.shape[0]} and {B.shape[1]}) "
                "differ. Fetch the adapter again."
            )
        return faults


def open_adapter(path: str | Path) -> Adapter:
    """Open an adapter folder. Reads config and headers; CheckpointError names every fault of it."""
    path = Path(path)
    if not path.is_dir():
        raise CheckpointError(f"{path}: is no folder. Give the folder of an adapter, with {CONFIG_FILE} and {WEIGHTS_FILE}.")
    return Adapter(path)


def _open_tensors(path: Path) -> dict[str, Checkpoint]:
    """Key -> the file that holds it: one file or shards, of safetensors or pickled (weights only, nothing is executed)."""
    form = next((form for form in _FORMATS if any(path.glob(f"adapter_model*{form.suffixes[0]}"))), None)
    if form is None:
        raise CheckpointError(f"{path}: holds {CONFIG_FILE}, but no {WEIGHTS_FILE}. Fetch the adapter again.")
    found: dict[str, Checkpoint] = {}
    files: dict[str, str] = {}
    for shard in find_shards(path, form):
        opened = open_folder(shard)
        for key in opened.names():
            if key in found:
                raise CheckpointError(f"{shard}: tensor {shown(key)} stands in {files[key]} as well. Remove one of the shards.")
            found[key], files[key] = opened, shard.name
    check_index(path, form, files)
    return dict(sorted(found.items()))


def _updates(keys: Sequence[Key], path: Path) -> dict[str, Update]:
    parts: dict[tuple[str, int], dict[str, str]] = {}
    for key in keys:
        if key.kind not in ("tokens", "base", "saved"):
            there = parts.setdefault((key.module, key.depth), {})
            if key.kind in there:
                raise CheckpointError(f"{path}: tensors '{there[key.kind]}' and '{key.key}' are the same. Remove one of them.")
            there[key.kind] = key.key
    found: dict[str, Update] = {}
    faults = []
    for (module, depth), there in sorted(parts.items()):
        sides = ("embedding_A", "embedding_B") if "embedding_A" in there or "embedding_B" in there else ("A", "B")
        lacking = [side for side in sides if side not in there]
        if lacking or len({"A", "embedding_A"} & there.keys()) > 1 or len({"B", "embedding_B"} & there.keys()) > 1:
            names = ", ".join(f"'{key}'" for key in there.values())
            what = f"without lora_{' and lora_'.join(lacking)}" if lacking else "of a linear layer and of an embedding at once"
            faults.append(f"{path}: '{module}' has {names} {what}. Fetch the adapter again.")
            continue
        update = Update(
            module, depth, there[sides[0]], there[sides[1]], "embedding_A" in there, there.get("bias"), there.get("magnitude")
        )  # fmt: skip
        found[update.name] = update
    if faults:
        raise CheckpointError("\n".join(faults))
    return found


def _replaced(keys: Sequence[Key], path: Path) -> dict[str, str]:
    found: dict[str, str] = {}
    for key in keys:
        if key.kind in ("base", "saved"):
            if key.tensor in found:
                raise CheckpointError(f"{path}: tensors '{found[key.tensor]}' and '{key.key}' both replace '{key.tensor}'. Remove one.")
            found[key.tensor] = key.key
    return found
