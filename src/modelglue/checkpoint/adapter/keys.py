"""The keys of an adapter file: which module a tensor belongs to, and what it is there."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from modelglue.checkpoint.adapter.config import AdapterConfig
from modelglue.checkpoint.formats.header import shown
from modelglue.errors import CheckpointError

Kind = Literal["A", "B", "bias", "embedding_A", "embedding_B", "magnitude", "tokens", "base", "saved"]

#: what PEFT puts before every name of the model
PREFIX = "base_model.model."
#: a module, then what the library's layers call their tensors; raw state dicts have the adapter's name inside
_TRAINED: tuple[tuple[Kind, re.Pattern[str]], ...] = (
    ("A", re.compile(r"(?P<module>.+)\.lora_A(\.(?P<adapter>[^.]+))?\.weight")),
    ("B", re.compile(r"(?P<module>.+)\.lora_B(\.(?P<adapter>[^.]+))?\.weight")),
    ("bias", re.compile(r"(?P<module>.+)\.lora_B(\.(?P<adapter>[^.]+))?\.bias")),
    ("embedding_A", re.compile(r"(?P<module>.+)\.lora_embedding_A(\.(?P<adapter>[^.]+))?")),
    ("embedding_B", re.compile(r"(?P<module>.+)\.lora_embedding_B(\.(?P<adapter>[^.]+))?")),
    ("magnitude", re.compile(r"(?P<module>.+)\.lora_magnitude_vector(\.(?!weight$)(?P<adapter>[^.]+))?(\.weight)?")),
    ("tokens", re.compile(r"(?P<module>.+)\.token_adapter\.trainable_tokens_delta(\.(?P<adapter>[^.]+))?")),
)
#: copies of what the base has already
_IGNORED = re.compile(r"(.+\.)?original_module\..+|.+\.trainable_tokens_original(\.[^.]+)?")
_BASE = re.compile(r"(?P<module>.+?)(?P<inside>(\.token_adapter|\.base_layer)+)\.(?P<parameter>[^.]+)")
_SAVED = re.compile(r"(?P<module>.+)\.modules_to_save\.(?P<adapter>[^.]+)\.(?P<parameter>.+)")
_OWN = ("lora_", "token_adapter", "trainable_tokens")
_SHOWN = 12


@dataclass(frozen=True)
class Key:
    """One tensor of the file: `module` as the adapter calls it, `depth` how many parameters of the module are wrapped inside it."""

    key: str
    kind: Kind
    module: str
    depth: int = 0
    #: name of the parameter that is replaced ("weight", "bias"), for the kinds base and saved
    parameter: str = ""

    @property
    def tensor(self) -> str:
        """The name of the replaced tensor, for the kinds base and saved."""
        return f"{self.module}.{self.parameter}" if self.module else self.parameter


def read_keys(keys: Iterable[str], config: AdapterConfig, path: Path) -> list[Key]:
    """Every key that says something; copies of the base are left out. CheckpointError lists what is not known, or two adapters' names."""
    found: list[Key] = []
    unknown: list[str] = []
    adapters: dict[str, None] = {}
    for key in keys:
        name = key.removeprefix(PREFIX)
        if _IGNORED.fullmatch(name):
            continue
        known, adapter = _read(key, name, config)
        if known is None:
            unknown.append(key)
            continue
        found.append(known)
        if adapter is not None:
            adapters[adapter] = None
    if unknown:
        listed = ", ".join(map(shown, unknown[:_SHOWN])) + (f" and {len(unknown) - _SHOWN} more" if len(unknown) > _SHOWN else "")
        raise CheckpointError(
            f"{path}: holds tensors that are not known from LoRA adapters: {listed}. Allowed are PEFT's names (lora_A.weight, "
            "lora_B.weight, ...) and tensors of modules_to_save. Convert the adapter to PEFT's format."
        )
    if len(adapters) > 1:
        raise CheckpointError(f"{path}: holds several adapters: {', '.join(map(shown, adapters))}. Save each into a folder of its own.")
    return found


def _read(key: str, name: str, config: AdapterConfig) -> tuple[Key | None, str | None]:
    for kind, pattern in _TRAINED:
        if match := pattern.fullmatch(name):
            module, depth = _unwrapped(match["module"])
            return Key(key, kind, module, depth), match["adapter"]
    if match := _BASE.fullmatch(name):
        return Key(key, "base", match["module"], 0, match["parameter"]), None
    if match := _SAVED.fullmatch(name):
        return Key(key, "saved", match["module"], 0, match["parameter"]), match["adapter"]
    module, _, parameter = name.rpartition(".")
    if not any(part.startswith(_OWN) for part in name.split(".")) and (parameter in ("weight", "bias") or config.is_saved(name)):
        return Key(key, "saved", module, 0, parameter), None
    return None, None


def _unwrapped(module: str) -> tuple[str, int]:
    """The module without the wrappers of its other trained parameters, and how many there are."""
    parts = module.split(".")
    kept = [part for part in parts if part not in ("base_layer", "token_adapter")]
    return ".".join(kept), parts.count("base_layer")
