"""Experts of one family beside their merge: which of them belong together, how each is kept, and what that costs and loses."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from modelglue.adapters import extract_lora
from modelglue.checkpoint import Checkpoint, DiskCheckpoint, json_bytes, open_checkpoint, save, write_bytes_atomic
from modelglue.checkpoint.adapted import AdaptedCheckpoint
from modelglue.checkpoint.formats.side_files import TEXT_FILES
from modelglue.checkpoint.protocol import file_bytes
from modelglue.checkpoint.tensor_names import role_of
from modelglue.errors import UserError
from modelglue.mixture.deltas.loss import Loss, losses
from modelglue.mixture.deltas.sparse_writer import write_sparse
from modelglue.mixture.deltas.spec import DeltaStore
from modelglue.recipe import build_with_warnings
from modelglue.recipe.build import linear_recipe

REPORT = "deltas.json"
#: settings that say nothing about what a model computes
_BESIDE = ("_name_or_path", "transformers_version", "torch_dtype", "dtype", "architectures")


@dataclass(frozen=True)
class Kept:
    """One expert as it lies in the folder."""

    name: str
    reference: str
    """Seen from the mixture's folder."""
    bytes: int
    """Of its weights; the base that it shares with others is not counted."""
    whole_bytes: int
    """Of its weights as they came."""
    loss: Mapping[str, Loss]
    """By role; empty for an expert that is kept whole."""
    why_whole: str | None = None


@dataclass(frozen=True)
class Stored:
    """What `store_experts` did."""

    experts: tuple[Kept, ...]
    base_bytes: int

    @property
    def bytes(self) -> int:
        return self.base_bytes + sum(one.bytes for one in self.experts)

    @property
    def whole_bytes(self) -> int:
        return sum(one.whole_bytes for one in self.experts)


def families(experts: Mapping[str, Checkpoint]) -> list[list[str]]:
    """Names of experts that one base can serve: equal classes, settings, tensors and shapes, in order of their first."""
    groups: dict[str, list[str]] = {}
    for name, checkpoint in experts.items():
        shapes = [(tensor, checkpoint.info(tensor).shape, checkpoint.info(tensor).dtype) for tensor in checkpoint.names()]
        settings = {key: value for key, value in checkpoint.config.items() if key not in _BESIDE}
        groups.setdefault(json.dumps([shapes, settings], sort_keys=True, default=str), []).append(name)
    return list(groups.values())


def store_experts(folder: Path, experts: Mapping[str, Checkpoint], store: DeltaStore, *, key: str) -> Stored:
    """Write the experts into `folder`: of each family their uniform average (`families/N`) and every expert as a difference to it
    (`experts/NAME`); an expert that is alone in its family whole. `deltas.json` says what each takes and loses.

    What a killed call has finished is kept, if `key` is the same. Time: a decomposition or a sort of every matrix, and one more reading
    to measure the loss. Raises UserError where none of the experts is of one family, MergeError for weights that are not finite.
    """
    groups = families(experts)
    if all(len(group) == 1 for group in groups):
        raise UserError(
            "store: no two experts are of one family (equal class, settings and shapes), so there is no merge that they could differ from. "
            "Leave store out; pack: true copies them."
        )
    kept: dict[str, Kept] = {}
    base_bytes = 0
    for number, group in enumerate(groups, start=1):
        if len(group) == 1:
            kept[group[0]] = _whole(folder, group[0], experts[group[0]])
            continue
        place = f"families/{number}"
        base = _base(folder / place, [experts[name] for name in group]).called(place)
        base_bytes += _bytes(base)
        for name in group:
            _write_delta(folder / "experts" / name, _named(experts[name], name), base, store, key)
            reference = f"{place}+experts/{name}"
            found = open_checkpoint(reference, relative_to=folder)
            loss = losses(experts[name], found, base, role_of)
            size = sum(path.stat().st_size for path in (folder / "experts" / name).glob("*.safetensors"))
            kept[name] = Kept(name, reference, size, _bytes(experts[name]), loss)
    stored = Stored(tuple(kept[name] for name in experts), base_bytes)
    (folder / REPORT).write_bytes(json_bytes(_report(stored, store)))
    return stored


def _base(folder: Path, members: Sequence[Checkpoint]) -> DiskCheckpoint:
    """The uniform average of a family, written once."""
    if not folder.is_dir():
        opened = {str(one.describe()["model"]): one for one in members}
        recipe = linear_recipe(list(opened), [1.0] * len(opened))
        folder.parent.mkdir(exist_ok=True)
        save(build_with_warnings(recipe, opened.__getitem__).checkpoint, folder)
    found = open_checkpoint(folder)
    assert isinstance(found, DiskCheckpoint)
    return found


def _whole(folder: Path, name: str, expert: Checkpoint) -> Kept:
    reference = f"experts/{name}"
    if not (folder / reference).is_dir():
        (folder / reference).parent.mkdir(exist_ok=True)
        save(expert, folder / reference)
    return Kept(name, reference, _bytes(expert), _bytes(expert), {}, "no other expert is of its family")


def _write_delta(folder: Path, expert: Checkpoint, base: Checkpoint, store: DeltaStore, key: str) -> None:
    folder.parent.mkdir(exist_ok=True)
    if store.form == "sparse":
        if not folder.is_dir():
            write_sparse(expert, base, folder, 0.1 if store.density is None else store.density, key=key)
        return
    if not folder.is_dir():
        energy = 0.99 if store.energy is None and store.rank is None else store.energy
        extract_lora(expert, base, folder, max_rank=store.rank, energy=energy, dtype=_dtype(expert), base_name="base")
    for name, file in expert.files.items():
        if name in TEXT_FILES:
            write_bytes_atomic(folder / name, file_bytes(file))


def _named(expert: Checkpoint, name: str) -> Checkpoint:
    """Called as the mixture calls it: what is written must not depend on where things lie."""
    return expert.called(name) if isinstance(expert, DiskCheckpoint | AdaptedCheckpoint) else expert


def _dtype(expert: Checkpoint) -> str:
    """Factors are stored as the weights are; float32 for what is neither of the short formats."""
    kinds = {expert.info(name).dtype for name in expert.names() if len(expert.info(name).shape) == 2}
    return {"BF16": "bfloat16", "F16": "float16"}.get(kinds.pop(), "float32") if len(kinds) == 1 else "float32"


def _bytes(checkpoint: Checkpoint) -> int:
    return sum(checkpoint.info(name).nbytes for name in checkpoint.names())


def _report(stored: Stored, store: DeltaStore) -> dict[str, Any]:
    return {
        "store": store.model_dump(mode="json", exclude_none=True),
        "bytes": stored.bytes,
        "whole_bytes": stored.whole_bytes,
        "base_bytes": stored.base_bytes,
        "experts": [
            {
                "name": one.name, "reference": one.reference, "bytes": one.bytes, "whole_bytes": one.whole_bytes,
                "why_whole": one.why_whole, "loss": {role: asdict(loss) for role, loss in one.loss.items()},
            }
            for one in stored.experts
        ],
    }  # fmt: skip
