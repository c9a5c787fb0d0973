"""The tokenizer that came with a checkpoint."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from modelglue.checkpoint import Checkpoint, file_bytes, json_bytes
from modelglue.errors import CheckpointError
from modelglue.models.mixture_code import MODEL_TYPE, backbone_type

#: a tokenizer has at least one of these
_VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json", "spiece.model")


def load_tokenizer(checkpoint: Checkpoint) -> Any:
    """The transformers tokenizer made of the checkpoint's files. Never runs code from them, never asks the network.

    Raises CheckpointError when there is none, or when it is damaged.
    """
    from transformers import AutoTokenizer

    files = checkpoint.files
    folders = {None if isinstance(file, bytes) else file.parent for file in files.values()}
    home = folders.pop() if len(folders) == 1 else None
    config = dict(checkpoint.config)
    if config.get("model_type") == MODEL_TYPE:  # a type that transformers does not know makes it ask for code
        config = {key: value for key, value in config.items() if key != "auto_map"} | {"model_type": backbone_type(config)}
        home = None
    if home is not None and (home / "config.json").is_file():
        return _load(AutoTokenizer, home, checkpoint)
    with tempfile.TemporaryDirectory() as name:
        for file, source in files.items():
            (Path(name) / Path(file).name).write_bytes(file_bytes(source))
        (Path(name) / "config.json").write_bytes(json_bytes(config))
        return _load(AutoTokenizer, Path(name), checkpoint)


def has_tokenizer(checkpoint: Checkpoint) -> bool:
    """Whether a tokenizer came with the checkpoint; says nothing about whether it is a sound one."""
    return any(name in checkpoint.files for name in _VOCABULARIES)


def _load(auto: Any, folder: Path, checkpoint: Checkpoint) -> Any:
    if not has_tokenizer(checkpoint):
        raise CheckpointError(
            f"{checkpoint!r}: has no tokenizer (tokenizer.json or tokenizer.model), so it can read no text. "
            "Put the tokenizer's files into its folder."
        )
    try:
        return auto.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # foreign files go through foreign code, whose errors are of the plainest kind
        raise CheckpointError(f"{checkpoint!r}: its tokenizer cannot be loaded: {error}. Restore the tokenizer's files.") from error
