"""What a recipe may ask of the output's vocabulary."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from modelglue.errors import RecipeError


@dataclass(frozen=True)
class FromModel:
    """The row that the model at this position has for the same token."""

    model: int


@dataclass(frozen=True)
class FromToken:
    """The row that the model at this position has for another token, named by its string or by its id (exactly one of them)."""

    model: int
    token: str | None = None
    token_id: int | None = None

    def __post_init__(self) -> None:
        if (self.token is None) == (self.token_id is None):
            raise RecipeError("a source of kind model_token needs exactly one of token and token_id.")
        if self.token_id is not None and self.token_id < 0:
            raise RecipeError(f"token_id is {self.token_id}; allowed are whole numbers from 0.")


@dataclass(frozen=True)
class Zero:
    """A row of zeros."""


@dataclass(frozen=True)
class TokenPolicy:
    """Which row stands in for a token where a model lacks it; with `force`, in every model. No source means: found automatically."""

    source: FromModel | FromToken | Zero | None = None
    force: bool = False


@dataclass(frozen=True)
class VocabularyRequest:
    """The tokenizer section of a recipe, its models named by positions.

    `source`: "base", "union", or the position of the model whose vocabulary the output takes (the number of models means the base).
    Keys of `tokens` that no vocabulary has are appended. Rows are rounded up to a multiple of `pad_to_multiple_of`.
    """

    source: str | int = "union"
    tokens: Mapping[str, TokenPolicy] = field(default_factory=dict)
    pad_to_multiple_of: int | None = None

    def __post_init__(self) -> None:
        if isinstance(self.source, str) and self.source not in ("base", "union"):
            raise RecipeError(f"tokenizer source '{self.source}' is neither union nor base nor a model of the recipe.")
        if self.pad_to_multiple_of is not None and self.pad_to_multiple_of < 1:
            raise RecipeError(f"pad_to_multiple_of is {self.pad_to_multiple_of}; allowed are whole numbers from 1.")
