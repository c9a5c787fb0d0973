"""Items through a model, in fixed batches: what the store has is not asked again, what is new is committed batch by batch."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from modelglue.evaluation.items import Item, Request
from modelglue.evaluation.store import ScoreStore
from modelglue.evaluation.tasks import TaskSet
from modelglue.recipe import Scores

if TYPE_CHECKING:
    from modelglue.models import TextModel

#: items that are scored and committed together; a killed run repeats at most one such batch
BATCH_ITEMS = 128

#: skill and number of items that have just been committed
BatchListener = Callable[[str, int], None]


def score_text_model(
    model: TextModel | Callable[[], TextModel],
    identity: str,
    tasks: TaskSet,
    store: ScoreStore,
    *,
    description: str = "",
    on_batch: BatchListener | None = None,
) -> Scores:
    """Scores of `model` (or of what the function `model` returns, called only if something is missing) on every item of `tasks`.

    `identity` must change whenever an answer of the model could: it is the key of the store. Batches are a function of the task set alone,
    so a resumed run batches as an undisturbed one. Items whose log probabilities are NaN count as 0 and are counted in a warning.
    Time: one pass over the items that the store does not have. Memory: the model and one batch.
    """
    live: TextModel | None = None
    values: dict[str, dict[str, float]] = {}
    warnings = []
    for skill, items in tasks.skills.items():
        known = store.known(identity, [item.key for item in items])
        for start in range(0, len(items), BATCH_ITEMS):
            missing = list({item.key: item for item in items[start : start + BATCH_ITEMS] if item.key not in known}.values())
            if not missing:
                continue
            if live is None:
                live = model() if callable(model) else model
            fresh = dict(zip([item.key for item in missing], answer(live, missing), strict=True))
            store.add(identity, description, fresh)
            known |= fresh
            if on_batch is not None:
                on_batch(skill, len(missing))
        bad = sum(math.isnan(known[item.key]) for item in items)
        if bad:
            warnings.append(f"{skill}: the model answers NaN on {bad} of {len(items)} items; they count as 0.")
        values[skill] = {item.id: 0.0 if math.isnan(known[item.key]) else known[item.key] for item in items}
    return Scores(values, tuple(warnings))


def answer(model: TextModel, items: Sequence[Item]) -> list[float]:
    """Ask the model every request of `items`, likelihoods together and generations of equal settings together, and mark the answers."""
    replies: list[list[object]] = [[None] * len(item.requests) for item in items]
    places = [(row, column) for row, item in enumerate(items) for column in range(len(item.requests))]
    pairs = [(row, column) for row, column in places if items[row].requests[column].generation is None]
    if pairs:
        found = model.loglikelihood([_pair(items[row].requests[column]) for row, column in pairs])
        for (row, column), reply in zip(pairs, found, strict=True):
            replies[row][column] = reply
    settings = dict.fromkeys(request.generation for item in items for request in item.requests if request.generation is not None)
    for setting in settings:
        group = [(row, column) for row, column in places if items[row].requests[column].generation == setting]
        prompts = [items[row].requests[column].context for row, column in group]
        written = model.generate(prompts, until=setting.until, max_new_tokens=setting.max_new_tokens)
        for (row, column), text in zip(group, written, strict=True):
            replies[row][column] = text
    return [item.mark(reply) for item, reply in zip(items, replies, strict=True)]


def _pair(request: Request) -> tuple[str, str]:
    return request.context, request.continuation
