"""The record of an output: SHA-256 of every tensor's bytes and of the recipe, made while the output is written."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

from modelglue.checkpoint.output.staging import json_bytes
from modelglue.checkpoint.protocol import Checkpoint

RECORD_FILE = "modelglue_record.json"
RECORD_FORMAT = "modelglue-record/1"


def record(checkpoint: Checkpoint, recipe: bytes, digests: Mapping[str, str]) -> bytes:
    """The bytes of `modelglue_record.json`: a function of what was written, so equal outputs have equal records."""
    tensors: dict[str, Any] = {}
    for name in checkpoint.names():
        info = checkpoint.info(name)
        tensors[name] = {"dtype": info.dtype, "shape": list(info.shape), "sha256": digests[name]}
    return json_bytes({"format": RECORD_FORMAT, "recipe": hashlib.sha256(recipe).hexdigest(), "tensors": tensors})
