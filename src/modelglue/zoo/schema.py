"""The zoo file: a list of models; everything else has a default."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from modelglue.recipe import Document, load_document, validate

if TYPE_CHECKING:
    from pathlib import Path

#: aliases become file names and keys of reports
_ALIAS = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")
_WORDS = Annotated[list[Annotated[str, Field(min_length=1)]], Field()]


class Entry(BaseModel):
    """Frozen; an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Prompts(Entry):
    """A few texts that the router learns an expert from; the negative ones are subtracted."""

    positive: _WORDS = []
    negative: _WORDS = []


class ZooModel(Entry):
    """One model of the zoo."""

    id: Annotated[str, Field(min_length=1)]
    """Local folder (relative to the zoo file) or hub id."""
    alias: str = ""
    """Short unique name; default: the last part of `id`."""
    revision: str | None = None
    adapter: str | None = None
    """LoRA adapter that is folded into the model when it is read: a local folder (relative to the zoo file) or hub id."""
    dtype: Literal["float32", "float16", "bfloat16"] | None = None
    """Storage dtype; default: as stored."""
    domain: _WORDS = []
    """Free tags; they choose default prompts for the router."""
    prompts: Prompts | None = None
    prompts_from: str | None = None
    """A text file (relative to the zoo file) with one more positive prompt on every line."""
    scores: dict[str, Annotated[float, Field(allow_inf_nan=False)]] = {}
    """Known scores by task, as information."""

    @property
    def reference(self) -> str:
        """What opens the model: id[@revision][+adapter]."""
        model = f"{self.id}@{self.revision}" if self.revision else self.id
        return f"{model}+{self.adapter}" if self.adapter else model

    @model_validator(mode="before")
    @classmethod
    def _default_alias(cls, value: Any) -> Any:
        if isinstance(value, Mapping) and not value.get("alias") and isinstance(value.get("id"), str):
            last = value["id"].rstrip("/").rpartition("/")[2]
            return {**value, "alias": last.partition("@")[0]}
        return value

    @model_validator(mode="after")
    def _alias_is_a_name(self) -> ZooModel:
        if not _ALIAS.fullmatch(self.alias):
            raise ValueError(
                f"alias '{self.alias}' (of id '{self.id}') is no name; allowed are letters, digits and ._- . Give the model an alias"
            )
        return self


class Zoo(Entry):
    """The models, in the order in which every list and matrix of a run names them."""

    name: Annotated[str, Field(min_length=1)] = "zoo"
    base: str | None = None
    """The common ancestor, needed by task-vector methods and by `delta` similarity only."""
    models: Annotated[list[ZooModel], Field(min_length=1)]

    @field_validator("models")
    @classmethod
    def _aliases_are_unique(cls, models: list[ZooModel]) -> list[ZooModel]:
        first: dict[str, ZooModel] = {}
        for model in models:
            other = first.setdefault(model.alias, model)
            if other is not model:
                raise ValueError(
                    f"two models have the alias '{model.alias}' (ids '{other.id}' and '{model.id}'). Give one of them another alias"
                )
        return models


class ZooFile(Entry):
    """A file that holds a zoo and nothing else."""

    format: Literal["modelglue/1"] = "modelglue/1"
    zoo: Zoo


def read_zoo(source: str | Path | Mapping[str, Any]) -> Zoo:
    """The zoo of a zoo file, or of a glue file (whose other groups are then not looked at).

    RecipeError lists every fault with file and line. Reads no model.
    """
    document = load_document(source)
    if isinstance(document.value, dict) and "tasks" in document.value:  # a glue file
        kept = {key: value for key, value in document.value.items() if key in ZooFile.model_fields}
        document = _with_value(document, kept)
    return validate(document, ZooFile).zoo


def _with_value(document: Document, value: Any) -> Document:
    document.value = value
    return document
