"""The output's vocabulary, and which row every model contributes for every token of it."""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

from modelglue.checkpoint.vocabulary.request import FromModel, FromToken, VocabularyRequest, Zero
from modelglue.checkpoint.vocabulary.tokens import Vocabulary
from modelglue.checkpoint.vocabulary.view import FIRST_PART, MEAN, ZERO, RowPlan
from modelglue.errors import RecipeError, did_you_mean


@dataclass(frozen=True)
class OutputVocabulary:
    """Token -> id of the output, in the order of making; who brought each appended token (None: the recipe alone)."""

    ids: Mapping[str, int]
    appended: Mapping[str, int | None]
    #: ids that the vocabulary spans, before padding
    size: int
    #: rows of every table of the output
    rows: int


@dataclass(frozen=True)
class RowCounts:
    """What became of the rows of one model's tables. They add up to the output's rows."""

    #: the model's own row
    own: int = 0
    #: the row that the recipe names for the token, in place of a row that the model has (`force`) or lacks
    forced: int = 0
    policy: int = 0
    #: the row of the only model that has the token; the base's; the mean over all models that have it
    only: int = 0
    base: int = 0
    mean: int = 0
    #: no model has the token
    zero: int = 0
    #: rows without a token: the mean of the model's rows
    padding: int = 0

    def __str__(self) -> str:
        return ", ".join(f"{getattr(self, one.name):,} {_IN_WORDS[one.name]}" for one in fields(self) if getattr(self, one.name))


_IN_WORDS = {
    "own": "of its own", "forced": "forced by the recipe", "policy": "as the recipe says", "only": "of the only model that has the token",
    "base": "of the base", "mean": "means of the models that have the token", "zero": "zeros", "padding": "padding",
}  # fmt: skip


