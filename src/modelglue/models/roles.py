"""What the parts of a model are for, read from its class on the meta device: no list of architectures, no weights."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from modelglue.errors import CheckpointError
from modelglue.models.build import empty_model

_ATTENTION = re.compile(r"attn|attention", re.IGNORECASE)
_FEED_FORWARD = re.compile(r"mlp|feed_forward|ffn|moe|experts", re.IGNORECASE)


@dataclass(frozen=True)
class Roles:
    """Module paths in the live model; tensor names start with them."""

    embedding: str
    layers: str
    """Path of the list of decoder layers; layer i is `{layers}.{i}`."""
    count: int
    attention: tuple[str, ...]
    """Paths inside one layer."""
    feed_forward: tuple[str, ...]
    norms: tuple[str, ...]
    final_norm: str | None
    head: str | None
    tied: bool
    """Whether the head is the embedding."""

    def role(self, name: str) -> str:
        """embedding, attention, feed_forward, norm, head or other, for one live tensor name."""
        if name.startswith(f"{self.embedding}."):
            return "embedding"
        if self.head is not None and name.startswith(f"{self.head}."):
            return "head"
        if self.final_norm is not None and name.startswith(f"{self.final_norm}."):
            return "norm"
        inside = re.match(re.escape(self.layers) + r"\.\d+\.(.*)", name)
        if inside:
            for role, paths in (("attention", self.attention), ("feed_forward", self.feed_forward), ("norm", self.norms)):
                if any(inside[1].startswith(f"{path}.") for path in paths):
                    return role
        return "other"


def roles_of(config: Mapping[str, Any]) -> Roles:
    """The roles of the model that a config.json describes. Allocates no weights; CheckpointError for unknown classes."""
    return roles_of_model(empty_model(config, "config", meta=True))


def roles_of_model(model: Any) -> Roles:
    """The roles of a live model."""
    layers, blocks = decoder_layers(model)
    parents = layers.rpartition(".")[0]
    inside = dict(blocks[0].named_children())
    embedding = model.get_input_embeddings()
    head = model.get_output_embeddings()
    paths = {id(module): path for path, module in model.named_modules()}
    beside = dict(model.get_submodule(parents).named_children()) if parents else dict(model.named_children())
    norms = [f"{parents}.{name}".lstrip(".") for name, module in beside.items() if _is_norm(module)]
    return Roles(
        embedding=paths[id(embedding)],
        layers=layers,
        count=len(blocks),
        attention=tuple(name for name, module in inside.items() if _ATTENTION.search(name) and _has_weights(module)),
        feed_forward=tuple(name for name, module in inside.items() if _FEED_FORWARD.search(name) and _has_weights(module)),
        norms=tuple(name for name, module in inside.items() if _is_norm(module)),
        final_norm=norms[-1] if norms else None,
        head=paths.get(id(head)) if head is not None else None,
        tied=head is not None and head.weight is embedding.weight,
    )


def decoder_layers(model: Any) -> tuple[str, Any]:
    """(path, module list) of the decoder layers: the first list with as many entries as the config has layers."""
    import torch

    count = int(model.config.get_text_config().num_hidden_layers)
    for path, module in model.named_modules():
        if isinstance(module, torch.nn.ModuleList) and len(module) == count:
            return path, module
    raise CheckpointError(f"{type(model).__name__}: a list of {count} decoder layers was not found in this class.")


def _is_norm(module: Any) -> bool:
    return "norm" in type(module).__name__.lower()


def _has_weights(module: Any) -> bool:
    """A dropout has a telling name too, but nothing that a role could be asked for; a norm has a role of its own."""
    return not _is_norm(module) and any(True for _ in module.parameters())
