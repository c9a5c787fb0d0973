"""The models of one recipe: opened, under what is taken of them, and made to agree on what the rows of their embeddings mean."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from modelglue.checkpoint import Checkpoint, RenamedCheckpoint
from modelglue.checkpoint.vocabulary import (
    Alignment,
    FromModel,
    FromToken,
    TokenPolicy,
    VocabularyRequest,
    Zero,
    align,
    check_vocabularies,
    dressed,
    tied_heads,
    truncate,
)  # fmt: skip
from modelglue.recipe.canonical import canonical
from modelglue.recipe.mergeable import check_architectures, different_functions
from modelglue.recipe.parts import part_of
from modelglue.recipe.schema import Into, Recipe, Source, Tokenizer, TokenSource

_DTYPE_KEYS = ("dtype", "torch_dtype")
#: how an input of a recipe may stand there
Node = str | Recipe | Source


class Inputs:
    """Every input of a recipe as a checkpoint; one that stands there twice is one.

    `open_` and `build` make a checkpoint of a reference and of a nested recipe. `fields` are what the config of the output says
    otherwise than the donor's.
    """

    def __init__(self, recipe: Recipe, open_: Callable[[str], Checkpoint], build: Callable[[Recipe], Checkpoint]) -> None:
        self._recipe = recipe
        self._open = open_
        self._build = build
        self._views: dict[str, Checkpoint] = {}
        self.fields: dict[str, Any] = {}
        for _, source in recipe.inputs():
            if not isinstance(source, Into) and _key(source) not in self._views:
                self._views[_key(source)] = self._opened(source)

    def view(self, source: Node) -> Checkpoint:
        return self._views[_key(source)]

    def node(self, model: str | Recipe) -> Checkpoint:
        """A whole model, as it is."""
        return self._open(model) if isinstance(model, str) else self._build(model)

    def every(self) -> list[Checkpoint]:
        return list(self._views.values())

    def models(self) -> list[Checkpoint]:
        return [self._views[key] for key in self._model_keys()]

    @property
    def donor(self) -> Node:
        """The input whose config and tokenizer the output takes: the base, else the first model."""
        return self._recipe.base if self._recipe.base is not None else next(self._recipe.stretches()).models[0]

    def root(self) -> Checkpoint | None:
        """The model on disk behind a donor that is a merge; None where the donor is no merge."""
        node, found = self.donor, None
        while not isinstance(plain := node.model if isinstance(node, Source) else node, str):
            node = plain.base if plain.base is not None else next(plain.stretches()).models[0]
            found = node
        return None if found is None else self._opened(found)

    def dressed_root(self) -> Checkpoint | None:
        """The same with the donor's config and files, if it has the donor's tensors in its shapes: whose dtypes the output then has."""
        root, donor = self.root(), self.view(self.donor)
        if root is None or set(root.names()) != set(donor.names()):
            return None
        if any(root.info(name).shape != donor.info(name).shape for name in root.names()):
            return None
        config = {key: value for key, value in donor.config.items() if root.config.get(key) != value and key not in _DTYPE_KEYS}
        return dressed(root, config=config, files=replacing(root, donor))

    def align(self, *, widen: bool) -> Alignment:
        """Compare architectures and vocabularies; align or cut the models where the recipe says so, untie heads that only some have.

        `widen`: rebuilt tables are float32, so that rows that are averaged are rounded once, when they are stored.
        """
        recipe = self._recipe
        keys, base_key = self._model_keys(), _key(recipe.base) if recipe.base is not None else None
        models, base = self.models(), self._views[base_key] if base_key is not None else None
        everything = [*models, *([base] if base is not None else [])]
        for group in [[one] for one in everything] if recipe.allow_mixed else [everything]:
            check_architectures(group)
        labels = [_label(key) for key in [*keys, *([base_key] if base_key is not None else [])]]
        if recipe.tokenizer is not None:
            found = align(models, base, self._request(recipe.tokenizer, keys), labels, widen=widen)
        elif recipe.vocabulary_mismatch == "truncate":
            found = truncate(models, base, labels)
        else:
            check_vocabularies(models, base, labels)
            found = Alignment(tuple(models), base)
        heads = tied_heads(found.models, found.base)
        self._views.update(zip(keys, heads.models, strict=True))
        if base_key is not None and heads.base is not None and base_key not in keys:
            self._views[base_key] = heads.base
        self.fields = merged_fields(found.config, heads.config)
        return found

    def odd_parts(self) -> list[str]:
        """Where a part of a model computes otherwise than the input that the output takes after; of whole models `warnings_of` tells."""
        first = _key(self.donor)
        pairs = [[first, key] for key in self._views if key != first and (_is_part(key) or _is_part(first))]
        return [text for pair in pairs for text in different_functions([self._views[key] for key in pair], [_label(key) for key in pair])]

    def _opened(self, source: Node) -> Checkpoint:
        model = self.node(source.model if isinstance(source, Source) else source)
        if isinstance(source, Source) and source.part is not None:
            model = part_of(model, source.part, source.label)
        if isinstance(source, Source) and source.architecture is not None:
            names = {name: name for name in model.names()}
            model = RenamedCheckpoint(model, names, {**model.config, "architectures": [source.architecture]})
        return model

    def _model_keys(self) -> list[str]:
        """Every distinct model, in the order of the recipe; the base only where it is one of them."""
        found = [_key(source) for place, source in self._recipe.inputs() if place != ("base",) and not isinstance(source, Into)]
        return list(dict.fromkeys(found))

    def _request(self, section: Tokenizer, keys: Sequence[str]) -> VocabularyRequest:
        """The tokenizer section, its models by position; the base that is no model stands after them."""
        names: dict[str, int] = {}
        for _, source in self._recipe.inputs():
            node = source.model if isinstance(source, Source | Into) else source
            if isinstance(node, str) and not isinstance(source, Into):
                names.setdefault(node, keys.index(_key(source)) if _key(source) in keys else len(keys))

        def row(source: str | TokenSource | None) -> FromModel | FromToken | Zero | None:
            if source is None or isinstance(source, str):
                return None if source is None else Zero()
            if source.token is None and source.token_id is None:
                return FromModel(names[source.model])
            return FromToken(names[source.model], token=source.token, token_id=source.token_id)

        return VocabularyRequest(
            section.source if isinstance(section.source, str) else names[section.source.model],
            {token: TokenPolicy(row(rule.source), rule.force) for token, rule in section.tokens.items()},
            section.pad_to_multiple_of,
        )


def label_of_input(source: Node) -> str:
    """What messages call an input."""
    return _label(_key(source))


def _key(source: Node) -> str:
    """What tells inputs apart: the reference (or the nested recipe), and what is taken of it."""
    if not isinstance(source, Source):
        source = Source(model=source)
    node = source.model if isinstance(source.model, str) else canonical(source.model)
    return json.dumps([node, source.part, source.architecture])


def _label(key: str) -> str:
    node, part, _ = json.loads(key)
    name = node if isinstance(node, str) else f"({node['method']} merge)"
    return name if part is None else f"{name} ({part if isinstance(part, str) else ', '.join(part)})"


def _is_part(key: str) -> bool:
    return json.loads(key)[1] is not None


def replacing(old: Checkpoint, new: Checkpoint) -> dict[str, Any]:
    """Side files that turn those of `old` into those of `new`."""
    if old.files == new.files:
        return {}
    return {**{name: None for name in old.files if name not in new.files}, **new.files}


def merged_fields(*updates: Mapping[str, Any]) -> dict[str, Any]:
    """Updates of a config one after the other, objects field by field."""
    found: dict[str, Any] = {}
    for update in updates:
        for key, value in update.items():
            both = isinstance(value, Mapping) and isinstance(found.get(key), Mapping)
            found[key] = merged_fields(found[key], value) if both else value
    return found
