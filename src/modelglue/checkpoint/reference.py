"""Model references: `PATH[@REVISION][+ADAPTER[@REVISION]]...`, each half a local path or `org/name` on the hub."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

from modelglue.checkpoint.formats import hub
from modelglue.checkpoint.formats.folder import hub_id_of
from modelglue.checkpoint.formats.opening import open_folder
from modelglue.checkpoint.protocol import Checkpoint
from modelglue.errors import CheckpointError, UserError, did_you_mean

#: keys of recipes under which a reference stands as text
REFERENCE_KEYS = ("model", "base", "base_model", "source_model", "shared", "merged", "encoder")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(@[\w./-]+)?")


def open_checkpoint(reference: str | Path, *, relative_to: Path | None = None, headers_only: bool = False) -> Checkpoint:
    """Open the model that `reference` means. Reads headers only; raises CheckpointError or UserError.

    An existing path is taken literally; otherwise `base+adapter` (or several adapters, applied in order) means the adapters folded into
    the base, tensor by tensor, when they are read. The reference is kept as it was written, so that recipes made from the
    checkpoint read as the user wrote them. `headers_only` does not download the weights of a model of the hub that is not in the cache
    yet: names, shapes and dtypes are there, reading a tensor is an error.
    """
    text = str(reference)
    base, *adapters = split_reference(text, relative_to)
    if not adapters:
        return _open_half(base, text, relative_to, headers_only)
    opened: Checkpoint | None = None
    folders: list[Path] = []
    faults: list[str] = []
    try:
        opened = _open_half(base, base, relative_to, headers_only)
    except UserError as error:
        faults.append(str(error))
    for adapter in adapters:
        try:
            folders.append(resolve_adapter(adapter, relative_to))
        except UserError as error:
            faults.append(str(error))
    if opened is None or faults:
        raise CheckpointError("\n".join(faults))
    from modelglue.checkpoint.adapted import open_adapted
    from modelglue.checkpoint.sparse import is_sparse_delta, open_sparse

    if is_sparse_delta(folders[0]):
        if len(folders) > 1:
            raise CheckpointError(f"'{text}': {folders[0]} is a sparse difference, which stands alone on its base. Give BASE+{folders[0]}.")
        return open_sparse(opened, folders[0], text)
    return open_adapted(opened, folders, text)


def resolve(reference: str, relative_to: Path | None = None) -> Path:
    """The local folder or file that `reference`, which names no adapter, means.

    An existing path is taken literally, relative ones from `relative_to` (default: the working folder). What looks like
    `org/name[@revision]` and is no path is looked up on the hub, or in its cache. Everything else is an error: a mistyped path is
    never taken for a hub id.
    """
    return _local(reference, relative_to) or hub.model_folder(_hub_reference(reference, relative_to))


def resolve_adapter(reference: str, relative_to: Path | None = None) -> Path:
    """The folder of the adapter that `reference` means: a local path, or a hub id as for models."""
    return _local(reference, relative_to) or hub.adapter_folder(_hub_reference(reference, relative_to))


def split_reference(reference: str, relative_to: Path | None = None) -> list[str]:
    """The base and its adapters. Folders may have a plus sign in their names: the longest part that exists is one half."""
    parts = reference.split("+")
    halves: list[str] = []
    while parts:
        count = next((n for n in range(len(parts), 1, -1) if _local("+".join(parts[:n]), relative_to) is not None), 1)
        halves.append("+".join(parts[:count]))
        parts = parts[count:]
    if "" in halves:
        raise UserError(
            f"'{reference}': no such file or folder, and one half of it is empty. "
            "An adapter is given as BASE+ADAPTER, several as BASE+FIRST+SECOND."
        )
    return halves


def reference_from(reference: str, places: Sequence[Path], folder: Path) -> str:
    """How a file in `folder` calls the model that was opened as `reference` and lies at `places` (its base, then its adapters).

    Hub ids and absolute paths stay as they were written, relative paths are made relative to `folder`.
    """
    halves = reference.split("+") if len(places) > 1 else [reference]
    if len(halves) != len(places):  # a folder's name holds a plus sign
        halves = [os.path.relpath(place) for place in places]
    return "+".join(_half_from(half, place, folder) for half, place in zip(halves, places, strict=True))


def moved_reference(reference: str, old: Path, new: Path) -> str:
    """How a file in `new` calls what a file in `old` calls `reference`: paths that exist are seen from there, hub ids stay."""
    halves = split_reference(reference, old)
    return "+".join(half if (path := _local(half, old)) is None else seen_from(new, path) for half in halves)


def seen_from(folder: Path, path: Path) -> str:
    """What a file in `folder` calls a path that exists: relative, links resolved, so that both may be moved; others as they are."""
    return os.path.relpath(os.path.realpath(path), os.path.realpath(folder)) if path.exists() else str(path)


def _half_from(half: str, place: Path, folder: Path) -> str:
    from_hub = hub_id_of(place) is not None and hub_id_of(place) == half.partition("@")[0]
    if from_hub or Path(half).expanduser().is_absolute():
        return half
    return seen_from(folder, place)


def _open_half(half: str, reference: str, relative_to: Path | None, headers_only: bool) -> Checkpoint:
    if (path := _local(half, relative_to)) is not None:
        return open_folder(path, reference)
    hub_reference = _hub_reference(half, relative_to)
    if headers_only:
        try:
            return open_folder(hub.cached_folder(hub_reference), reference)
        except CheckpointError:
            if (opened := hub.open_headers(hub_reference)) is not None:
                return opened
    return open_folder(hub.model_folder(hub_reference), reference)


def _local(half: str, relative_to: Path | None) -> Path | None:
    """The path that exists, or None."""
    path = _path(half, relative_to)
    try:
        return path if half and path.exists() else None
    except (OSError, ValueError):  # too long, or no path at all
        return None


def _path(half: str, relative_to: Path | None) -> Path:
    literal = Path(half).expanduser()
    return literal if literal.is_absolute() else (relative_to or Path()) / literal


def _hub_reference(half: str, relative_to: Path | None) -> str:
    """`half`, if it can be an id of the hub; CheckpointError for a path that does not exist."""
    path = _path(half, relative_to)
    name, _, revision = half.partition("@")
    if revision and _local(name, relative_to) is not None:
        raise CheckpointError(f"'{half}': '{name}' is a local path, which has no revisions. Leave out '@{revision}'.")
    if "@" in revision:
        raise CheckpointError(f"'{half}': no such file or folder. A hub id has one revision: org/name@revision.")
    if not _HUB_ID.fullmatch(half) or half.startswith((".", "/", "~")) or path.parent.is_dir():
        raise _missing(half, path)
    return half


def _missing(reference: str, path: Path) -> CheckpointError:
    parent = path.parent
    near = did_you_mean(path.name, [entry.name for entry in parent.iterdir()]) if parent.is_dir() else ""
    where = "" if str(path) == reference else f" (looked at {path})"
    return CheckpointError(
        f"'{reference}': no such file or folder{where}.{near} Allowed is a local model folder, a file of weights "
        "(.safetensors, .bin, .pt), or a hub id org/name[@revision]."
    )
