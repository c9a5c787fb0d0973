"""What every standard class of a sparse model has in common, seen from the dense models that it is made of."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

from modelglue.checkpoint import Checkpoint, JoinedCheckpoint, RenamedCheckpoint, TensorInfo, torch_dtype
from modelglue.mixture.exports.dense import FFN
from modelglue.mixture.exports.finished import FinishedCheckpoint, MadeCheckpoint
from modelglue.mixture.exports.parts import Gates, Parts

#: what config.json calls the dtypes
CONFIG_DTYPES: Mapping[str, str] = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
#: fields of the shared model's config that every decoder has
_KEPT = (
    "hidden_size", "num_hidden_layers", "num_attention_heads", "hidden_act", "max_position_embeddings", "initializer_range", "rms_norm_eps",
    "use_cache", "tie_word_embeddings", "attention_dropout", "bos_token_id", "eos_token_id", "pad_token_id",
)  # fmt: skip


class Export(ABC):
    """A class of transformers that experts beside each other fit into. Tensors are written one per expert and matrix wherever the class
    has that layout, which is what every release of transformers and inference engines read."""

    name: ClassVar[str]
    """The class."""
    model_type: ClassVar[str]
    words: ClassVar[tuple[str, ...]]
    """What else it may be called in a file."""
    families: ClassVar[tuple[str, ...]]
    """Of `dense.FAMILIES`."""
    recent: ClassVar[bool] = False
    """Whether it takes transformers 5 to load it."""

    def refusals(self, parts: Parts) -> list[str]:
        """Why this class cannot hold these parts; nothing where it can. What `parts.check` refuses is not said again."""
        shared = parts.shared
        found = []
        if shared.family not in self.families:
            found.append(f"its attention is not that of {shared.kind}")
        return [*found, *self._refusals(parts)]

    def needs_transformers_5(self, parts: Parts) -> bool:
        """Earlier ones lack the class, or take the width of a head from the model's."""
        heads, _, unit = parts.shared.heads
        return self.recent or (self.model_type != "qwen3_moe" and heads * unit != parts.shared.width)

    def build(self, parts: Parts, gates: Gates, description: Mapping[str, Any]) -> Checkpoint:
        """The sparse model as an expression: nothing is read but what the gates were made from. `description` is its recipe."""
        made = MadeCheckpoint(self._gates(parts, gates), self._zeros(parts))
        pieces = [*self._shared(parts), *self._tensors(parts), made]
        return JoinedCheckpoint(
            [("", piece) for piece in pieces], config=self.config(parts), description=description, files=parts.shared.files
        )

    def config(self, parts: Parts) -> dict[str, Any]:
        """config.json of the sparse model. Rotary parameters are written in the words that all releases of transformers read."""
        shared = parts.shared
        facts, rope = shared.facts, shared.rope
        heads, groups, unit = shared.heads
        scaling = {key: value for key, value in rope.items() if key not in ("rope_theta", "partial_rotary_factor", "type")}
        return {
            "architectures": [self.name],
            "model_type": self.model_type,
            **{key: facts[key] for key in _KEPT if key in facts},
            "vocab_size": shared.vocabulary,
            "num_key_value_heads": groups,
            **({"head_dim": unit} if unit * heads != shared.width or self.model_type == "qwen3_moe" else {}),
            "rope_theta": rope["rope_theta"],
            **({"rope_scaling": scaling} if shared.scaled_rope else {}),
            "torch_dtype": CONFIG_DTYPES[parts.dtype],
            **({"transformers_version": "5.0.0"} if self.needs_transformers_5(parts) else {}),
            **self._config(parts),
        }

    @abstractmethod
    def _refusals(self, parts: Parts) -> Iterable[str]: ...
    @abstractmethod
    def _config(self, parts: Parts) -> dict[str, Any]: ...
    @abstractmethod
    def _gates(self, parts: Parts, gates: Gates) -> dict[str, Any]: ...
    def _shared(self, parts: Parts) -> list[Checkpoint]:
        """Everything but the feed-forward networks."""
        return [shared_tensors(parts)]

    @abstractmethod
    def _tensors(self, parts: Parts) -> list[Checkpoint]:
        """Experts, and the feed-forward networks of layers that stay dense."""

    def _zeros(self, parts: Parts) -> dict[str, TensorInfo]:
        """Tensors that the class has and these models have not."""
        return {}


def layer_name(layer: int, rest: str) -> str:
    return f"model.layers.{layer}.{rest}"


def shared_tensors(parts: Parts) -> Checkpoint:
    """Everything of the shared model but its feed-forward networks, in the mixture's dtype."""
    shared = parts.shared
    return FinishedCheckpoint(RenamedCheckpoint(shared.checkpoint, {name: name for name in shared.shared_names()}), dtype=parts.dtype)


def routed(parts: Parts, place: str, words: Mapping[str, str]) -> list[Checkpoint]:
    """The experts under their names in sparse layers: `place` with {e} for the expert's number, and {part} for the words of `FFN`."""
    return [
        RenamedCheckpoint(
            expert.checkpoint,
            {
                layer_name(layer, place.format(e=number, part=words[part])): expert.ffn(layer, part)
                for layer in parts.sparse_layers
                for part in FFN
            },
        )
        for number, expert in enumerate(parts.experts)
    ]


def always_on(parts: Parts, place: str, *, factor: float = 1.0) -> list[Checkpoint]:
    """The expert that is always on, under `place`, its contribution times `factor`."""
    if parts.always is None:
        return []
    expert = parts.always
    factors = {expert.ffn(layer, "down"): factor for layer in parts.sparse_layers}
    names = {layer_name(layer, f"{place}.{part}_proj.weight"): expert.ffn(layer, part) for layer in parts.sparse_layers for part in FFN}
    return [RenamedCheckpoint(FinishedCheckpoint(expert.checkpoint, factors=factors), names)]


def dense_tensors(parts: Parts) -> list[Checkpoint]:
    """The feed-forward networks of the lowest layers, which stay the shared model's."""
    names = [parts.shared.ffn(layer, part) for layer in range(parts.dense_layers) for part in FFN]
    if not names:
        return []
    return [FinishedCheckpoint(RenamedCheckpoint(parts.shared.checkpoint, {name: name for name in names}), dtype=parts.dtype)]


def gate_tensors(parts: Parts, gates: Gates, place: str) -> dict[str, Any]:
    """The router's weights by name, [experts, d] each."""
    wanted = torch_dtype(parts.gate_dtype)
    return {layer_name(layer, place): gates.routed[number].to(wanted) for number, layer in enumerate(parts.sparse_layers)}
