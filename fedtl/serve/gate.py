"""What bounds a server: bytes of bodies in memory, requests worked on, how many wait, how long."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass, field
from typing import Any


class Refused(Exception):
    """A request that is answered without being worked on.

    Args:
        status: HTTP's.
        what, allowed, do: as an error of ours has them.
        retry: seconds after which to try again; None: never.
    """

    def __init__(
        self,
        status: int,
        what: str,
        *,
        allowed: str | None = None,
        do: str | None = None,
        retry: int | None = None,
    ) -> None:
        self.status, self.what, self.allowed, self.do, self.retry = status, what, allowed, do, retry
        super().__init__(what)


class HungUp(Exception):
    """The other side went away before its request was whole: nobody is there to be answered."""


@dataclass
class Gate:
    """Lets in as much as there is room for; the rest waits in the order in which it came.

    Attributes:
        room: how much is inside at once: requests, or bytes.
        waiting: requests that may wait; what comes beyond is told to come again.
        patience: seconds that one waits at most.
        used: how much is inside, never more than ``room``.
    """

    room: int
    waiting: int = 2048
    patience: float = 30.0
    used: int = field(default=0, init=False)
    _queue: deque[tuple[int, asyncio.Future[None]]] = field(default_factory=deque, init=False)

    @property
    def waits(self) -> int:
        """How many wait."""
        return len(self._queue)

    async def enter(self, amount: int = 1) -> None:
        """Come in; whoever does leaves again by ``leave``.

        Raises:
            Refused: there was no room in time (503).
        """
        if not self._queue and self.used + amount <= self.room:
            self.used += amount
            return
        if len(self._queue) >= self.waiting:
            raise _busy()
        turn = asyncio.get_running_loop().create_future()
        self._queue.append((amount, turn))
        try:
            async with asyncio.timeout(self.patience):
                await turn
        except BaseException as error:  # in vain, or cancelled
            if turn.cancelled():
                self._let_in()  # one behind may need less
            else:  # let in at the same moment
                self.leave(amount)
            if isinstance(error, TimeoutError):
                raise _busy() from None
            raise

    def leave(self, amount: int = 1) -> None:
        """Give the room back."""
        self.used -= amount
        self._let_in()

    def _let_in(self) -> None:
        self._queue = deque(one for one in self._queue if not one[1].cancelled())
        while self._queue and self.used + self._queue[0][0] <= self.room:
            amount, turn = self._queue.popleft()
            self.used += amount
            turn.set_result(None)


def _busy() -> Refused:
    return Refused(503, "too many requests at once", do="Try again in a moment", retry=1)


def body_size(declared: str | None, limit: int) -> int:
    """Bytes to make room for: those that a request declares, or as many as it may have.

    Args:
        declared: the header Content-Length.

    Raises:
        Refused: it says itself that it is too long (413).
    """
    if declared is None or not declared.isdecimal():
        return limit
    if len(declared) > 18 or int(declared) > limit:
        raise _too_long(limit)
    return int(declared)


async def read_body(
    receive: Callable[[], Awaitable[MutableMapping[str, Any]]], size: int, seconds: float
) -> bytes:
    """A request's body, never more than ``size`` bytes of it.

    Args:
        receive: ASGI's.

    Raises:
        Refused: more comes (413), or it comes too slowly (408).
        HungUp: the other side is gone.
    """
    parts, left, more = [], size, True
    try:
        async with asyncio.timeout(seconds):
            while more:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise HungUp
                part: bytes = message.get("body", b"")
                left -= len(part)
                if left < 0:
                    raise _too_long(size)
                parts.append(part)
                more = message.get("more_body", False)
    except TimeoutError:
        raise Refused(408, "the request came too slowly", allowed=f"{seconds:g} seconds") from None
    return parts[0] if len(parts) == 1 else b"".join(parts)


def _too_long(limit: int) -> Refused:
    return Refused(413, "the request is too long", allowed=f"at most {limit / 2**20:g} MiB")
