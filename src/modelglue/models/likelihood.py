"""Log probabilities of continuations: every context is read once, whatever the number of its continuations."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from modelglue.models.cached import BATCH_POSITIONS, MAX_ROWS, CachedModel, Past

if TYPE_CHECKING:
    import torch

#: logits that one forward pass may leave behind
_LOGIT_ELEMENTS = 2**28
#: log probabilities that are held in float32 at a time
_SCORED_ELEMENTS = 2**24


@dataclass(frozen=True)
class Row:
    """Ids of a context (at least one) and its continuation, and where the continuation starts."""

    ids: list[int]
    start: int


@dataclass(frozen=True)
class _Stem:
    """What one row of a forward pass reads, and the places of the rows that are scored with it.

    A row by itself is read whole, but for its last id, which is only predicted; of several rows, their context is read.
    """

    ids: list[int]
    places: list[int]


def score_rows(reader: CachedModel, rows: Sequence[Row], vocabulary: int) -> list[tuple[float, bool]]:
    """(sum of the log probabilities of a row's continuation, is every id of it the most probable one) for each row.

    Memory: one batch of at most BATCH_POSITIONS positions, and its logits where they are scored.
    """
    tally = _Tally([0.0] * len(rows), [True] * len(rows))
    longest = max((len(row.ids) for row in rows), default=0)
    if not reader.routes_prompts:
        _score(reader, rows, _stems(rows, share=longest <= reader.shareable), vocabulary, tally)
        return list(zip(tally.totals, tally.greedy, strict=True))
    # What a prompt decides must not depend on what is scored behind it; a row that begins with its continuation has no prompt.
    stems = _stems(rows, share=True, apart=True)
    for prompts in (True, False):
        part = [stem for stem in stems if _has_prompt(rows[stem.places[0]]) == prompts]
        _score(reader, rows, part, vocabulary, tally, prompts=prompts)
    return list(zip(tally.totals, tally.greedy, strict=True))


def _score(
    reader: CachedModel, rows: Sequence[Row], stems: Sequence[_Stem], vocabulary: int, tally: _Tally, *, prompts: bool = True
) -> None:
    longest = max((len(rows[place].ids) for stem in stems for place in stem.places), default=0)
    shared, past = reader.shared([stem.ids[: rows[stem.places[0]].start - 1] for stem in stems], longest)
    positions = min(BATCH_POSITIONS, _LOGIT_ELEMENTS // vocabulary)
    for batch in reader.batches([len(stem.ids) for stem in stems], positions):
        chosen = [stems[number] for number in batch]
        heads = [
            (i, place, rows[place].ids[rows[place].start : len(stem.ids) + 1]) for i, stem in enumerate(chosen) for place in stem.places
        ]
        before = None if past is None else past.rows([0] * len(chosen))
        logits, after = reader.read([stem.ids[shared:] for stem in chosen], before, keep=_longest(heads), prompts=prompts)
        tally.add(logits, heads)
        ahead = {place: rows[place].start + len(head) for _, place, head in heads}
        for tails in _together(chosen, [{place for place in stem.places if ahead[place] < len(rows[place].ids)} for stem in chosen]):
            for part in reader.batches([len(rows[place].ids) for _, place in tails], positions):
                _score_tails(reader, [tails[i] for i in part], rows, after, tally)


def _together(stems: Sequence[_Stem], open_: Sequence[set[int]]) -> Iterator[list[tuple[int, int]]]:
    """(number of the stem, place) of the continuations that are to be read on, as many at a time as a batch takes.

    The first ones of all stems, then the second ones: where a batch is one of each stem, nothing that was read has to be copied for it.
    """
    group: list[tuple[int, int]] = []
    for rank in range(max((len(stem.places) for stem in stems), default=0)):
        ranked = [(number, stem.places[rank]) for number, stem in enumerate(stems) if rank < len(stem.places)]
        ranked = [(number, place) for number, place in ranked if place in open_[number]]
        if group and len(group) + len(ranked) > MAX_ROWS:
            yield group
            group = []
        group += ranked
    if group:
        yield group


def _score_tails(reader: CachedModel, tails: Sequence[tuple[int, int]], rows: Sequence[Row], past: Past, tally: _Tally) -> None:
    """The rest of continuations whose first id their context has predicted."""
    targets = [(number, place, rows[place].ids[rows[place].start + 1 :]) for number, (_, place) in enumerate(tails)]
    pieces = [rows[place].ids[rows[place].start : -1] for _, place in tails]
    logits, _ = reader.read(pieces, past.rows([row for row, _ in tails]), keep=_longest(targets))
    tally.add(logits, targets)


@dataclass(frozen=True)
class _Tally:
    """Running sums by the row's place."""

    totals: list[float]
    greedy: list[bool]

    def add(self, logits: torch.Tensor, targets: Sequence[tuple[int, int, Sequence[int]]]) -> None:
        """Count (row of the batch, place, ids) in: the logits [B, K, V] at the last positions predict the ids."""
        import torch

        width = logits.shape[1]
        places = [place for _, place, ids in targets for _ in ids]
        where = torch.tensor([row * width + width - i for row, _, ids in targets for i in range(len(ids), 0, -1)], device=logits.device)
        wanted = torch.tensor([target for _, _, ids in targets for target in ids], device=logits.device)
        flat = logits.flatten(0, 1)
        step = max(_SCORED_ELEMENTS // logits.shape[-1], 1)
        for start in range(0, len(places), step):
            target = wanted[start : start + step]
            scored = flat[where[start : start + step]].float().log_softmax(dim=-1)  # [cells, V]
            values = scored.gather(1, target[:, None])[:, 0].tolist()
            best = (scored.argmax(dim=-1) == target).tolist()
            for place, value, is_best in zip(places[start : start + step], values, best, strict=True):
                self.totals[place] += value
                self.greedy[place] &= is_best


def _stems(rows: Sequence[Row], *, share: bool, apart: bool = False) -> list[_Stem]:
    """What has to be read to score the rows; rows without a continuation need nothing. `apart`: prompts are read by themselves."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for place, row in enumerate(rows):
        if row.start < len(row.ids):
            alone = not share or (apart and not _has_prompt(row))
            groups.setdefault((place,) if alone else tuple(row.ids[: row.start]), []).append(place)
    stems = []
    for places in groups.values():
        row = rows[places[0]]
        whole = len(places) == 1 and not (apart and _has_prompt(row))
        stems.append(_Stem(row.ids[:-1] if whole else row.ids[: row.start], places))
    return stems


def _has_prompt(row: Row) -> bool:
    """Whether anything stands before the continuation but the id that begins every text."""
    return row.start > 1


def _longest(targets: Sequence[tuple[int, int, Sequence[int]]]) -> int:
    return max(len(ids) for _, _, ids in targets)
