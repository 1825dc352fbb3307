"""Threads that answer requests, so that the event loop stays free."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress
from queue import SimpleQueue
from threading import Thread
from typing import Any

_Task = tuple[Callable[[Any], Any], Any, asyncio.AbstractEventLoop, "asyncio.Future[Any]"]


class Workers:
    """A few threads; each does one call at a time, in the order in which they were asked for.

    ``ThreadPoolExecutor`` does the same, with two futures to a call and their locks. That costs a
    tenth of a millisecond more, next to three of a small model's whole answer.
    """

    def __init__(self, count: int) -> None:
        self._tasks: SimpleQueue[_Task | None] = SimpleQueue()
        self._threads = [
            Thread(target=_work, args=(self._tasks,), name=f"predict-{i}", daemon=True)
            for i in range(count)
        ]
        self._started = False

    async def do(self, function: Callable[[Any], Any], argument: Any) -> Any:
        """What the call returns or raises."""
        if not self._started:
            self._started = True
            for thread in self._threads:
                thread.start()
        loop = asyncio.get_running_loop()
        told = loop.create_future()
        self._tasks.put((function, argument, loop, told))
        return await told

    def close(self) -> None:
        """End the threads once they have done what they were asked for."""
        if self._started:
            self._end()
            for thread in self._threads:
                thread.join()

    def __del__(self) -> None:
        self._end()

    def _end(self) -> None:
        for _ in self._threads:
            self._tasks.put(None)


def _work(tasks: SimpleQueue[_Task | None]) -> None:
    """A thread's life. It knows its tasks alone: whoever asks may be gone before it is."""
    while (task := tasks.get()) is not None:
        function, argument, loop, told = task
        found, fault = None, None
        try:
            found = function(argument)
        except BaseException as error:  # it is raised where it was asked for
            fault = error
        with suppress(RuntimeError):  # the loop was closed meanwhile
            loop.call_soon_threadsafe(_tell, told, found, fault)
        del task, argument, found, fault  # nothing of a request stays until the next one


def _tell(told: asyncio.Future[Any], found: Any, fault: BaseException | None) -> None:
    if told.done():  # cancelled: nobody waits for it
        return
    if fault is None:
        told.set_result(found)
    else:
        told.set_exception(fault)
