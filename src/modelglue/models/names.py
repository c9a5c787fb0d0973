"""From the names on disk to the names in a live model, by transformers' own conversion table.

On disk a Mixtral keeps one tensor per expert, live they are fused; other classes change prefixes. The table that transformers
loads with is the one truth about it, so it is read, never repeated here. It is no part of transformers' public interface: all use
of it is in this module.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from modelglue.errors import CheckpointError, RunError

if TYPE_CHECKING:
    import torch


@dataclass
class Step:
    """One live tensor (or several, when a conversion splits) and the tensors on disk that it is made of."""

    live: str
    converter: Any = None
    """None for a plain rename."""
    sources: list[tuple[str, str]] = field(default_factory=list)
    """(name on disk, pattern of the converter that it matched); one entry for a plain rename."""

    def convert(self, tensors: Sequence[torch.Tensor], model: Any) -> dict[str, torch.Tensor]:
        """The live tensors by name, from the `sources`' tensors; on the meta device this gives names and shapes."""
        converter = copy.deepcopy(self.converter)
        for (name, pattern), tensor in zip(self.sources, tensors, strict=True):
            converter.add_tensor(self.live, name, pattern, tensor)
        result = converter.convert(self.live, model=model, config=model.config)
        if isinstance(result, tuple):  # the first releases of transformers 5 give their errors besides
            result = result[0]
        return {name: value[0] if isinstance(value, list) else value for name, value in result.items()}


def loading_steps(model: Any, names: Sequence[str], label: str) -> list[Step]:
    """How every tensor on disk gets into the model. Raises CheckpointError when one has no place there."""
    renamings, converters, rename = _table(model)
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    places = model.state_dict()
    steps: dict[str, Step] = {}
    homeless = []
    for name in sorted(names, key=_natural):  # experts are fused in the order of their numbers
        live, pattern = rename(name, renamings, converters, model.base_model_prefix, places)
        if live not in places and name in places:
            live, pattern = name, None
        if live not in places:
            homeless.append(name)
        elif pattern is None:
            steps[live] = Step(live, None, [(name, "")])
        else:
            step = steps.setdefault(live, Step(live, by_pattern[pattern]))
            step.sources.append((name, pattern))
    ignored = _patterns(model, "_keys_to_ignore_on_load_unexpected")
    homeless = [name for name in homeless if not _matches(name, ignored) and not name.endswith("rotary_emb.inv_freq")]
    if homeless:
        raise CheckpointError(
            f"{label}: {type(model).__name__} has no place for {some(homeless)}. The config does not describe these weights."
        )
    return list(steps.values())


def on_disk(model: Any, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Live tensors under the names that they have on disk, fused ones divided: what a class would save. The inverse of `loading_steps`."""
    if not tensors:
        return {}
    from transformers.core_model_loading import revert_weight_conversion

    return dict(revert_weight_conversion(model, dict(tensors)))


def uncovered(model: Any, covered: Sequence[str]) -> list[str]:
    """Places of the model that no loaded tensor fills, directly or through a tie."""
    filled = set(covered)
    places = model.state_dict(keep_vars=True)
    full = {id(places[name]) for name in filled}
    ignored = _patterns(model, "_keys_to_ignore_on_load_missing")
    return [name for name, value in places.items() if name not in filled and id(value) not in full and not _matches(name, ignored)]


def some(names: Sequence[str], count: int = 4) -> str:
    """The first few names, for a message."""
    more = f" and {len(names) - count} more" if len(names) > count else ""
    return ", ".join(f"'{name}'" for name in names[:count]) + more


def _table(model: Any) -> tuple[list[Any], list[Any], Any]:
    """(renamings, converters, the function that applies them to one name)."""
    import transformers

    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, rename_source_key
    except ImportError as error:
        raise RunError(
            f"transformers {transformers.__version__} keeps its table of tensor names where this release of modelglue does not find it "
            f"({error}). Install another release of either."
        ) from error
    table = get_model_conversion_mapping(model)
    converters = [entry for entry in table if isinstance(entry, WeightConverter)]
    return [entry for entry in table if not isinstance(entry, WeightConverter)], converters, rename_source_key


def _natural(name: str) -> list[tuple[bool, int, str]]:
    """Sorts numbers between dots as numbers."""
    return [(part.isdecimal(), int(part) if part.isdecimal() else 0, part) for part in name.split(".")]


def _patterns(model: Any, attribute: str) -> list[str]:
    return [pattern for pattern in getattr(model, attribute, None) or [] if pattern]


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(re.search(pattern, name) for pattern in patterns)
