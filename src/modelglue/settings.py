"""Floor 0: what the environment may change. Every variable starts with MODELGLUE_."""

from __future__ import annotations

import os
from pathlib import Path

from modelglue.errors import UserError

#: Elements of one chunk of a merge. Inputs, temporaries and output of a chunk should fit a core's cache; measured on
#: two machines, 2^17 to 2^19 differ by under 5 %, smaller pays for Python, larger for memory traffic.
CHUNK_ELEMENTS = 2**18

#: Sums over a tensor are taken in blocks of this many elements, in index order, whatever the chunk.
BLOCK_ELEMENTS = 65_536

#: Outputs smaller than this are merged in the calling process: starting workers would cost more.
SMALL_OUTPUT_BYTES = 64_000_000


def cache_dir() -> Path:
    """Folder of remembered hashes and compiled functions: MODELGLUE_CACHE, else ~/.cache/modelglue."""
    return Path(os.environ.get("MODELGLUE_CACHE") or Path.home() / ".cache" / "modelglue")


def default_workers() -> int:
    """Worker processes: MODELGLUE_WORKERS, else the cores that this process may use."""
    text = os.environ.get("MODELGLUE_WORKERS")
    if text is None:
        return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)
    if not text.isdigit() or int(text) < 1:
        raise UserError(f"MODELGLUE_WORKERS is '{text}'; allowed is a whole number from 1. Unset it for all cores.")
    return int(text)
