"""Items through a model, in fixed batches: what the store has is not asked again, what is new is committed batch by batch."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from modelglue.evaluation.items import Item, Mark, Reply, Request
from modelglue.evaluation.store import ScoreStore
from modelglue.evaluation.tasks import TaskSet
from modelglue.recipe import Cost, Plan, Scores
from modelglue.settings import default_workers

if TYPE_CHECKING:
    from modelglue.models import TextModel

#: items that are scored and committed together; a killed run repeats at most one such batch
BATCH_ITEMS = 128
_DIGEST = 16

#: skill and number of items that have just been committed
BatchListener = Callable[[str, int], None]
#: the requests of some items, and the replies to them
Questions = Sequence[Sequence[Request]]
Answers = list[list[Reply]]


class Asked:
    """The items that a plan names, for one model: what is known of them, what is missing, and the outcome in the end.

    Batches are a function of the plan and the task set alone, so a resumed run batches as an undisturbed one, whoever the workers are.
    """

    def __init__(self, identity: str, tasks: TaskSet, store: ScoreStore, plan: Plan = Plan(), *, description: str = "") -> None:  # noqa: B008
        self._identity = identity
        self._store = store
        self._description = description
        self._started = time.perf_counter()
        self._computed = 0
        self.skills = tasks.chosen(plan.items)
        everything = [item for items in self.skills.values() for item in items]
        self._groups = list(self.skills.values()) if plan.items is None else [everything]
        self._known = store.known(identity, [item.key for item in everything])

    def missing(self) -> Iterator[list[Item]]:
        """Batches of items that have no mark yet, each item once.

        Everything is asked skill by skill; a few items of each skill are asked together, because small batches cost most.
        """
        for items in self._groups:
            for start in range(0, len(items), BATCH_ITEMS):
                batch = list({item.key: item for item in items[start : start + BATCH_ITEMS] if item.key not in self._known}.values())
                if batch:
                    yield batch

    def unscored(self, batch: Sequence[Item]) -> list[Item]:
        """Those of a batch that still have no mark: another process that shares the store may have scored some in the meantime."""
        found = self._store.known(self._identity, [item.key for item in batch])
        self._known |= found
        return [item for item in batch if item.key not in found]

    def add(self, marks: Mapping[str, Mark], on_batch: BatchListener | None = None) -> None:
        """Commit the marks of one batch, by the items' keys."""
        self._store.add(self._identity, self._description, marks)
        self._known |= marks
        self._computed += len(marks)
        if on_batch is not None:
            told: set[str] = set()
            for skill, items in self.skills.items():
                mine = {item.key for item in items if item.key in marks} - told
                told |= mine
                if mine:
                    on_batch(skill, len(mine))

    def scores(self, *, complete: bool = True) -> Scores:
        """The outcome; where it is not `complete`, of the items that have a mark."""
        values: dict[str, dict[str, float]] = {}
        losses: dict[str, dict[str, float]] = {}
        warnings, items_asked, tokens = [], 0, 0
        for skill, items in self.skills.items():
            marks = {item.id: self._known[item.key] for item in items if complete or item.key in self._known}
            bad = sum(math.isnan(mark.value) for mark in marks.values())
            if bad:
                warnings.append(f"{skill}: the model answers NaN on {bad} of {len(marks)} items; they count as 0.")
            values[skill] = {name: 0.0 if math.isnan(mark.value) else mark.value for name, mark in marks.items()}
            lost = {name: mark.loss for name, mark in marks.items() if mark.loss is not None}
            if lost:
                losses[skill] = lost
            items_asked += len(marks)
            tokens += sum(mark.tokens for mark in marks.values())
        cost = Cost(items_asked, tokens, self._computed, time.perf_counter() - self._started)
        return Scores(
            {skill: found for skill, found in values.items() if found or complete},
            tuple(warnings), "invalid" if warnings else "ok", losses, cost, warnings[0] if warnings else "",
        )  # fmt: skip


def score_text_model(
    model: TextModel | Callable[[], TextModel],
    identity: str,
    tasks: TaskSet,
    store: ScoreStore,
    *,
    plan: Plan = Plan(),  # noqa: B008 - immutable
    description: str = "",
    on_batch: BatchListener | None = None,
) -> Scores:
    """Scores of `model` (or of what the function `model` returns, called only if something is missing) on the items of `plan`.

    `identity` must change whenever an answer of the model could: it is the key of the store. Items whose log probabilities or logits are
    NaN count as 0, make the outcome `invalid` and are counted in a warning. Time: one pass over the items that the store does not have.
    Memory: the model and one batch.
    """
    asked = Asked(identity, tasks, store, plan, description=description)
    live: TextModel | None = None
    for missing in asked.missing():
        batch = asked.unscored(missing)
        if not batch:
            continue
        if live is None:
            live = model() if callable(model) else model
        asked.add(marks_of(batch, *answer(live, [item.requests for item in batch])), on_batch)
    return asked.scores()


def answer(model: TextModel, questions: Questions) -> tuple[Answers, list[int]]:
    """Ask the model every request of some items, likelihoods together and generations of equal settings together.

    Returns the replies in the order of the requests, and the token ids read and written for each item (0 if the model does not count).
    """
    replies: Answers = [[None] * len(requests) for requests in questions]
    tokens = [0] * len(questions)
    places = [(row, column) for row, requests in enumerate(questions) for column in range(len(requests))]

    def keep(group: Sequence[tuple[int, int]], found: Sequence[Reply]) -> None:
        spent = getattr(model, "tokens", None) or [0] * len(group)
        for (row, column), reply, count in zip(group, found, spent, strict=True):
            replies[row][column] = reply
            tokens[row] += count

    pairs = [(row, column) for row, column in places if questions[row][column].generation is None]
    if pairs:
        keep(pairs, model.loglikelihood([_pair(questions[row][column]) for row, column in pairs]))
    settings = dict.fromkeys(request.generation for requests in questions for request in requests if request.generation is not None)
    for setting in settings:
        group = [(row, column) for row, column in places if questions[row][column].generation == setting]
        prompts = [questions[row][column].context for row, column in group]
        keep(group, model.generate(prompts, until=setting.until, max_new_tokens=setting.max_new_tokens))
    return replies, tokens


def marks_of(items: Sequence[Item], replies: Answers, tokens: Sequence[int]) -> dict[str, Mark]:
    """Marks by the items' keys."""
    given_to = dict(zip([id(item) for item in items], replies, strict=True))
    marked = {id(item): item.mark(given_to[id(item)]) for item in items if not item.marker.concurrent}
    slow = [item for item in items if item.marker.concurrent]
    if slow:
        with ThreadPoolExecutor(default_workers()) as pool:
            marked |= zip([id(item) for item in slow], pool.map(lambda item: item.mark(given_to[id(item)]), slow), strict=True)
    found = {}
    for item, given, count in zip(items, replies, tokens, strict=True):
        value, loss = marked[id(item)]
        texts = [str(reply) for reply in given if isinstance(reply, str)]
        digest = hashlib.sha256("\0".join(texts).encode()).hexdigest()[:_DIGEST] if texts else None
        found[item.key] = Mark(value, loss, digest, count)
    return found


def _pair(request: Request) -> tuple[str, str]:
    return request.context, request.continuation
