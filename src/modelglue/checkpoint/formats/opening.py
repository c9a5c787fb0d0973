"""One path on disk becomes a checkpoint, whatever format its weights are in; what is no model is called what it is."""

from __future__ import annotations

from pathlib import Path

from modelglue.checkpoint.formats.folder import DiskCheckpoint, SafetensorsCheckpoint
from modelglue.checkpoint.formats.pickled import PickledCheckpoint
from modelglue.checkpoint.formats.shards import PICKLED, SAFETENSORS
from modelglue.errors import CheckpointError

#: a training checkpoint by its own name, which is a pickled file like the others
_LIGHTNING = ".ckpt"
#: what other tools keep weights in, by suffix
_FOREIGN = {
    ".gguf": "is in GGUF, the quantised format of llama.cpp. Merge the original safetensors release and convert the result to GGUF.",
    ".h5": "is in TensorFlow's format. Take the safetensors release, or convert it with transformers.",
    ".msgpack": "is in Flax's format. Take the safetensors release, or convert it with transformers.",
    ".onnx": "is an ONNX graph. Take the safetensors release that it was exported from.",
}


def open_folder(path: Path, reference: str | None = None) -> DiskCheckpoint:
    """The model at `path`, a folder or a file of weights, in whichever format it is; safetensors where there are both.

    Reads headers only. Raises CheckpointError for what is no model, naming what it is where that can be told.
    """
    if path.is_file():
        return _open_file(path, reference)
    if SAFETENSORS.index_of(path) is not None or SAFETENSORS.files_in(path):
        return SafetensorsCheckpoint(path, reference)
    if PICKLED.index_of(path) is not None or PICKLED.files_in(path):
        return PickledCheckpoint(path, reference)
    raise _no_weights(path)


def _open_file(path: Path, reference: str | None) -> DiskCheckpoint:
    if path.suffix in SAFETENSORS.suffixes:
        return SafetensorsCheckpoint(path, reference)
    if path.suffix in (*PICKLED.suffixes, _LIGHTNING):
        return PickledCheckpoint(path, reference)
    what = _FOREIGN.get(path.suffix, "is no file of weights that is known.")
    raise CheckpointError(f"{path}: {what} Allowed is a model folder, or a .safetensors, .bin, .pt, .pth or .ckpt file.")


def _no_weights(path: Path) -> CheckpointError:
    if (path / "model_index.json").is_file():
        forms = (SAFETENSORS, PICKLED)
        parts = [part for part in sorted(path.iterdir()) if part.is_dir() and any(form.files_in(part) for form in forms)]
        listed = ", ".join(f"'{part}'" for part in parts) or "none of them has weights here"
        return CheckpointError(f"{path}: is a diffusion pipeline of several models. Refer to one of its components: {listed}.")
    if (path / "adapter_config.json").is_file() or any(path.glob("adapter_model.*")):
        return CheckpointError(f"{path}: is an adapter, not a model. Refer to it together with its base: BASE+{path}.")
    foreign = [file for suffix in _FOREIGN for file in sorted(path.glob(f"*{suffix}"))]
    if foreign:
        return CheckpointError(f"{path}: holds {foreign[0].name}, which {_FOREIGN[foreign[0].suffix]}")
    return CheckpointError(f"{path}: holds no .safetensors file, and no .bin, .pt or .pth. Give the folder of a model.")
