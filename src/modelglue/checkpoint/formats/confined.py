"""No link of a model's folder leads out of it: what a stranger packed must not name files of the reader's own."""

from __future__ import annotations

from pathlib import Path

#: in the hub's cache a model is <repository>/snapshots/<revision>, and its files are links to <repository>/blobs
_SHARED_BLOBS = "blobs"


def leads_out(folder: Path, path: Path) -> Path | None:
    """Where `path`, a file of `folder`, really is if that is elsewhere; None if it is inside. The hub cache's links to its blobs may."""
    real, home = path.resolve(), folder.resolve()
    return None if real.is_relative_to(home) or real.parent in _blobs_of(home) else real


def _blobs_of(home: Path) -> list[Path]:
    """Where the hub's cache keeps the files of a snapshot: two folders up, or three for a component of a pipeline."""
    return [(parent.parent / _SHARED_BLOBS).resolve() for parent in home.parents[:2] if parent.name == "snapshots"]
