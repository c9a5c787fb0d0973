"""What experts score on the items that a router learns from: evaluation's answers, in the words of the mixture's routers."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

from modelglue.checkpoint import Checkpoint
from modelglue.errors import RecipeError, UserError
from modelglue.evaluation import ScoreStore, TaskSet, evaluate
from modelglue.evaluation.scoring import BatchListener
from modelglue.mixture.levels import MixRouter
from modelglue.mixture.routing import ScoredItems
from modelglue.recipe import Document, Scores

#: shows the scoring of one expert on so many items
Progress = Callable[[str, int], AbstractContextManager[BatchListener | None]]


def scored_items(tasks: TaskSet, scores: Mapping[str, Scores]) -> ScoredItems:
    """What a router reads of every item, with the experts' scores on it."""
    return ScoredItems.of({skill: {item.id: item.context for item in items} for skill, items in tasks.skills.items()}, scores)


@dataclass
class RouterScores:
    """Scores the experts of a mixture's file on `router.tasks`: a `Scorer` for `prepare`.

    Scores are kept in `router.store` (default: `default`, a file that is made), item by item under the experts' contents: what a search, an
    evaluation or an earlier call has put there is not scored again, and a call that was killed goes on. `fresh` counts what was scored now.
    """

    default: Path
    progress: Progress | None = None
    fresh: int = 0

    def __call__(self, document: Document, router: MixRouter, experts: Mapping[str, Checkpoint], folder: Path | None) -> ScoredItems:
        home = folder or Path()
        include = None if router.include is None else home / router.include
        with _at(document, "tasks" if include is None or include.is_dir() else "include"):
            tasks = TaskSet.load(router.tasks, include)
            total = sum(map(len, tasks.skills.values()))
        with _at(document, "store" if router.store is not None else "tasks"):
            store = ScoreStore(self.default if router.store is None else home / router.store)
        with store:
            before = store.counts()[1]
            found = {}
            for name, expert in experts.items():
                with (self.progress or _silent)(name, total) as listener:
                    found[name] = evaluate(expert, tasks, store=store, on_batch=listener)
            self.fresh += store.counts()[1] - before
        return scored_items(tasks, found)


@contextlib.contextmanager
def _at(document: Document, key: str) -> Iterator[None]:
    """Errors inside are faults of `router.KEY`."""
    try:
        yield
    except UserError as error:
        raise RecipeError(document.fault(("router", key), str(error))) from error


@contextlib.contextmanager
def _silent(name: str, total: int) -> Iterator[None]:
    yield None
