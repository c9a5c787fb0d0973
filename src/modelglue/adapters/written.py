"""Adapters on their way to the disk: the folder that PEFT loads, written at once or not at all."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modelglue import __version__
from modelglue.checkpoint import TensorsCheckpoint, json_bytes, staged, write_tensor_file
from modelglue.checkpoint.adapter import CONFIG_FILE, WEIGHTS_FILE

if TYPE_CHECKING:
    import torch


def adapter_config(
    *,
    ranks: Mapping[str, int],
    scale_one: int,
    base: str | None,
    task_type: str | None,
    fan_in_fan_out: bool = False,
    lora_bias: bool = False,
    bias: str = "none",
    modules_to_save: Sequence[str] = (),
    trainable_token_indices: Mapping[str, Sequence[int]] | None = None,
    tied: bool = False,
) -> dict[str, Any]:
    """A config of PEFT's in which every update has scale 1: alpha is the rank, also where a module has another rank than `scale_one`."""
    other = {module: rank for module, rank in sorted(ranks.items()) if rank != scale_one}
    return {
        "peft_type": "LORA", "task_type": task_type, "base_model_name_or_path": base, "inference_mode": True,
        "r": scale_one, "lora_alpha": scale_one, "rank_pattern": other, "alpha_pattern": dict(other),
        "target_modules": sorted(ranks), "modules_to_save": sorted(modules_to_save) or None, "lora_dropout": 0.0, "bias": bias,
        "fan_in_fan_out": fan_in_fan_out, "use_rslora": False, "use_dora": False, "lora_bias": lora_bias, "init_lora_weights": True,
        "ensure_weight_tying": tied,
        "trainable_token_indices": {key: list(rows) for key, rows in trainable_token_indices.items()} if trainable_token_indices else None,
    }  # fmt: skip


def write_adapter(
    directory: Path,
    tensors: Mapping[str, torch.Tensor],
    config: Mapping[str, Any],
    *,
    key: str,
    made_from: Sequence[str],
    overwrite: bool = False,
) -> int:
    """Write an adapter folder: weights, config, card. Equal contents give equal bytes. Returns the bytes of the weights.

    UserError for a folder that exists and may not be replaced, RunError for a full disk; neither leaves anything behind.
    """
    with staged(directory, key=key, overwrite=overwrite) as folder:
        return fill_folder(folder, tensors, config, made_from)


def fill_folder(folder: Path, tensors: Mapping[str, torch.Tensor], config: Mapping[str, Any], made_from: Sequence[str]) -> int:
    """The files of an adapter in `folder`; the config, without which it is no adapter, is the last. Memory: a step of the tensors."""
    size = write_tensor_file(TensorsCheckpoint(tensors), folder / WEIGHTS_FILE)
    (folder / "README.md").write_text(_card(config, made_from), encoding="utf-8")
    (folder / CONFIG_FILE).write_bytes(json_bytes(dict(config)))
    return size


def _card(config: Mapping[str, Any], made_from: Sequence[str]) -> str:
    base = config["base_model_name_or_path"]
    front = ["library_name: peft", "tags: [lora, modelglue]", *([f"base_model: {json.dumps(base)}"] if base else [])]
    rows = "\n".join(f"| `{name}` |" for name in made_from)
    return (
        "---\n" + "\n".join(front) + "\n---\n\n# LoRA adapter\n\n"
        f"Made with modelglue {__version__} from:\n\n| source |\n|---|\n{rows}\n\n"
        "To load it on its base:\n\n```python\nfrom peft import PeftModel\n\n"
        'model = PeftModel.from_pretrained(base_model, "path/to/this/folder")\n```\n'
    )
