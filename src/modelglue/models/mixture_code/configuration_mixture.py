"""Configuration of a mixture of experts inside one causal language model.

This file stands beside the weights. It needs transformers and nothing else.
"""

from __future__ import annotations

import copy
import re
from typing import Any

from transformers import LlamaConfig

FORMAT = "modelglue-levels/1"
LEVELS = ("ffn", "block", "model")
SPAN = r"prompt|full|first:[1-9][0-9]*"


class MixtureSettings:
    """The group `mixture` of config.json, beside the settings of the model whose parts the experts share."""

    mixture: Any = None

    def of_expert(self, number: int) -> Any:
        """The config that one expert's modules are built from: the model's own, with what is different there."""
        changes = self.mixture["experts"][number]["config"]
        if not changes:
            return self
        changed = copy.deepcopy(self)
        for key, value in changes.items():
            setattr(changed, key, value)
        return changed


def check(mixture: Any, layers: int) -> None:
    """ValueError for settings that no mixture of that many layers has."""
    if not isinstance(mixture, dict) or mixture.get("format") != FORMAT:
        raise ValueError(f"config.json: 'mixture' is not of the format {FORMAT}. Make the mixture again.")
    experts = mixture.get("experts")
    if (
        not isinstance(experts, list)
        or len(experts) < 2
        or not all(isinstance(e, dict) and isinstance(e.get("config"), dict) for e in experts)
    ):
        raise ValueError("config.json: 'mixture.experts' is no list of at least 2 experts. Make the mixture again.")
    choices = {
        "level": LEVELS, "routing": ("token", "sample"), "router_bias": (False, True), "compat": ("none", "official"),
    }  # fmt: skip
    for key, allowed in choices.items():
        if mixture.get(key) not in allowed:
            raise ValueError(f"config.json: 'mixture.{key}' is {mixture.get(key)!r}; allowed are {', '.join(map(str, allowed))}.")
    limits = {"top_k": (1, len(experts)), "merged_layers": (0, layers - 1)}
    for key, (low, high) in limits.items():
        value = mixture.get(key)
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            raise ValueError(f"config.json: 'mixture.{key}' is {value!r}; allowed is a whole number from {low} to {high}.")
    width = mixture.get("router_width")
    if width is not None and (not isinstance(width, int) or width < 1):
        raise ValueError(f"config.json: 'mixture.router_width' is {width!r}; allowed are null and whole numbers from 1.")
    if not re.fullmatch(SPAN, str(mixture.get("route_span"))):
        raise ValueError(f"config.json: 'mixture.route_span' is {mixture.get('route_span')!r}; allowed are prompt, full, and first:N.")
    temperature = mixture.get("temperature")
    if not isinstance(temperature, int | float) or not 0 < temperature < float("inf"):
        raise ValueError(f"config.json: 'mixture.temperature' is {temperature!r}; allowed is a number above 0.")
    if mixture["routing"] == "token" and mixture["level"] != "ffn":
        raise ValueError("config.json: token routing is for the level ffn; blocks and models are routed by sample.")


class MixtureConfig(MixtureSettings, LlamaConfig):  # type: ignore[misc]
    model_type = "modelglue_mixture"