def output_vocabulary(vocabularies: Sequence[Vocabulary], request: VocabularyRequest, source: int) -> OutputVocabulary:
    """`vocabularies`: the base's, then the other models' in the order of the recipe; `source` is the one that keeps its ids.

    A union appends the tokens that are missing, model by model, in ascending order of their ids there; then come the recipe's own.
    """
    ids = dict(vocabularies[source].ids)
    size = max(ids.values(), default=-1) + 1
    appended: dict[str, int | None] = {}
    if request.source == "union":
        for number, other in enumerate(vocabularies):
            missing = [token for token in other.ids if token not in ids]
            for token in sorted(missing, key=lambda token: (other.ids[token], token)):
                ids[token] = size
                appended[token] = number
                size += 1
    for token in request.tokens:
        if token not in ids:
            ids[token] = size
            owners = [number for number, other in enumerate(vocabularies) if token in other.ids]
            appended[token] = owners[0] if owners else None
            size += 1
    multiple = request.pad_to_multiple_of or 1
    return OutputVocabulary(ids, appended, size, -(-size // multiple) * multiple)


def check_policies(vocabularies: Sequence[Vocabulary], limits: Sequence[int], request: VocabularyRequest, labels: Sequence[str],
                   positions: Sequence[int]) -> list[str]:  # fmt: skip
    """What is wrong with the recipe's sources of rows. `positions` translates the recipe's positions; `limits` are table rows."""
    faults = []
    for token, policy in request.tokens.items():
        source = policy.source
        if isinstance(source, FromModel | FromToken):
            number = positions[source.model]
            wanted = token if isinstance(source, FromModel) else source.token
            if wanted is not None and wanted not in vocabularies[number].ids:
                near = did_you_mean(wanted, [one for one in vocabularies[number].ids if abs(len(one) - len(wanted)) < 3])
                faults.append(f"tokens: '{token}' takes the row of '{wanted}' in {labels[number]}, which has no such token.{near}")
            if isinstance(source, FromToken) and source.token_id is not None and source.token_id >= limits[number]:
                faults.append(
                    f"tokens: '{token}' takes row {source.token_id} of {labels[number]}, which has rows 0 to {limits[number] - 1}."
                )
    return faults


def row_plans(
    vocabularies: Sequence[Vocabulary], output: OutputVocabulary, request: VocabularyRequest, positions: Sequence[int], *, based: bool
) -> list[tuple[RowPlan, RowCounts]]:
    """For each model, where the rows of its tables come from. Time O(models x tokens).

    A token's row is the recipe's if it is forced, else the model's own, else the token's default: what the recipe names, else
    the row of the only model that has it, else the base's, else the mean over the models that have it, else zeros. `based`: the
    first is a base; without one no model's row counts more than another's.
    """
    by_id: list[str | None] = [None] * output.rows
    for text, number in output.ids.items():
        by_id[number] = text  # of two strings with one id the later, an added token, is what text is read as
    defaults: dict[str, tuple[str, int | tuple[tuple[int, int], ...]]] = {}

    def default(token: str) -> tuple[str, int | tuple[tuple[int, int], ...]]:
        if token not in defaults:
            defaults[token] = _default(token, vocabularies, request, positions, based)
        return defaults[token]

    plans = []
    for own in vocabularies:
        taken = set(own.ids.values())
        limit = max(taken, default=-1) + 1
        rows, tokens = array("q", bytes(8 * output.rows)), bytearray(output.rows)
        parts: dict[tuple[tuple[int, int], ...], int] = {}
        counts: dict[str, int] = {}
        for number, token in enumerate(by_id):
            kind: str
            kind, row = "padding", MEAN
            if token is None:
                if number < limit and number not in taken:  # a hole that this model has as well
                    kind, row = "own", number
            else:
                tokens[number] = 1
                policy = request.tokens.get(token)
                forced = policy is not None and policy.force
                if token in own.ids and not forced:
                    kind, row = "own", own.ids[token]
                else:
                    kind, found = default(token)
                    kind = "forced" if forced else kind
                    row = found if isinstance(found, int) else FIRST_PART - parts.setdefault(found, len(parts))
            rows[number] = row
            counts[kind] = counts.get(kind, 0) + 1
        plans.append((RowPlan(rows, tuple(parts), tokens), RowCounts(**counts)))
    return [(_own_parts(plan, number), counts) for number, (plan, counts) in enumerate(plans)]


def kept_rows(rows: int) -> RowPlan:
    """The first `rows` rows as they are."""
    return RowPlan(array("q", range(rows)), (), bytearray(b"\1" * rows))


def _default(
    token: str, vocabularies: Sequence[Vocabulary], request: VocabularyRequest, positions: Sequence[int], based: bool
) -> tuple[str, int | tuple[tuple[int, int], ...]]:
    policy = request.tokens.get(token)
    source = policy.source if policy is not None else None
    if isinstance(source, Zero):
        return "policy", ZERO
    if isinstance(source, FromModel):
        number = positions[source.model]
        return "policy", ((number, vocabularies[number].ids[token]),)
    if isinstance(source, FromToken):
        number = positions[source.model]
        row = vocabularies[number].ids[source.token] if source.token is not None else source.token_id
        assert row is not None
        return "policy", ((number, row),)
    owners = tuple((number, vocabulary.ids[token]) for number, vocabulary in enumerate(vocabularies) if token in vocabulary.ids)
    if not owners:
        return "zero", ZERO
    if len(owners) == 1:
        return "only", owners
    if based and owners[0][0] == 0:
        return "base", owners[:1]
    return "mean", owners


def _own_parts(plan: RowPlan, number: int) -> RowPlan:
    """Rows that come from the model itself are its own rows."""
    rows = array("q", plan.rows)
    for place, row in enumerate(plan.rows):
        if row <= FIRST_PART:
            part = plan.parts[FIRST_PART - row]
            if len(part) == 1 and part[0][0] == number:
                rows[place] = part[0][1]
    return RowPlan(rows, plan.parts, plan.tokens)


def resolve(position: int, count: int) -> int:
    """A position of the recipe, checked."""
    if not 0 <= position < count:
        raise RecipeError(f"the tokenizer section names model {position}; the recipe has {count}.")
    return position
