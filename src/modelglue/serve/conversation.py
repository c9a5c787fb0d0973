"""The jobs of one HTTP request: their events in the order of arrival, and an end for them when the client goes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

from modelglue.serve.engine import Engine
from modelglue.serve.jobs import Ended, Event, Failed, Job

Receive = Callable[[], Awaitable[Any]]


class ClientGoneError(Exception):
    """Nobody reads the answer any more."""


class Conversation:
    """Submits jobs when it is made (BusyError where too many wait); `jobs` need no `deliver` of their own."""

    def __init__(self, engine: Engine, jobs: Sequence[Job]) -> None:
        self._engine = engine
        self._queue: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()
        loop = asyncio.get_running_loop()

        def to(number: int) -> Callable[[Event], None]:
            def deliver(event: Event) -> None:
                with suppress(RuntimeError):  # the loop has ended, and with it who would listen
                    loop.call_soon_threadsafe(self._queue.put_nowait, (number, event))

            return deliver

        self._jobs = [replace(job, deliver=to(number)) for number, job in enumerate(jobs)]
        self._choices = sum(job.choices for job in jobs)
        engine.submit(self._jobs)

    async def events(self, receive: Receive) -> AsyncGenerator[tuple[int, Event], None]:
        """(number of the job, event) until every choice has ended or one job has failed; ClientGoneError when the client has left.

        However the loop over it is left, the jobs are over then. Close it (`contextlib.aclosing`).
        """
        gone = asyncio.create_task(_disconnected(receive))
        try:
            left = self._choices
            while left:
                coming = asyncio.create_task(self._queue.get())
                await asyncio.wait({coming, gone}, return_when=asyncio.FIRST_COMPLETED)
                if not coming.done():
                    coming.cancel()
                    raise ClientGoneError
                number, event = coming.result()
                yield number, event
                if isinstance(event, Failed):
                    return
                left -= isinstance(event, Ended)
        finally:
            gone.cancel()
            self._engine.cancel(self._jobs)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
