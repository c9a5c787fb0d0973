"""A model as a mixture below model level sees it: its parts by role, and where its tensors go in the live model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from modelglue.checkpoint import Checkpoint
from modelglue.checkpoint.vocabulary.tokens import vocabulary
from modelglue.errors import CheckpointError
from modelglue.models import Roles
from modelglue.models.build import check_claims, empty_model
from modelglue.models.names import loading_steps, some
from modelglue.models.roles import roles_of_model

#: settings of a model that say nothing about its layers
_BESIDE_LAYERS = frozenset({
    "vocab_size", "tie_word_embeddings", "bos_token_id", "eos_token_id", "pad_token_id", "max_position_embeddings", "dtype",
    "transformers_version", "_name_or_path", "architectures", "use_cache", "id2label", "label2id", "initializer_range",
    "pretraining_tp", "model_type", "auto_map", "return_dict", "output_hidden_states", "output_attentions",
})  # fmt: skip


@dataclass(frozen=True)
class Member:
    """One model, opened: everything here is known from config and headers."""

    name: str
    checkpoint: Checkpoint

    @cached_property
    def model(self) -> Any:
        """Its live model on the meta device. CheckpointError for a config that no class of transformers fits."""
        config = self.checkpoint.config
        if "auto_map" in config:
            raise CheckpointError(f"{self.label} needs modelling code of its own (auto_map), which can be no part of another model")
        check_claims(self.checkpoint, self.label)
        return empty_model(config, self.label, meta=True)

    @property
    def label(self) -> str:
        return f"'{self.name}'"

    @cached_property
    def roles(self) -> Roles:
        return roles_of_model(self.model)

    @property
    def class_name(self) -> str:
        return type(self.model).__name__

    @property
    def width(self) -> int:
        return int(self.model.config.get_text_config().hidden_size)

    @cached_property
    def settings(self) -> Mapping[str, Any]:
        """What its config says of layers, in the words of the transformers at hand."""
        values = self.model.config.to_dict()
        return {key: value for key, value in values.items() if key not in _BESIDE_LAYERS}

    @cached_property
    def live(self) -> Mapping[str, str]:
        """Live name -> name on disk. CheckpointError where loading makes one live tensor of several on disk."""
        steps = loading_steps(self.model, self.checkpoint.names(), self.label)
        if fused := [step.live for step in steps if step.converter is not None]:
            raise CheckpointError(f"{self.label}: {some(fused, 1)} is made of several tensors when it is loaded")
        return {step.live: step.sources[0][0] for step in steps}

    @property
    def feed_forward(self) -> str:
        """Path of the feed-forward network in a layer. CheckpointError unless there is exactly one."""
        if len(self.roles.feed_forward) != 1:
            found = ", ".join(self.roles.feed_forward) or "none"
            raise CheckpointError(f"{self.class_name}: its layers have not one feed-forward network but {found}")
        return self.roles.feed_forward[0]

    @cached_property
    def tokens(self) -> Mapping[str, int] | None:
        """Token -> id, for tokens that have a row; None without a tokenizer."""
        found = vocabulary(self.checkpoint)
        return None if found is None else found.ids

    def inside(self, layer: int) -> Mapping[str, str]:
        """Live name inside a decoder layer -> name on disk."""
        start = f"{self.roles.layers}.{layer}."
        return {live[len(start) :]: disk for live, disk in self.live.items() if live.startswith(start)}

    def differences(self, other: Member) -> dict[str, Any]:
        """Settings of layers that are not the other's: what this model's layers have to be built with."""
        keys = sorted(self.settings.keys() | other.settings.keys())
        return {key: self.settings.get(key) for key in keys if self.settings.get(key) != other.settings.get(key)}


def members(models: Mapping[str, Checkpoint]) -> Sequence[Member]:
    return [Member(name, checkpoint) for name, checkpoint in models.items()]
