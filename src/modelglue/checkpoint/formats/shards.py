"""Which files of a folder make one model: one file, shards with an index, shards without; no index may lead out of its folder."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from modelglue.checkpoint.formats.confined import leads_out
from modelglue.checkpoint.formats.header import MAX_HEADER_BYTES, is_text, parse_object, shown
from modelglue.errors import CheckpointError

_LONGEST_NAME = 255
_NUMBERED = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<total>\d{5})(?P<rest>(\.\w+)+)")


@dataclass(frozen=True)
class WeightFormat:
    """How the files of one format are called."""

    suffixes: tuple[str, ...]
    #: names of the file of a whole model, and of the list of its shards, the usual ones first
    singles: tuple[str, ...]
    indexes: tuple[str, ...]
    #: beginnings of files of the same suffix that are not a model's weights
    others: tuple[str, ...]

    def files_in(self, folder: Path) -> list[Path]:
        """The weight files of a folder, by name. CheckpointError where there is no folder to look into."""
        try:
            paths = sorted(folder.iterdir())
        except OSError as error:
            raise CheckpointError(f"{folder}: cannot be read ({error.strerror}). Give the folder of a model.") from error
        return [path for path in paths if path.suffix in self.suffixes and not path.name.startswith(self.others) and path.is_file()]

    def index_of(self, folder: Path) -> Path | None:
        return next((folder / name for name in self.indexes if (folder / name).is_file()), None)


SAFETENSORS = WeightFormat(
    (".safetensors",),
    ("model.safetensors", "diffusion_pytorch_model.safetensors"),
    ("model.safetensors.index.json", "diffusion_pytorch_model.safetensors.index.json"),
    ("adapter_",),
)
PICKLED = WeightFormat(
    (".bin", ".pt", ".pth"),
    ("pytorch_model.bin", "diffusion_pytorch_model.bin"),
    ("pytorch_model.bin.index.json", "diffusion_pytorch_model.bin.index.json"),
    ("adapter_", "training_args", "optimizer", "scheduler", "scaler", "rng_state", "random_states"),
)


def find_shards(path: Path, form: WeightFormat) -> list[Path]:
    """The files that make the model at `path` (a folder, or one file), in order. Raises CheckpointError for what is not one model."""
    if path.is_file():
        return [path]
    if (index := form.index_of(path)) is not None:
        names = sorted(set(weight_map(index).values()))
        for single in form.singles:
            if single not in names and (path / single).is_file():
                raise CheckpointError(f"{path}: holds {single} and an index of other shards: two models. Remove one of them.")
        shards = [_inside(path, name, index, form) for name in names]
        if fault := _gap(names):
            raise CheckpointError(f"{index}: does not list tensors of every shard: {fault}. Fetch the model again.")
        return shards
    found = form.files_in(path)
    for single in form.singles:
        if path / single in found:
            return [path / single]
    if not found:
        raise CheckpointError(f"{path}: holds no {' or '.join(form.suffixes)} file. Give the folder of a model.")
    if len(found) == 1 and _NUMBERED.fullmatch(found[0].name) is None:
        return found
    names = [file.name for file in found]
    fault = _gap(names)
    if fault is None:
        listed = ", ".join(names[:12]) + (", ..." if len(names) > 12 else "")
        raise CheckpointError(
            f"{path}: holds several {' or '.join(form.suffixes)} files and no index: {listed}. "
            f"Give one of the files, keep one model per folder, or add {form.indexes[0]}."
        )
    if fault:
        raise CheckpointError(f"{path}: {fault}. Fetch the model again.")
    return found


def check_index(path: Path, form: WeightFormat, found: Mapping[str, str]) -> None:
    """The index, if there is one, must say of every tensor what `found` (tensor -> file name) says."""
    index = form.index_of(path) if path.is_dir() else None
    if index is None:
        return
    claimed = weight_map(index)
    for name, file in claimed.items():
        if found.get(name) != file:
            place = f"stands in {found[name]}" if name in found else "stands in no shard"
            raise CheckpointError(f"{index}: tensor {shown(name)} should stand in {file}, but {place}. Fetch the model again.")
    for name, file in found.items():
        if name not in claimed:
            raise CheckpointError(f"{index}: does not list tensor {shown(name)} of {file}. Fetch the model again.")


def weight_map(index: Path) -> dict[str, str]:
    """Tensor -> file name, as the index claims it."""
    remedy = "Fetch the model again."
    claimed = read_object(index, remedy).get("weight_map")
    if not isinstance(claimed, dict) or not claimed:
        raise CheckpointError(f"{index}: has no weight_map, or an empty or malformed one. {remedy}")
    for name, file in claimed.items():
        if not isinstance(file, str):
            raise CheckpointError(f"{index}: tensor {shown(name)} points to {shown(file)}, allowed is a file name. {remedy}")
    return claimed


def read_object(path: Path, remedy: str, *, unique: bool = True) -> dict[str, Any]:
    """The JSON object in a file of a stranger; CheckpointError ends with `remedy`."""
    try:
        size = path.stat().st_size
        if size > MAX_HEADER_BYTES:
            raise CheckpointError(f"{path}: is {size:,} bytes long, allowed are {MAX_HEADER_BYTES:,}. {remedy}")
        return parse_object(path.read_bytes(), unique=unique)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror}). Check its permissions.") from error
    except ValueError as error:
        raise CheckpointError(f"{path}: is not valid: {error}. {remedy}") from error


def _gap(names: Sequence[str]) -> str | None:
    """What is wrong with numbered shards, "" if nothing is; None if these are not the numbered shards of one model."""
    numbered = [_NUMBERED.fullmatch(name) for name in names]
    sets = {(match["stem"], match["total"], match["rest"]) for match in numbered if match}
    if any(match is None for match in numbered) or len(sets) != 1:
        return None
    total = max(int(match["total"]) for match in numbered if match)
    present = {int(match["number"]) for match in numbered if match}
    missing = sorted(set(range(1, total + 1)) - present)
    if missing:
        few = ", ".join(map(str, missing[:8])) + (", ..." if len(missing) > 8 else "")
        return f"shard {few} of {total} is missing"
    return f"shard {max(present)} of {total} is one too many" if max(present) > total else ""


def _inside(folder: Path, name: str, index: Path, form: WeightFormat) -> Path:
    """The shard `name` of `folder`; no index may lead out of its folder (the hub cache's links to its blobs may)."""
    plain = PurePosixPath(name).name == name and "\\" not in name and "\0" not in name and is_text(name)
    if not plain or not name.endswith(form.suffixes) or len(name.encode()) > _LONGEST_NAME:
        allowed = " or ".join(form.suffixes)
        raise CheckpointError(f"{index}: names the shard {shown(name)}, which is not a {allowed} file of this folder.")
    path = folder / name
    if not path.is_file():
        raise CheckpointError(f"{index}: names the shard '{name}', which does not exist. Fetch the model again.")
    if (elsewhere := leads_out(folder, path)) is not None:
        raise CheckpointError(f"{index}: the shard '{name}' is a link that leaves the folder, to {elsewhere}.")
    return path
