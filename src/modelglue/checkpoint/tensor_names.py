"""What the name of a tensor tells: the layer that it stands in, and what it is for. Knows no list of architectures.

Where the truth about one class is needed (which module is the attention of this model?), `models.roles` asks the class itself; for showing
and comparing what is on disk the names are enough, and what they do not tell is called "other".
"""

from __future__ import annotations

import re
from typing import NamedTuple

#: in the order in which people think of a model
ROLES = ("embedding", "attention", "feed_forward", "norm", "head", "other")

_NORM = re.compile(r"norm|(?:^|_)ln(?:_|\d|$)")
#: parts that hold the embedding or the head where they stand outside the layers
_EMBEDDING = re.compile(r"embed|^(?:wte|wpe|shared)$|^patch_conv$")
_HEAD = re.compile(
    r"^(?:(?:lm|score|qa|classification|reward|value|v)_?heads?|heads?|embed_out|output|score|classifier|predictions|qa_outputs)$"
)
_ATTENTION = re.compile(r"attn|attention|^(?:[qkvo]_proj|qkv(?:_proj)?|out_proj|to_[qkv])$")
_FEED_FORWARD = re.compile(r"mlp|ffn|feed_?forward|moe|expert|densereludense|^(?:ff|fc\d|intermediate|w[123]|(?:gate|up|down)_proj)$")


class Layer(NamedTuple):
    """`model.layers.7.mlp.up_proj.weight` stands in layer 7 of the stack `model.layers`."""

    stack: str
    number: int


def layer_of(name: str) -> Layer | None:
    """The layer of a tensor: the first part of its name that is a number; None outside the layers."""
    parts = name.split(".")
    for position, part in enumerate(parts[:-1]):
        if part.isdecimal() and position:
            return Layer(".".join(parts[:position]), int(part))
    return None


def role_of(name: str) -> str:
    """One of ROLES. A norm is a norm wherever it stands; inside a layer the innermost part that tells decides.

    Experts and their routers are feed-forward, learned positions are embedding, BERT's prediction head is head; state-space mixers,
    projectors and convolutions are other.
    """
    parts = name.lower().split(".")
    owners = parts[:-1] or parts
    if _NORM.search(owners[-1]):
        return "norm"
    if layer_of(name) is None:
        if any(_HEAD.search(part) for part in owners):
            return "head"
        if any(_EMBEDDING.search(part) for part in owners):
            return "embedding"
    for part in reversed(owners):
        if _ATTENTION.search(part):
            return "attention"
        if _FEED_FORWARD.search(part):
            return "feed_forward"
    return "feed_forward" if _is_bert_output(parts) else "other"


def _is_bert_output(parts: list[str]) -> bool:
    """BERT calls the second half of its feed-forward part `layer.N.output.dense`."""
    return len(parts) >= 4 and parts[-4].isdecimal() and parts[-3] == "output"
