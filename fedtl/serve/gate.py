"""What bounds a server: how many requests are worked on, how many wait, and how long a body is."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field


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


@dataclass
class Gate:
    """Lets so many requests in at once; a few more wait outside, with their bodies unread.

    Attributes:
        places: requests worked on: each may hold its body and a decoded picture in memory.
        waiting: requests that may wait for one; what comes beyond is told to come again.
        patience: seconds that one waits at most.
    """

    places: int = 8
    waiting: int = 2048
    patience: float = 30.0
    waits: int = 0
    _free: asyncio.Semaphore = field(init=False)

    def __post_init__(self) -> None:
        self._free = asyncio.Semaphore(self.places)

    @asynccontextmanager
    async def entered(self) -> AsyncIterator[None]:
        """A place. Raises Refused (503) where there is none in time."""
        if self.waits >= self.waiting:
            raise _busy()
        self.waits += 1
        try:
            async with asyncio.timeout(self.patience):
                await self._free.acquire()
        except TimeoutError:
            raise _busy() from None
        finally:
            self.waits -= 1
        try:
            yield
        finally:
            self._free.release()


def _busy() -> Refused:
    return Refused(503, "too many requests at once", do="Try again in a moment", retry=1)


async def read_body(
    stream: AsyncIterator[bytes], declared: str | None, limit: int, seconds: float
) -> bytes:
    """A request's body, never more than ``limit`` bytes of it.

    Args:
        stream: its pieces as they come.
        declared: the header Content-Length; what comes is counted all the same.

    Raises:
        Refused: too long (413), or too slow (408).
    """
    refuse_length(declared, limit)
    parts, size = [], 0
    try:
        async with asyncio.timeout(seconds):
            async for part in stream:
                size += len(part)
                if size > limit:
                    raise _too_long(limit)
                parts.append(part)
    except TimeoutError:
        raise Refused(408, "the request came too slowly", allowed=f"{seconds:g} seconds") from None
    return b"".join(parts)


def refuse_length(declared: str | None, limit: int) -> None:
    """Raise Refused (413) where a request says itself that it is too long."""
    if declared is not None and declared.isdigit() and int(declared) > limit:
        raise _too_long(limit)


def _too_long(limit: int) -> Refused:
    return Refused(413, "the request is too long", allowed=f"at most {limit / 2**20:g} MiB")
