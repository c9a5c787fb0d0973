"""What a model is, whatever it is called: SHA-256 over the bytes of every tensor, its config and its tokenizer."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from modelglue.checkpoint.formats.side_files import TEXT_FILES
from modelglue.checkpoint.protocol import file_bytes
from modelglue.settings import cache_dir

if TYPE_CHECKING:
    from modelglue.checkpoint.protocol import Checkpoint

#: raise it when equal contents get another identity: what was remembered before is then forgotten
_VERSION = 3
#: elements hashed at a time
_STEP = 2**22


def content_identity(checkpoint: Checkpoint, stamp: str | None) -> str:
    """SHA-256 (hex) over the sorted (name, dtype, shape, SHA-256 of the tensor's bytes), the config, and the files of
    tokenizer and generation.

    Time: one read of every byte, once: the result is remembered under `stamp`, which changes with path, size, mtime or inode
    of any file. Memory: one step of 4 Mi elements. Fine-tunes may differ in the middle of a file, so no part is skipped.
    """
    if stamp is not None and (known := _recall(stamp)) is not None:
        return known
    identity = _identity(checkpoint, lambda name: tensor_digest(checkpoint, name))
    if stamp is not None:
        _remember(stamp, identity)
    return identity


def remember_identity(checkpoint: Checkpoint, digests: Mapping[str, str]) -> None:
    """Remember the identity of a folder that was just written, of whose tensors the SHA-256 is known: nothing is read again.

    Remembered under the files' path, size, mtime and inode like every other identity, so a later change of a file forgets it.
    """
    _remember(checkpoint.stamp, _identity(checkpoint, digests.__getitem__))


def _identity(checkpoint: Checkpoint, digest_of: Callable[[str], str]) -> str:
    digest = hashlib.sha256()
    for name in sorted(checkpoint.names()):
        info = checkpoint.info(name)
        digest.update(json.dumps([name, info.dtype, list(info.shape), digest_of(name)]).encode())
    digest.update(json.dumps(checkpoint.config, sort_keys=True).encode())
    for name in TEXT_FILES:
        if name in checkpoint.files:
            digest.update(name.encode() + hashlib.sha256(file_bytes(checkpoint.files[name])).digest())
    return digest.hexdigest()


def tensor_digest(checkpoint: Checkpoint, name: str) -> str:
    """SHA-256 (hex) of the bytes of one tensor, read in steps."""
    import torch

    digest = hashlib.sha256()
    numel = checkpoint.info(name).numel
    for start in range(0, numel, _STEP):
        digest.update(checkpoint.read(name, start, min(start + _STEP, numel)).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _folder() -> Path:
    return cache_dir() / "identities" / str(_VERSION)


def _recall(stamp: str) -> str | None:
    try:
        text = (_folder() / stamp).read_text(encoding="ascii")
    except (OSError, UnicodeDecodeError):
        return None
    return text if len(text) == 64 else None


def _remember(stamp: str, identity: str) -> None:
    """A cache that cannot be written only costs the next run a read."""
    folder = _folder()
    with contextlib.suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        temporary = folder / f".{stamp}.{os.getpid()}"
        temporary.write_text(identity, encoding="ascii")
        temporary.replace(folder / stamp)
