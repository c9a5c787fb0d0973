"""What an extraction does with every tensor of the model, decided before a matrix is decomposed."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from modelglue.checkpoint import FLOATING, Checkpoint
from modelglue.checkpoint.adapter import names as naming
from modelglue.errors import CheckpointError, UserError

Kind = Literal["lora", "embedding", "saved", "equal", "excluded", "left out", "tied"]

#: tables that are looked up by a number: their rows are no outputs, and PEFT adapts them by factors of other names
_TABLES = (
    "embed_tokens", "wte", "word_embeddings", "embed_in", "shared", "tok_embeddings", "wpe", "embed_positions", "position_embeddings",
    "token_type_embeddings", "relative_attention_bias",
)  # fmt: skip
_STEP = 2**22


@dataclass
class Selection:
    """Tensor -> what becomes of it; the modules that are saved whole; which biases move with an update."""

    kinds: dict[str, Kind] = field(default_factory=dict)
    saved_modules: list[str] = field(default_factory=list)
    moved_biases: list[str] = field(default_factory=list)
    #: embedding and head, if the adapter changes the one tensor that is both
    tied: tuple[str, str] | None = None
    warnings: list[str] = field(default_factory=list)

    def of(self, *kinds: Kind) -> list[str]:
        return sorted(name for name, kind in self.kinds.items() if kind in kinds)


def select_tensors(
    model: Checkpoint,
    base: Checkpoint,
    *,
    include: Sequence[str],
    exclude: Sequence[str],
    embed_lora: bool,
    save_others: bool,
) -> Selection:
    """Decide over every tensor. Reads what cannot be decomposed (norms, biases, tables), to see whether it has changed.

    Patterns are globs (`*`, `?`, `[...]`) on a module's name or on its last part; UserError for one that fits nothing.
    """
    chosen = Selection()
    names = list(model.names())
    known = set(base.names())
    _check_comparable(names, known)
    _check_patterns([*include, *exclude], names)
    heads = _tied_heads(model, base)
    pair = _tied_pair(model, base)
    classifiers = _classifiers(model.config, names)
    for name in names:
        module = name.rpartition(".")[0]
        if not _is_chosen(module, include, exclude):
            chosen.kinds[name] = "excluded"
        elif name in heads:
            chosen.kinds[name] = "tied"
        elif _is_decomposable(model, base, name, known):
            table, tied = _is_table(model, name), pair is not None and name == pair[0]
            whole = module in classifiers or (table and (tied or not embed_lora))
            chosen.kinds[name] = "saved" if whole else "embedding" if table else "lora"
        else:
            chosen.kinds[name] = "saved"
    for name in chosen.of("saved"):
        if name in known and name.rpartition(".")[0] not in classifiers and _is_equal(model, base, name):
            chosen.kinds[name] = "equal"
    if pair is not None and chosen.kinds.get(pair[0]) == "saved":
        chosen.tied = pair
        if embed_lora:
            chosen.warnings.append(f"'{pair[0]}' is saved whole: it is tied to '{pair[1]}', and PEFT cannot hold factors for both.")
    missing = sorted(known - set(names))
    if missing:
        chosen.warnings.append(
            f"the model lacks {len(missing)} tensors of the base, among them '{missing[0]}'; the adapter keeps the base's."
        )
    _move_biases(chosen, model, base, known)
    if save_others:
        for name in [name for name in chosen.of("saved") if "." not in name]:
            chosen.kinds[name] = "left out"
            chosen.warnings.append(f"'{name}' belongs to no module, so PEFT cannot save it; the adapter keeps the base's.")
        _save_whole_modules(chosen, names)
    else:
        for name in chosen.of("saved"):
            chosen.kinds[name] = "left out"
    return chosen


def _check_comparable(names: Sequence[str], known: set[str]) -> None:
    if not known & set(names):
        raise CheckpointError("model and base have no tensor of the same name. Give the base that the model was made from.")


def _check_patterns(patterns: Sequence[str], names: Sequence[str]) -> None:
    modules = {name.rpartition(".")[0] for name in names}
    for pattern in patterns:
        if not any(_fits(module, pattern) for module in modules):
            raise UserError(
                f"the pattern '{pattern}' fits no module; allowed are globs on a module's name or its last part, such as 'q_proj' or "
                "'model.layers.*.mlp.*'. See the names with `modelglue inspect`."
            )


def _is_chosen(module: str, include: Sequence[str], exclude: Sequence[str]) -> bool:
    wanted = not include or any(_fits(module, pattern) for pattern in include)
    return wanted and not any(_fits(module, pattern) for pattern in exclude)


def _fits(module: str, pattern: str) -> bool:
    return fnmatch.fnmatchcase(module, pattern) or fnmatch.fnmatchcase(module.rpartition(".")[2], pattern)


def _tied_pair(model: Checkpoint, base: Checkpoint) -> tuple[str, str] | None:
    """Embedding and head of a base in which they are one."""
    embedding, written = naming.input_embedding(base), naming.output_head(base.names())
    head = written or (naming.unwritten_head(model.config) if model.config.get("architectures") else None)
    return (embedding, head) if embedding and head and naming.is_tied(base.config, written is not None) else None


def _tied_heads(model: Checkpoint, base: Checkpoint) -> set[str]:
    """The head, where it is stored a second time though it is tied to the embedding: the adapter holds it once."""
    head, embedding = naming.output_head(model.names()), naming.input_embedding(model)
    if head is None or embedding is None or not naming.is_tied(model.config, head_on_disk=True):
        return set()
    same = model.info(head) == model.info(embedding) and _is_equal(model, model, head, embedding)
    return {head} if same and naming.output_head(base.names()) == head else set()


def _classifiers(config: Mapping[str, object], names: Sequence[str]) -> set[str]:
    """The modules that PEFT saves whole in every adapter of such a model, and misses where they are not."""
    classes = config.get("architectures")
    if not isinstance(classes, list) or not classes or not str(classes[0]).endswith("ForSequenceClassification"):
        return set()
    return {name.rpartition(".")[0] for name in names} & {"classifier", "score"}


def _is_decomposable(model: Checkpoint, base: Checkpoint, name: str, known: set[str]) -> bool:
    if name not in known or not name.endswith(".weight"):
        return False
    ours, theirs = model.info(name), base.info(name)
    return len(ours.shape) == 2 and ours.shape == theirs.shape and ours.numel > 0 and {ours.dtype, theirs.dtype} <= FLOATING


def _is_table(model: Checkpoint, name: str) -> bool:
    last = name.removesuffix(".weight").rpartition(".")[2]
    rows = model.info(name).shape[0]
    sizes = (model.config.get("vocab_size"), model.config.get("max_position_embeddings"))
    return last in _TABLES or ("emb" in last and "out" not in last and rows in sizes)


def _is_equal(model: Checkpoint, base: Checkpoint, name: str, other: str | None = None) -> bool:
    """Whether two tensors have the same numbers, read in steps."""
    import torch

    other = other or name
    if model.info(name).shape != base.info(other).shape:
        return False
    numel = model.info(name).numel
    for start in range(0, numel, _STEP):
        stop = min(start + _STEP, numel)
        ours, theirs = model.read(name, start, stop), base.read(other, start, stop)
        if not torch.equal(
            ours.to(torch.promote_types(ours.dtype, theirs.dtype)), theirs.to(torch.promote_types(ours.dtype, theirs.dtype))
        ):
            return False
    return True


def _move_biases(chosen: Selection, model: Checkpoint, base: Checkpoint, known: set[str]) -> None:
    """Changed biases of layers whose weights have changed go with the update, instead of being saved with the whole layer."""
    for weight in chosen.of("lora"):
        bias = weight.removesuffix("weight") + "bias"
        same_shape = bias in known and chosen.kinds.get(bias) == "saved" and model.info(bias).shape == base.info(bias).shape
        if same_shape and not _is_equal(model, base, weight):
            del chosen.kinds[bias]
            chosen.moved_biases.append(bias)


def _save_whole_modules(chosen: Selection, names: Sequence[str]) -> None:
    """PEFT saves modules, with all their tensors, and finds them by the end of their names: what is found so is saved as well."""
    modules = {name.rpartition(".")[0] for name in chosen.of("saved")}
    everything = {name.rpartition(".")[0] for name in names}
    while True:
        lengths = {len(module) for module in modules}
        grown = modules | {module for module in everything if any(module[-length:] in modules for length in lengths)}
        for name in names:
            module = name.rpartition(".")[0]
            if chosen.kinds.get(name) != "saved" and (module in grown or _is_inside(module, grown)):
                chosen.kinds[name] = "saved"
        if grown == modules:
            break
        modules = grown
    chosen.moved_biases = [bias for bias in chosen.moved_biases if chosen.kinds.get(bias) != "saved"]
    chosen.saved_modules = [module for module in sorted(modules) if not _is_inside(module, modules)]


def _is_inside(module: str, others: set[str]) -> bool:
    """Whether it is a part of one of the others."""
    while module:
        module = module.rpartition(".")[0]
        if module in others:
            return True
    return False
