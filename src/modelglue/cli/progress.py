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
