"""Model references: a local path, or `org/name[@revision]` in the hub's cache."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

from modelglue.checkpoint.folder import hub_id_of
from modelglue.checkpoint.opening import open_folder
from modelglue.checkpoint.protocol import Checkpoint
from modelglue.errors import CheckpointError, UserError, did_you_mean

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(@[\w./-]+)?")


def open_checkpoint(reference: str | Path, *, relative_to: Path | None = None) -> Checkpoint:
    """Open the model that `reference` means. Reads headers only; raises CheckpointError or UserError.

    The reference is kept as it was written, so that recipes made from the checkpoint read as the user wrote them.
    """
    return open_folder(resolve(str(reference), relative_to), str(reference))


def resolve(reference: str, relative_to: Path | None = None) -> Path:
    """The local folder or file that `reference` means.

    An existing path is taken literally, relative ones from `relative_to` (default: the working folder). What looks like
    `org/name[@revision]` and is no path is looked up in the hub's cache, over the network unless HF_HUB_OFFLINE is set. Everything
    else is an error: a mistyped path is never taken for a hub id.
    """
    literal = Path(reference).expanduser()
    path = literal if literal.is_absolute() else (relative_to or Path()) / literal
    if path.exists():
        return path
    if "+" in reference:
        base, _, adapter = reference.partition("+")
        if base and adapter:
            raise UserError(
                f"'{reference}': adapter references (base+adapter) are not supported yet. "
                "Fold the adapter into its base first and refer to the result."
            )
    if not _HUB_ID.fullmatch(reference) or reference.startswith((".", "/", "~")) or path.parent.is_dir():
        raise _missing(reference, path)
    return _from_hub(reference)


def _missing(reference: str, path: Path) -> CheckpointError:
    parent = path.parent
    near = did_you_mean(path.name, [entry.name for entry in parent.iterdir()]) if parent.is_dir() else ""
    where = "" if str(path) == reference else f" (looked at {path})"
    return CheckpointError(
        f"'{reference}': no such file or folder{where}.{near} Allowed is a local model folder, a .safetensors file, "
        "or a hub id org/name[@revision]."
    )


def _from_hub(reference: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    repository, _, revision = reference.partition("@")
    patterns = ["*.safetensors", "*.json", "*.model", "*.txt", "*.jinja", "LICENSE*"]
    try:
        return Path(snapshot_download(repository, revision=revision or None, allow_patterns=patterns))
    except HFValidationError as error:
        raise CheckpointError(f"'{reference}': is no local path, and no hub id either: {error}") from error
    except LocalEntryNotFoundError as error:
        raise CheckpointError(
            f"'{reference}': is no local path, and not in the hub's cache, and the hub cannot be reached. "
            "Download it first, or give the path of a local folder."
        ) from error
    except (HfHubHTTPError, OSError) as error:
        raise CheckpointError(f"'{reference}': the hub answered: {error}") from error


def reference_from(reference: str, places: Sequence[Path], folder: Path) -> str:
    """How a file in `folder` calls the model that was opened as `reference` and lies at `places` (its base, then its adapters).

    Hub ids and absolute paths stay as they were written, relative paths are made relative to `folder`.
    """
    halves = reference.split("+") if len(places) > 1 else [reference]
    if len(halves) != len(places):  # a folder's name holds a plus sign
        halves = [os.path.relpath(place) for place in places]
    return "+".join(_half_from(half, place, os.path.realpath(folder)) for half, place in zip(halves, places, strict=True))


def _half_from(half: str, place: Path, folder: str) -> str:
    from_hub = hub_id_of(place) is not None and hub_id_of(place) == half.partition("@")[0]
    if from_hub or Path(half).expanduser().is_absolute():
        return half
    return os.path.relpath(os.path.realpath(place), folder)
