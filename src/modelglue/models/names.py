"""From the names on disk to the names in a live model, by transformers' own conversion table.

On disk a Mixtral keeps one tensor per expert, live they are fused; other classes change prefixes. The table that transformers
loads with is the one truth about it, so it is read, never repeated here.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from modelglue.errors import CheckpointError


@dataclass
class Step:
    """One live tensor (or several, when a conversion splits) and the tensors on disk that it is made of."""

    live: str
    converter: Any = None
    """None for a plain rename."""
    sources: list[tuple[str, str]] = field(default_factory=list)
    """(name on disk, pattern of the converter that it matched); one entry for a plain rename."""


def loading_steps(model: Any, names: Sequence[str], label: str) -> list[Step]:
    """How every tensor on disk gets into the model.

    Raises CheckpointError when a tensor on disk has no place, or a place in the model gets no tensor. Tied places need only one.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, dot_natural_key, rename_source_key

    table = get_model_conversion_mapping(model)
    converters = [entry for entry in table if isinstance(entry, WeightConverter)]
    renamings = [entry for entry in table if not isinstance(entry, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    places = model.state_dict()
    steps: dict[str, Step] = {}
    homeless = []
    for name in sorted(names, key=dot_natural_key):
        live, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, places)
        if live not in places and name in places:
            live, pattern = rename_source_key(name, [], [], model.base_model_prefix, places)
        if live not in places:
            homeless.append(name)
        elif pattern is None:
            steps[live] = Step(live, None, [(name, "")])
        else:
            step = steps.setdefault(live, Step(live, copy.deepcopy(by_pattern[pattern])))
            step.sources.append((name, pattern))
    ignored = [pattern for pattern in (model._keys_to_ignore_on_load_unexpected or []) if pattern]
    homeless = [name for name in homeless if not _matches(name, ignored) and not name.endswith("rotary_emb.inv_freq")]
    if homeless:
        raise CheckpointError(
            f"{label}: {type(model).__name__} has no place for {_some(homeless)}. The config does not describe these weights."
        )
    return list(steps.values())


def uncovered(model: Any, covered: Sequence[str]) -> list[str]:
    """Places of the model that no loaded tensor fills, directly or through a tie."""
    filled = set(covered)
    places = model.state_dict(keep_vars=True)
    full = {id(places[name]) for name in filled}
    ignored = [pattern for pattern in (model._keys_to_ignore_on_load_missing or []) if pattern]
    return [name for name, value in places.items() if name not in filled and id(value) not in full and not _matches(name, ignored)]


def _matches(name: str, patterns: Sequence[str]) -> bool:
    import re

    return any(re.search(pattern, name) for pattern in patterns)


def _some(names: Sequence[str], count: int = 4) -> str:
    more = f" and {len(names) - count} more" if len(names) > count else ""
    return ", ".join(f"'{name}'" for name in names[:count]) + more
