"""What a long run shows while it works: the step, the state of the search, and the items scored so far."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

#: step of the recipe -> what it does
_STEPS = {
    "zoo": "hashing the models",
    "similarity": "comparing weights",
    "ranking": "scoring every model on the proxy items",
    "selection": "choosing members and coefficients",
    "writing": "writing the merged models",
    "mixture": "joining the experts with a router",
    "test": "scoring on items that no decision has seen",
}


@contextmanager
def glue_progress(*, quiet: bool) -> Iterator[Callable[[str, dict[str, Any]], None]]:
    """A listener for `glue`: a live line on a terminal, one line per step elsewhere; nothing when quiet. On standard error."""
    from modelglue.cli.console import stderr

    console = stderr()
    if quiet:
        yield lambda _event, _fields: None
    elif console.is_terminal:
        with console.status("starting") as status:
            yield _Listener(console, status.update)
    else:
        yield _Listener(console, None)


class _Listener:
    """Turns events into lines; a step's line is printed when the next one begins."""

    def __init__(self, console: Console, update: Callable[[str], None] | None) -> None:
        self._console, self._update = console, update
        self._begun = time.monotonic()
        self._items = 0
        self._text = ""

    def __call__(self, event: str, fields: dict[str, Any]) -> None:
        if event == "step":
            self._text = _STEPS.get(fields["name"], fields["name"])
            self._line(self._text)
        elif event == "families":
            sizes = [len(family["members"]) for family in fields["families"]]
            self._line(f"{len(sizes)} famil{'y' if len(sizes) == 1 else 'ies'} of {', '.join(map(str, sizes))}")
        elif event == "select" and fields["strategy"] is not None:
            verb = "takes in" if fields["accepted"] else "leaves out"
            self._line(f"{fields['strategy']} {fields['round']}/{fields['of']}: {verb} {fields['candidate']}, score {fields['score']:.4f}")
        elif event == "batch":
            self._items += int(fields["items"])
            if self._update is not None:
                self._update(f"{self._text} - {self._items:,} items scored, {self._elapsed()}")

    def _line(self, text: str) -> None:
        self._console.print(f"[dim]{self._elapsed():>7}[/]  {text}")

    def _elapsed(self) -> str:
        minutes, seconds = divmod(int(time.monotonic() - self._begun), 60)
        return f"{minutes}:{seconds:02d}"


@contextmanager
def search_progress(budget: dict[str, Any], *, quiet: bool) -> Iterator[Callable[[str, dict[str, Any]], None]]:
    """A listener for a search: best so far, items used and expected end; a live line on a terminal, a line per new best elsewhere."""
    from modelglue.cli.console import stderr

    console = stderr()
    if quiet:
        yield lambda _event, _fields: None
    elif console.is_terminal:
        with console.status("starting") as status:
            yield _SearchListener(console, budget, status.update)
    else:
        yield _SearchListener(console, budget, None)


class _SearchListener:
    """Turns a search's events into lines."""

    def __init__(self, console: Console, budget: dict[str, Any], update: Callable[[str], None] | None) -> None:
        self._console, self._budget, self._update = console, budget, update
        self._best: float | None = None

    def __call__(self, event: str, fields: dict[str, Any]) -> None:
        if event != "told":
            return
        line = search_line(fields, self._budget)
        if self._update is not None:
            self._update(line)
        if fields["best"] is not None and (self._best is None or fields["best"] > self._best):
            self._best = fields["best"]
            self._console.print(line, markup=False, soft_wrap=True)


def search_line(fields: dict[str, Any], budget: dict[str, Any]) -> str:
    """Where a search stands, in one line."""
    best = "no score yet" if fields["best"] is None else f"best {100 * fields['best']:.1f} % (candidate {fields['best_candidate']})"
    parts = [best, f"{fields['candidates']:,} candidates", f"{fields['items']:,} items", clock(fields["seconds"])]
    done = [fields[name] / most for name, most in budget.items() if most and name in ("candidates", "items", "seconds")]
    if done and 0 < max(done) < 1:
        parts.append(f"about {clock(fields['seconds'] * (1 / max(done) - 1))} left")
    return ", ".join(parts)


def clock(seconds: float) -> str:
    hours, rest = divmod(int(seconds), 3600)
    minutes, left = divmod(rest, 60)
    return f"{hours}:{minutes:02d}:{left:02d}" if hours else f"{minutes}:{left:02d}"
