"""Flower's side of the server: one message per node and round, and an engine on top.

Flower carries messages and nothing else: who trains is planned before, what comes back is checked
after, and polling is our own (Flower's waits 0.1 s in memory and 3 s over HTTP).
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from flwr.app import ConfigRecord, Message
from flwr.serverapp import Grid

from fedtl.engines.exchange import (
    SMALL_REPLY,
    Answer,
    Correspondence,
    Late,
    Letter,
    Request,
    Traffic,
)
from fedtl.engines.flower_client import SIMULATION, read_message, write_record
from fedtl.engines.wire import MESSAGE_TYPES
from fedtl.errors import EnvironmentFault, InputError

OVERDUE_SECONDS = 3600.0
"""How long an answer that missed its deadline is still looked for, so that it can be told."""


class FlowerExchange:
    """Questions and answers over a Flower grid.

    Args:
        grid: of a running ServerApp, in memory or over HTTP; None until ``connect``.
        names: approved public key -> its name; nodes with other keys are nobody. None in
            simulation, where there are no keys.
        sign: see Correspondence.
        poll_seconds: between looks for answers.
        late: told of answers that came after their deadline.
        trouble: looked at while waiting; says why nobody can answer any more, or None.
    """

    def __init__(
        self,
        grid: Grid | None = None,
        names: Mapping[bytes, str] | None = None,
        sign: Callable[[bytes], bytes] | None = None,
        *,
        poll_seconds: float = 0.01,
        late: Late = lambda node, kind, round: None,
        trouble: Callable[[], str | None] = lambda: None,
    ) -> None:
        self._now, self._approved, self._poll_seconds = grid, names, poll_seconds
        self._late, self._trouble = late, trouble
        self._simulation: Mapping[str, Any] | None = None
        self._correspondence = Correspondence(sign)
        self._names: dict[int, str] = {}
        self._overdue: dict[str, tuple[int, str, int, float]] = {}

    def connect(self, grid: Grid, simulation: Mapping[str, Any] | None = None) -> None:
        """Go on over another grid; what was sent over the old one is forgotten.

        ``simulation`` is what simulated nodes need to know besides, see flower_client.
        """
        self._now, self._simulation = grid, simulation
        self._overdue.clear()

    @property
    def _grid(self) -> Grid:
        assert self._now is not None, "the engine was not started"
        return self._now

    def nodes(self) -> Mapping[int, str]:
        """Nodes online now and the name of each one's key."""
        if self._approved is None:
            found = dict.fromkeys(self._grid.get_node_ids(), "")
        else:
            known = self._approved
            nodes = self._grid.get_nodes()
            found = {n.node_id: known[n.public_key] for n in nodes if n.public_key in known}
        self._names.update(found)
        return found

    def ask(
        self,
        kind: str,
        requests: Mapping[int, Request],
        deadline_seconds: float | None = None,
        *,
        max_bytes: int = SMALL_REPLY,
    ) -> Iterator[tuple[int, Answer]]:
        """See Exchange. A node that Flower reports as failed gives an answer that is ``lost``."""
        until = float("inf") if deadline_seconds is None else time.monotonic() + deadline_seconds
        pending: dict[str, tuple[int, Letter]] = {}
        try:
            for node, request in requests.items():
                letter = self._correspondence.seal(kind, node, self._names.get(node, ""), request)
                if message_id := self._push(kind, node, letter):
                    pending[message_id] = node, letter
                else:
                    yield node, _lost("Flower did not take the message")
            while pending and time.monotonic() < until:
                for message in self._pull(pending):
                    node, letter = pending.pop(message.metadata.reply_to_message_id)
                    yield node, self._opened(kind, node, letter, message, max_bytes)
                if pending and (trouble := self._trouble()):
                    for node, _ in pending.values():
                        yield node, Answer({}, {}, 0, trouble, EnvironmentFault.exit_code, True)
                    pending.clear()
                if pending:
                    time.sleep(self._poll_seconds)
        finally:  # also where the asker has enough and listens no longer
            now = time.monotonic()
            for message_id, (node, letter) in pending.items():
                self._overdue[message_id] = node, kind, letter.echo["round"], now

    def traffic(self) -> Mapping[tuple[int, str], Traffic]:
        """See Exchange."""
        return self._correspondence.traffic()

    def _push(self, kind: str, node: int, letter: Letter) -> str | None:
        """The message's id, or None where Flower did not take it."""
        content = write_record(letter.content, letter.signature)
        if self._simulation is not None:
            content[SIMULATION] = ConfigRecord(dict(self._simulation))
        group = str(letter.echo["round"])
        message = Message(content, node, MESSAGE_TYPES[kind], group_id=group)
        taken = list(self._grid.push_messages([message]))
        return taken[0] if taken else None

    def _pull(self, pending: Mapping[str, object]) -> list[Message]:
        """Replies to what is pending; those to what is overdue are told and dropped."""
        now, replies = time.monotonic(), []
        self._overdue = {
            message_id: entry
            for message_id, entry in self._overdue.items()
            if now - entry[3] < OVERDUE_SECONDS
        }
        for message in self._grid.pull_messages([*pending, *self._overdue]):
            asked = message.metadata.reply_to_message_id
            if asked in pending:
                replies.append(message)
            elif entry := self._overdue.pop(asked, None):
                node, kind, round, _ = entry
                if message.has_content():
                    self._late(node, kind, round)
        return replies

    def _opened(
        self, kind: str, node: int, letter: Letter, message: Message, max_bytes: int
    ) -> Answer:
        if message.has_error():
            return _lost(_reason(str(message.error.reason)))
        try:
            reply, _ = read_message(message)
        except InputError as error:
            return Answer({}, {}, 0, f"its reply was refused: {error.line()}")
        return self._correspondence.open(kind, node, letter, reply, max_bytes)


def _lost(reason: str) -> Answer:
    return Answer({}, {}, 0, reason, lost=True)


def _reason(text: str) -> str:
    """Flower's words for a failed message in one line; where it gives an exception, its name."""
    if named := re.match(r"<class '(?:[\w.]*\.)?(\w+)", text):
        return f"its process failed with {named[1]}"
    if "Node Unavailable" in text:
        return "its node went away"
    return "Flower says: " + " ".join(text.split())[:300]
