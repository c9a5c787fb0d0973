"""Which tensors does a merge have, and which models take part in each? Asked of headers, before a merge reads a weight."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from modelglue.checkpoint.protocol import FLOATING, Checkpoint, TensorInfo
from modelglue.errors import MergeError

#: a tensor that not all models have: refuse, merge those that have it, or leave it out of the output
Missing = Literal["error", "present", "drop"]
#: a tensor whose shapes differ: refuse, or leave out the models whose shape is not the base's (or the first model's)
ShapeMismatch = Literal["error", "skip"]
#: faults that one message shows
_SHOWN = 12


@dataclass(frozen=True)
class Fit:
    """What a merge of these inputs consists of.

    `infos`: shape and dtype of every output tensor as the input has it that the output takes after. `members`: positions of the models
    that take part, for the tensors in which not all do (none: only the base has it). `copied`: tensors that one input alone has,
    taken as they are.
    """

    infos: Mapping[str, TensorInfo]
    members: Mapping[str, tuple[int, ...]]
    copied: frozenset[str]
    warnings: tuple[str, ...]


def fit(
    method: str,
    donor: Checkpoint,
    models: Sequence[Checkpoint],
    base: Checkpoint | None,
    labels: Sequence[str],
    *,
    least: int = 1,
    missing: Missing = "error",
    shape_mismatch: ShapeMismatch = "error",
) -> Fit:
    """Compare the tensors of all inputs. MergeError names every difference that the settings do not allow.

    `donor`: whose shapes and dtypes count; it may be none of the inputs, and then only has to have the same tensors where `missing` is
    "error". `least`: models that the method needs for one tensor besides the base. Time: a look at every header entry, once.
    """
    return _Fitting(method, donor, models, base, labels, least, missing, shape_mismatch).result()


class _Fitting:
    def __init__(
        self,
        method: str,
        donor: Checkpoint,
        models: Sequence[Checkpoint],
        base: Checkpoint | None,
        labels: Sequence[str],
        least: int,
        missing: Missing,
        shape_mismatch: ShapeMismatch,
    ) -> None:
        self._method, self._models, self._base, self._labels = method, models, base, labels
        self._least, self._missing, self._shape_mismatch = least, missing, shape_mismatch
        outside = donor is not base and not any(donor is model for model in models)
        if outside and missing != "error":
            outside, donor = False, base or models[0]
        self._donor = donor
        self._base_label = label_of(base) if base is not None else ""
        self._donor_label = next((label for model, label in zip(models, labels, strict=True) if model is donor), "") or label_of(donor)
        #: everybody whose tensors count, the donor first
        self._all = [(self._donor_label, donor)] if outside else []
        self._all += list(zip(labels, models, strict=True)) + ([(self._base_label, base)] if base is not None else [])
        self._sets = {id(checkpoint): frozenset(checkpoint.names()) for _, checkpoint in self._all}
        self._infos: dict[str, TensorInfo] = {}
        self._members: dict[str, tuple[int, ...]] = {}
        self._copied: set[str] = set()
        self._faults: list[str] = []
        self._gaps = False
        self._warnings: list[str] = []

    def result(self) -> Fit:
        for name in sorted(frozenset().union(*self._sets.values())):
            self._place(name)
        if self._faults:
            shown = "\n  ".join(self._faults[:_SHOWN])
            shown += f"\n  ... and {len(self._faults) - _SHOWN} more" if len(self._faults) > _SHOWN else ""
            raise MergeError(f"{self._method}: the models do not have the same tensors:\n  {shown}\n{self._remedy()}")
        return Fit(self._infos, self._members, frozenset(self._copied), tuple(self._warnings))

    def _remedy(self) -> str:
        remedy = "Merge models of one architecture and vocabulary; leave the odd one out, or convert it first."
        if self._gaps and self._missing == "error":
            remedy += " 'missing: present' merges what each tensor has, 'missing: drop' leaves such tensors out."
        return remedy

    def _has(self, checkpoint: Checkpoint, name: str) -> bool:
        return name in self._sets[id(checkpoint)]

    def _place(self, name: str) -> None:
        have = [position for position, model in enumerate(self._models) if self._has(model, name)]
        if all(self._has(checkpoint, name) for _, checkpoint in self._all):
            first = self._donor
        else:
            self._gaps = True
            found = self._partial(name, have)
            if found is None:
                return
            first, have = found
        self._compare(name, first, have)

    def _partial(self, name: str, have: list[int]) -> tuple[Checkpoint, list[int]] | None:
        """Whose shape counts and who takes part, for a tensor that somebody lacks; None if it is left out."""
        holders = [label for label, checkpoint in self._all if self._has(checkpoint, name)]
        if self._missing == "error":
            if self._has(self._donor, name):
                lacking = [label for label, checkpoint in self._all if not self._has(checkpoint, name)]
                self._faults += [f"tensor '{name}' is missing in {label}" for label in dict.fromkeys(lacking)]
            else:
                self._faults += [f"tensor '{name}' is only in {label}, not in {self._donor_label}" for label in dict.fromkeys(holders)]
            return next(checkpoint for _, checkpoint in self._all if self._has(checkpoint, name)), have
        if self._missing == "drop":
            self._warnings.append(f"tensor '{name}' is only in {_some(holders)}; the output is without it.")
            return None
        in_base = self._base is not None and self._has(self._base, name)
        if self._base is not None and not in_base and len(have) > 1:
            self._faults.append(f"tensor '{name}' is missing in the base {self._base_label}, and {_some(holders)} have it")
            return None
        if (self._base is not None and not in_base) or len(have) < self._least:
            if in_base:
                have = []
            elif len(have) > 1:
                self._faults.append(f"tensor '{name}' is only in {_some(holders)}, and {self._method} takes {self._least} models")
                return None
            self._copied.add(name)
            self._warnings.append(f"tensor '{name}' is only in {_some(holders)}; it is copied from there.")
        else:
            self._warnings.append(f"tensor '{name}' is only in {_some(holders)}; the others take no part in it.")
        self._members[name] = tuple(have)
        if self._has(self._donor, name):
            return self._donor, have
        return (self._base, have) if in_base and self._base is not None else (self._models[have[0]], have)

    def _compare(self, name: str, first: Checkpoint, have: list[int]) -> None:
        """Hold every input that takes part to the shape and kind of the first."""
        info = first.info(name)
        kept = []
        for position in have:
            found = self._models[position].info(name)
            if found.shape != info.shape and self._shape_mismatch == "skip":
                self._warnings.append(
                    f"tensor '{name}' has shape {list(found.shape)} in {self._labels[position]} and {list(info.shape)} elsewhere; "
                    "that model takes no part in it."
                )
                continue
            kept.append(position)
            self._hold(name, info, self._labels[position], found)
        if self._base is not None and first is not self._base and self._has(self._base, name) and name not in self._copied:
            self._hold(name, info, self._base_label, self._base.info(name))
        self._infos[name] = info
        if len(kept) < len(have):
            self._members[name] = tuple(kept)
            if len(kept) < self._least:
                self._members[name] = () if self._base is not None else tuple(kept[:1])
                self._copied.add(name)

    def _hold(self, name: str, info: TensorInfo, label: str, found: TensorInfo) -> None:
        if found.shape != info.shape:
            self._faults.append(f"tensor '{name}' has shape {list(found.shape)} in {label} and {list(info.shape)} in {self._donor_label}")
        if found.dtype != info.dtype and not {found.dtype, info.dtype} <= FLOATING:
            self._faults.append(f"tensor '{name}' is {found.dtype} in {label} and {info.dtype} in {self._donor_label}")


def _some(labels: Sequence[str]) -> str:
    known = list(dict.fromkeys(labels))
    return ", ".join(known[:3]) + (f" and {len(known) - 3} more" if len(known) > 3 else "")


def widest(dtypes: Sequence[str]) -> str:
    """The dtype to which floating dtypes promote; any other dtype is its own."""
    kinds = set(dtypes)
    if not kinds <= FLOATING:
        return dtypes[0]
    return next(iter(kinds)) if len(kinds) == 1 else "F64" if "F64" in kinds else "F32"


def promoted(output: Checkpoint, donor: Checkpoint) -> str | None:
    """The one dtype that tensors got in place of the donor's narrower one; a loader that believed the donor's config would narrow them."""
    shared = set(output.names()) & set(donor.names())
    kinds = {output.info(name).dtype for name in shared if output.info(name).dtype != donor.info(name).dtype}
    return kinds.pop() if len(kinds) == 1 else None


def label_of(checkpoint: Checkpoint) -> str:
    """What an error calls this checkpoint: its reference, or the method of the merge."""
    description = checkpoint.describe()
    while isinstance(description.get("of"), dict):  # a renamed checkpoint is called what its source is called
        description = description["of"]
    model = description.get("model")
    return str(model) if isinstance(model, str) else f"the {description.get('method', 'nested')} merge"
