"""What a long run shows while it works: the step, the state of the search, and the items scored so far."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
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
#: seconds after which a log that is no terminal says again where a search stands
_SILENCE = 30.0


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
def search_progress(limits: Mapping[str, float | None], *, quiet: bool) -> Iterator[Callable[[str, dict[str, Any]], None]]:
    """A listener for a search: best so far, items used and expected end by the `limits` (candidates, items, seconds).

    A live line on a terminal; elsewhere a line per new best, and one whenever there was none for half a minute.
    """
    from modelglue.cli.console import stderr

    console = stderr()
    if quiet:
        yield lambda _event, _fields: None
    elif console.is_terminal:
        with console.status("starting") as status:
            yield SearchListener(console, limits, status.update)
    else:
        yield SearchListener(console, limits, None)


class SearchListener:
    """Turns a search's events into lines."""

    def __init__(
        self, console: Console, limits: Mapping[str, float | None], update: Callable[[str], None] | None,
        now: Callable[[], float] = time.monotonic,
    ) -> None:  # fmt: skip
        self._console, self._limits, self._update, self._now = console, limits, update, now
        self._state: dict[str, Any] = {"best": None, "best_candidate": None, "candidates": 0, "items": 0, "seconds": 0.0}
        self._since = 0
        self._best: float | None = None
        self._told = self._printed = now()
        self._stage = "search"

    def __call__(self, event: str, fields: dict[str, Any]) -> None:
        if event == "told":
            self._state, self._since, self._told = fields, 0, self._now()
            new = fields["best"] is not None and (self._best is None or fields["best"] > self._best)
            self._best = fields["best"]
            self._say(print_it=new)
        elif event == "scored" and fields["split"] == "search":
            self._since += fields["items"]
            self._say()
        elif event in ("scored", "test") and self._stage != (stage := fields.get("split", event)):
            self._stage = stage
            self._print("scoring the best again, on items that the search has not seen" if stage == "confirm" else _STEPS["test"])

    def _say(self, *, print_it: bool = False) -> None:
        """The line as it is now, batches that are still under way included."""
        seconds = self._state["seconds"] + self._now() - self._told
        line = search_line({**self._state, "items": self._state["items"] + self._since, "seconds": seconds}, self._limits)
        if self._update is not None:
            self._update(line)
        if print_it or (self._update is None and self._now() - self._printed >= _SILENCE):
            self._print(line)

    def _print(self, line: str) -> None:
        self._printed = self._now()
        self._console.print(line, markup=False, soft_wrap=True)


def search_line(fields: Mapping[str, Any], limits: Mapping[str, float | None]) -> str:
    """Where a search stands, in one line."""
    best = "no score yet" if fields["best"] is None else f"best {100 * fields['best']:.1f} % (candidate {fields['best_candidate']})"
    parts = [best, f"{fields['candidates']:,} candidates", f"{fields['items']:,} items", clock(fields["seconds"])]
    done = [fields[name] / most for name, most in limits.items() if most and name in ("candidates", "items", "seconds")]
    if done and 0 < max(done) < 1:
        parts.append(f"about {clock(fields['seconds'] * (1 / max(done) - 1))} left")
    return ", ".join(parts)


def clock(seconds: float) -> str:
    hours, rest = divmod(int(seconds), 3600)
    minutes, left = divmod(rest, 60)
    return f"{hours}:{minutes:02d}:{left:02d}" if hours else f"{minutes}:{left:02d}"
