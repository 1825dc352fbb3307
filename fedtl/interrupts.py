"""Ctrl-C and SIGTERM: the first asks for a stop at the next commit, the second stops at once."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType, TracebackType
from typing import Any

from fedtl.errors import Interrupted


class Interrupts:
    """Context in which SIGINT and SIGTERM are remembered instead of raised.

    ``check()`` is called where stopping is safe. Off the main thread (in a notebook's worker, say)
    signals cannot be caught and the context does nothing.
    """

    def __init__(self) -> None:
        self.hint: str | None = None  # what to type after a stop, once that is known
        self._received: int | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Interrupts:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._remember)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        if self._received is not None:
            raise Interrupted(
                "stopped at once; the last commit is valid", exit_code=128 + number, do=self.hint
            )
        self._received = number
        os.write(2, b"\nstopping when this step is done; once more stops at once\n")

    def check(self, what: str = "interrupted", do: str | None = None) -> None:
        """Raise Interrupted if a signal came since the context was entered."""
        if self._received is not None:
            raise Interrupted(what, exit_code=128 + self._received, do=do or self.hint)
