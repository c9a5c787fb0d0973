"""The tokenizer that came with a checkpoint."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

from modelglue.checkpoint import Checkpoint, json_bytes
from modelglue.errors import CheckpointError


def load_tokenizer(checkpoint: Checkpoint) -> Any:
    """The transformers tokenizer made of the checkpoint's files. Never runs code from them, never asks the network.

    Raises CheckpointError when there is none.
    """
    from transformers import AutoTokenizer

    files = checkpoint.files
    folders = {path.parent for path in files.values()}
    if len(folders) == 1 and (next(iter(folders)) / "config.json").is_file():
        return _load(AutoTokenizer, next(iter(folders)), checkpoint)
    with tempfile.TemporaryDirectory() as name:
        for file, source in files.items():
            shutil.copyfile(source, Path(name) / Path(file).name)
        (Path(name) / "config.json").write_bytes(json_bytes(dict(checkpoint.config)))
        return _load(AutoTokenizer, Path(name), checkpoint)


def _load(auto: Any, folder: Path, checkpoint: Checkpoint) -> Any:
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json", "spiece.model")):
        raise CheckpointError(f"{checkpoint!r}: has no tokenizer (tokenizer.json or tokenizer.model); text cannot be scored with it.")
    try:
        return auto.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{checkpoint!r}: its tokenizer cannot be loaded: {error}") from error
