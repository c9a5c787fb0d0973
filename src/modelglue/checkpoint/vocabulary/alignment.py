"""What an alignment is, and what making one of models starts from."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from modelglue.checkpoint.engine.fit import label_of
from modelglue.checkpoint.protocol import FLOATING, Checkpoint, SideFile
from modelglue.checkpoint.vocabulary.config import rows_update
from modelglue.checkpoint.vocabulary.heads import with_heads
from modelglue.checkpoint.vocabulary.tables import Tables, lies_flat, tables_of
from modelglue.checkpoint.vocabulary.tokens import TOKENIZER_FILES
from modelglue.checkpoint.vocabulary.union import RowCounts
from modelglue.checkpoint.vocabulary.view import RevocabularyCheckpoint, RowPlan
from modelglue.errors import MergeError


@dataclass(frozen=True)
class ModelReport:
    """What became of one model's tables: `before` rows were there, the output's rows are counted by where they come from."""

    label: str
    before: int
    rows: RowCounts


@dataclass(frozen=True)
class AlignmentReport:
    """The output's vocabulary, and every model's part in it."""

    tokens: int
    rows: int
    models: tuple[ModelReport, ...]


@dataclass(frozen=True)
class Alignment:
    """Models that agree on their vocabulary, and what the output needs besides: config fields, tokenizer files (None removes one)."""

    models: tuple[Checkpoint, ...]
    base: Checkpoint | None
    config: Mapping[str, Any] = field(default_factory=dict)
    files: Mapping[str, SideFile | None] = field(default_factory=dict)
    report: AlignmentReport | None = None
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class Inputs:
    """The different models of a recipe, the base first."""

    models: list[Checkpoint]
    labels: list[str]
    tables: list[Tables]
    #: the recipe's positions (models, then the base) in this order
    positions: list[int]

    def views(self, views: Sequence[Checkpoint], base: bool) -> tuple[tuple[Checkpoint, ...], Checkpoint | None]:
        ordered = [views[number] for number in self.positions]
        return (tuple(ordered[:-1]), ordered[-1]) if base else (tuple(ordered), None)


def inputs_of(models: Sequence[Checkpoint], base: Checkpoint | None, labels: Sequence[str] | None) -> Inputs:
    given = [*models, *([base] if base is not None else [])]
    names = list(labels) if labels is not None else [label_of(model) for model in given]
    order = [len(given) - 1, *range(len(given) - 1)] if base is not None else list(range(len(given)))
    found: list[Checkpoint] = []
    titles: list[str] = []
    positions = [0] * len(given)
    for place in order:
        known = next((number for number, model in enumerate(found) if model is given[place]), None)
        if known is None:
            found.append(given[place])
            titles.append(names[place])
        positions[place] = len(found) - 1 if known is None else known
    return Inputs(found, titles, [tables_of(model) for model in found], positions)


def views_of(inputs: Inputs, plans: Sequence[RowPlan], rows: int, widen: bool) -> list[Checkpoint]:
    others = with_heads(inputs.models, inputs.tables)
    views: list[Checkpoint] = []
    faults: list[str] = []
    for model, label, tables, plan in zip(inputs.models, inputs.labels, inputs.tables, plans, strict=True):
        if plan.is_own(tables.rows):
            views.append(model)
            continue
        needed = sorted({position for part in plan.parts for position, _ in part})
        for name in tables.names:
            info = model.info(name)
            if info.dtype not in FLOATING:
                faults.append(f"{label}: '{name}' is {info.dtype}; rows can be moved in floating tables only. Convert the model first.")
            for position in needed:
                other = others[position]
                theirs = other.info(name).shape if name in set(other.names()) else None
                if theirs is None:
                    faults.append(f"{inputs.labels[position]}: has no tensor '{name}', from which rows of {label} would be taken.")
                elif theirs[1:] != info.shape[1:] and not lies_flat(name):
                    faults.append(
                        f"'{name}' has rows of {theirs[-1]} numbers in {inputs.labels[position]} and of {info.shape[-1]} in {label}."
                    )
        views.append(
            RevocabularyCheckpoint(model, tables.names, plan, others, config=rows_update(model.config, rows, tables.rows), widen=widen)
        )
    if faults:
        raise MergeError("\n".join(faults))
    return views


def files_update(donor: Checkpoint, files: Mapping[str, SideFile]) -> dict[str, SideFile | None]:
    """What must change about the donor's side files, for the output to have these tokenizer files."""
    gone: dict[str, SideFile | None] = {name: None for name in donor.files if name in TOKENIZER_FILES and name not in files}
    return {**gone, **{name: file for name, file in files.items() if donor.files.get(name) != file}}


def side_json(value: Any) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()
