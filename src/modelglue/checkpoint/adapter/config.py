"""adapter_config.json of a LoRA adapter: what its tensors mean, and what makes it no additive update at all."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from modelglue.checkpoint.formats.header import MAX_HEADER_BYTES, parse_object, shown
from modelglue.errors import CheckpointError

CONFIG_FILE = "adapter_config.json"
#: our own key: how a square expert parameter is stored, where its shape cannot tell
LAYOUT_KEY = "modelglue_expert_layout"
LAYOUTS = ("out_in", "in_out")
_PLAIN = re.compile(r"[\w-]+(\.[\w-]+)*")

#: settings under which the adapter is no update of the base that it is given -> why
_REFUSED = {
    "layer_replication": "it is trained on a model whose layers were repeated",
    "alora_invocation_tokens": "it is switched on by tokens of the prompt",
    "use_qalora": "its factors stand for groups of quantised inputs",
    "use_bdlora": "its factors are block-diagonal parts of a sharded model",
    "arrow_config": "it routes between several adapters at run time",
    "kasa_config": "it changes the base weights it was trained on",
    "monteclora_config": "its weights are samples of a distribution",
    "megatron_config": "its layers are sharded parallel layers",
}
#: initialisations that subtract something from the base weights before training
_CHANGES_BASE = ("pissa", "olora", "corda", "lora_ga", "loftq")
#: settings that say nothing about what the tensors mean
_IRRELEVANT = frozenset({
    "auto_mapping", "base_model_name_or_path", "bias", "corda_config", "ensure_weight_tying", "eva_config", "exclude_modules",
    "inference_mode", "init_lora_weights", "layers_pattern", "layers_to_transform", "loftq_config", "lora_dropout", "lora_ga_config",
    "megatron_core", "modules_to_save", "peft_type", "peft_version", "qalora_group_size", "revision", "runtime_config", "target_modules",
    "target_parameters", "task_type", "trainable_token_indices", "velora_config", "enable_lora", "merge_weights", "modules_to_tie",
    "target_modules_to_tie", "tied_weights_keys",
})  # fmt: skip


class Patterns(dict[str, float]):
    """Module patterns -> numbers: regular expressions for the end of a module's name; the first in the file that fits decides.

    Plain names are looked up, because a file may name every module of a model; a dot in one is a dot. Time O(parts of the name +
    expressions), whatever the number of names.
    """

    def first(self, module: str, otherwise: float) -> float:
        found = [self._plain[ending] for ending in _endings(module.split(".")) if ending in self._plain]
        place = min(found, default=len(self))
        for number, pattern in self._expressions:
            if number > place:
                break
            if pattern.match(module):
                place = number
        return self._numbers[place] if place < len(self) else otherwise

    @cached_property
    def _plain(self) -> dict[str, int]:
        return {key: number for number, key in enumerate(self) if _PLAIN.fullmatch(key)}

    @cached_property
    def _expressions(self) -> list[tuple[int, re.Pattern[str]]]:
        return [(number, _expression(key)) for number, key in enumerate(self) if not _PLAIN.fullmatch(key)]

    @cached_property
    def _numbers(self) -> list[float]:
        return list(self.values())


def _expression(pattern: str) -> re.Pattern[str]:
    return re.compile(rf"(.*\.)?({pattern})$")


@dataclass(frozen=True, kw_only=True)
class AdapterConfig:
    """The settings that decide what an adapter's tensors mean, with PEFT's defaults for what is not said."""

    r: int = 8
    lora_alpha: float = 8
    rank_pattern: Patterns = field(default_factory=lambda: Patterns())
    alpha_pattern: Patterns = field(default_factory=lambda: Patterns())
    use_rslora: bool = False
    use_dora: bool = False
    fan_in_fan_out: bool = False
    lora_bias: bool = False
    bias: str = "none"
    modules_to_save: Sequence[str] = ()
    target_parameters: Sequence[str] = ()
    trainable_token_indices: Sequence[int] | Mapping[str, Sequence[int]] = ()
    base_model_name_or_path: str | None = None
    expert_layout: str | None = None
    unknown: Sequence[str] = ()
    raw: Mapping[str, Any] = field(default_factory=dict)

    def rank(self, module: str) -> int:
        """The rank that the config gives a module: the first fitting key of `rank_pattern`, else `r`."""
        return int(self.rank_pattern.first(module, self.r))

    def scale(self, module: str) -> float:
        """alpha / r, or alpha / sqrt(r) with rank-stabilised LoRA."""
        rank = self.rank(module)
        alpha = float(self.alpha_pattern.first(module, self.lora_alpha))
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)

    def is_saved(self, name: str) -> bool:
        """Whether tensor `name` belongs to a module of `modules_to_save`."""
        parts = name.split(".")
        return any(ending in self._saved for end in range(1, len(parts)) for ending in _endings(parts[:end]))

    @cached_property
    def _saved(self) -> frozenset[str]:
        return frozenset(self.modules_to_save)

    def tokens(self, module: str) -> Sequence[int] | None:
        """The rows that the trained tokens of an embedding module replace; None if the config names no such module."""
        given = self.trainable_token_indices
        if not isinstance(given, Mapping):
            return given or None
        for key, rows in given.items():
            if module == key or module.endswith(f".{key}"):
                return rows
        return None


def _endings(parts: Sequence[str]) -> list[str]:
    """a.b.c, b.c, c."""
    return [".".join(parts[begin:]) for begin in range(len(parts))]


def read_config(folder: Path) -> AdapterConfig:
    """Read and judge `folder`/adapter_config.json. One CheckpointError names all that is wrong with it.

    Refused are other adapter types than LORA, and variants whose base is not the given model (see `_REFUSED`, `_CHANGES_BASE`).
    """
    path = folder / CONFIG_FILE
    try:
        if path.stat().st_size > MAX_HEADER_BYTES:
            raise CheckpointError(f"{path}: is {path.stat().st_size:,} bytes long, allowed are {MAX_HEADER_BYTES:,}.")
        raw = parse_object(path.read_bytes(), unique=False)
    except FileNotFoundError:
        raise CheckpointError(f"{folder}: holds no {CONFIG_FILE}, so it is no adapter. Give the folder that PEFT has saved.") from None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror}). Check its permissions.") from error
    except ValueError as error:
        raise CheckpointError(f"{path}: is not valid: {error}. Fetch the adapter again.") from error
    faults = _refusals(raw)
    if faults:
        raise CheckpointError("\n".join(f"{path}: {fault}" for fault in faults))
    values, faults = _typed(raw)
    if faults:
        raise CheckpointError("\n".join(f"{path}: {fault} Fetch the adapter again." for fault in faults))
    known = _IRRELEVANT | values.keys() | _REFUSED.keys() | {LAYOUT_KEY}
    unknown = tuple(key for key in raw if key not in known and raw[key] not in (None, False, [], {}))
    return AdapterConfig(**values, unknown=unknown, raw=raw)


def _refusals(raw: Mapping[str, Any]) -> list[str]:
    kind = raw.get("peft_type")
    if kind != "LORA":
        return [f"peft_type is {shown(kind)}; allowed is 'LORA'. Convert the adapter to LoRA, or fold it into its base with PEFT first."]
    faults = [
        f"{key} is set, so the adapter is no update of this base alone: {reason}. Fold it into its base with PEFT and give the result."
        for key, reason in _REFUSED.items()
        if raw.get(key)
    ]
    start = raw.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(_CHANGES_BASE):
        faults.append(
            f"init_lora_weights is {shown(start)}, which changes the base weights before training, so the adapter does not fit the "
            "original base. Save it again with PEFT's path_initial_model_for_weight_conversion, or give the base that was saved beside it "
            "and set init_lora_weights to true."
        )
    return faults


def _typed(raw: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The settings that are used, each of its type; what is not, as faults."""
    faults: list[str] = []

    def take(key: str, allowed: str, fits: Any, default: Any) -> Any:
        value = raw.get(key)
        if value is None:
            return default
        if not fits(value):
            faults.append(f"{key} is {shown(value)}, allowed is {allowed}.")
            return default
        return value

    values: dict[str, Any] = {
        "r": take("r", "a whole number from 1", _is_rank, 8),
        "lora_alpha": take("lora_alpha", "a finite number", _is_number, 8),
        "rank_pattern": take("rank_pattern", "module patterns with whole numbers from 1", _mapping_of(_is_rank), {}),
        "alpha_pattern": take("alpha_pattern", "module patterns with finite numbers", _mapping_of(_is_number), {}),
        "bias": take("bias", "none, all or lora_only", lambda value: value in ("none", "all", "lora_only"), "none"),
        "modules_to_save": tuple(take("modules_to_save", "a list of module names", _is_names, ())),
        "target_parameters": tuple(take("target_parameters", "a list of parameter names", _is_names, ())),
        "trainable_token_indices": take("trainable_token_indices", "a list of token ids, or one per module", _is_tokens, ()),
        "base_model_name_or_path": take("base_model_name_or_path", "a name", lambda value: isinstance(value, str), None),
        "expert_layout": take(LAYOUT_KEY, " or ".join(LAYOUTS), lambda value: value in LAYOUTS, None),
    }
    for key in ("use_rslora", "use_dora", "fan_in_fan_out", "lora_bias"):
        values[key] = take(key, "true or false", lambda value: isinstance(value, bool), False)
    for key in ("rank_pattern", "alpha_pattern"):
        values[key] = Patterns(values[key])
        for pattern in values[key]:
            try:
                _PLAIN.fullmatch(pattern) or _expression(pattern)
            except re.error as error:
                faults.append(f"{key} holds {shown(pattern)}, which is no regular expression ({error}).")
    return values, faults


def _is_rank(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value < 2**31


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and -1e30 < value < 1e30


def _is_names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) and name for name in value)


def _is_token_list(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(row, int) and not isinstance(row, bool) and row >= 0 for row in value)


def _is_tokens(value: Any) -> bool:
    return _is_token_list(value) or (isinstance(value, dict) and all(map(_is_token_list, value.values())))


def _mapping_of(fits: Any) -> Any:
    return lambda value: isinstance(value, dict) and all(map(fits, value.values()))
