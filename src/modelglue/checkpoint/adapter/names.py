"""How an adapter's names stand in a base that may spell its prefix otherwise; which tensors are embedding and head of a base."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from modelglue.checkpoint.protocol import Checkpoint
from modelglue.errors import CheckpointError

_EMBEDDINGS = ("embed_tokens", "wte", "word_embeddings", "embed_in", "shared", "tok_embeddings", "embeddings")
_HEADS = ("lm_head", "embed_out", "output")
#: what live models call some modules -> what their files do
_RENAMED = ((".mlp.experts", ".block_sparse_moe.experts"), (".mlp.gate", ".block_sparse_moe.gate"), ("lm_head", "embed_out"))
#: classes that turn states into logits of tokens
_LANGUAGE_MODELS = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration", "ForMaskedLM", "ForPreTraining")
#: beginnings of the names of classes that call their head otherwise than most
_OTHER_HEADS = {
    "Whisper": "proj_out", "Bert": "cls.predictions.decoder", "DistilBert": "vocab_projector", "Roberta": "lm_head.decoder",
    "XLMRoberta": "lm_head.decoder", "Albert": "predictions.decoder", "Electra": "generator_lm_head",
}  # fmt: skip
#: model types whose linear layers are stored (in, out)
_TRANSPOSED = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer")
_SHOWN = 4


def on_disk(module: str, known: set[str]) -> str:
    """The module under the name that the files of its architecture give it, if the base has that and not the other."""
    renamed = [module.replace(live, file) for live, file in _RENAMED if module.endswith(live)]
    return renamed[0] if module not in known and renamed and renamed[0] in known else module


def in_live_models(name: str) -> str:
    """What a live model calls a module or tensor of its file, where an adapter must call it so to be heard: GPT-NeoX's head."""
    module, dot, rest = name.partition(".")
    return f"lm_head{dot}{rest}" if module == "embed_out" else name


def with_other_prefix(modules: Iterable[str], added: Iterable[str], known: set[str], label: str) -> dict[str, str]:
    """Module -> the one of `known` that it becomes by a change of prefix: the same for all of them, or the same for each tower.

    Live models of several towers put names before every one of them that their files do not have; the two leading names tell a tower.
    At most two leading names are taken off and at most two put on, as few as possible in all. CheckpointError if none fits, or two.
    Modules of `added` may also be none of `known`.
    """
    missing = list(dict.fromkeys(modules))
    towers: dict[tuple[str, ...], list[str]] = {}
    for module in missing:
        towers.setdefault(tuple(module.split(".")[:2]), []).append(module)
    whole = bool(_fitting(missing, known)) or not all(_fitting(tower, known) for tower in towers.values())
    changes: list[tuple[str, str]] = []
    found: dict[str, str] = {}
    for part in [missing] if whole else towers.values():
        old, new = _cheapest(_fitting(part, known), part, label)
        changes.append((old, new))
        found |= {module: new + module.removeprefix(old) for module in part}
    for module in added:
        others = [(old, new) for old, new in changes if module.startswith(old) and new + module.removeprefix(old) in known]
        if others or (others := _fitting([module], known)):
            old, new = _cheapest(others, [module], label)
            found[module] = new + module.removeprefix(old)
    return found


def _fitting(missing: Sequence[str], known: set[str]) -> list[tuple[str, str]]:
    heads = {""} | {".".join(name.split(".")[:count]) + "." for name in known for count in (1, 2)}
    first = missing[0].split(".")
    taken = [""] + [".".join(first[:count]) + "." for count in (1, 2) if count < len(first)]
    return [
        (old, new)
        for old in taken
        if all(module.startswith(old) for module in missing)
        for new in sorted(heads)
        if old != new and all(new + module.removeprefix(old) in known for module in missing)
    ]


def _cheapest(fitting: Sequence[tuple[str, str]], missing: Sequence[str], label: str) -> tuple[str, str]:
    listed = ", ".join(f"'{module}'" for module in missing[:_SHOWN]) + (
        f" and {len(missing) - _SHOWN} more" if len(missing) > _SHOWN else ""
    )
    if not fitting:
        raise CheckpointError(
            f"{label}: adapts {listed}, which the base does not have, with no other prefix either. Give the base that it was trained on."
        )
    cost = {pair: pair[0].count(".") + pair[1].count(".") for pair in fitting}
    best = [pair for pair in fitting if cost[pair] == min(cost.values())]
    if len(best) > 1:
        where = " or ".join(f"'{new}{missing[0].removeprefix(old)}'" for old, new in best)
        raise CheckpointError(
            f"{label}: adapts {listed}, which the base does not have; it could be {where}. "
            "Rename the adapter's tensors, or give the base that it was trained on."
        )
    return best[0]


def input_embedding(base: Checkpoint) -> str | None:
    """The embedding of tokens, if the names leave no doubt which tensor it is."""
    found = [
        name for name in base.names() if name.endswith(".weight") and _module_name(name) in _EMBEDDINGS and len(base.info(name).shape) == 2
    ]
    shared = [name for name in found if _module_name(name) == "shared"]
    candidates = shared or found
    return candidates[0] if len(candidates) == 1 else None


def output_head(names: Iterable[str]) -> str | None:
    """The head that turns states into logits, if the names leave no doubt which tensor it is."""
    found = [name for name in names if name.endswith(".weight") and _module_name(name) in _HEADS and _is_high(name)]
    return found[0] if len(found) == 1 else None


def is_tied(config: Mapping[str, Any], head_on_disk: bool) -> bool:
    """Whether embedding and head are one tensor: what the config says, else whether the base goes without a head."""
    said = _field(config, "tie_word_embeddings")
    return bool(said) if isinstance(said, bool) else not head_on_disk


def unwritten_head(config: Mapping[str, Any]) -> str | None:
    """What a live model of this config calls a tied head, which is not written to the disk; None for a class that has none."""
    names = config.get("architectures")
    name = str(names[0]) if isinstance(names, list) and names else _LANGUAGE_MODELS[0]
    if not name.endswith(_LANGUAGE_MODELS):
        return None
    other = re.match(rf"({'|'.join(_OTHER_HEADS)})(?=For|LMHead)", name)
    return f"{_OTHER_HEADS[other[1]] if other else 'lm_head'}.weight"


def is_transposed(config: Mapping[str, Any]) -> bool:
    """Whether a model of this config stores the linear layers of its blocks (in, out)."""
    return config.get("model_type") in _TRANSPOSED


def untied(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config of a model whose head has become a tensor of its own."""
    nested = {
        key: {**value, "tie_word_embeddings": False}
        for key, value in config.items()
        if isinstance(value, Mapping) and "tie_word_embeddings" in value
    }
    return {**config, **nested, "tie_word_embeddings": False}


def resized(config: Mapping[str, Any], old: int, new: int) -> dict[str, Any]:
    """The config of a model with another number of embedding rows."""
    nested = {
        key: {**value, "vocab_size": new} for key, value in config.items() if isinstance(value, Mapping) and value.get("vocab_size") == old
    }
    own = {"vocab_size": new} if config.get("vocab_size") == old else {}
    return {**config, **nested, **own}


def _field(config: Mapping[str, Any], key: str) -> Any:
    places: Sequence[Any] = [config, config.get("text_config"), config.get("decoder")]
    return next((place[key] for place in places if isinstance(place, Mapping) and place.get(key) is not None), None)


def _module_name(name: str) -> str:
    return name.removesuffix(".weight").rpartition(".")[2]


def _is_high(name: str) -> bool:
    """Not inside a layer: a feed-forward part may be called output as well."""
    return not any(part.isdigit() for part in name.split("."))
