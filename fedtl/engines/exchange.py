"""Questions and answers between the server and its nodes, whatever carries them.

Every request names the protocol, the run, the round, its addressee and a nonce; an answer that does
not repeat them is refused, so a stale answer, one of another run and a replay count for nothing.
"""

from __future__ import annotations

import secrets
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from fedtl.engines.wire import PROTOCOL, Tensors, pack, unpack
from fedtl.errors import FedtlError

SMALL_REPLY = 2**20
"""Bytes of a reply from which no tensors of any size are expected."""

ECHOED = ("protocol", "run", "round", "nonce")
"""Facts of a request that its answer repeats."""

Facts = Mapping[str, Any]
"""JSON values by name."""

Request = tuple[Facts, Tensors]
"""Facts and tensors for one node."""

Late = Callable[[int, str, int], None]
"""Told (node, kind, round) of an answer that came after its deadline; it is not used."""


@dataclass(frozen=True)
class Answer:
    """What one node said.

    Attributes:
        facts: without the echoed ones; empty where ``error`` says why.
        num_bytes: of the reply as it travelled.
        error: why there is no usable answer: the node's own words, or what is wrong with its reply.
        exit_code: the kind of the node's error (``fedtl.errors``), 0 where there is none.
        lost: the node did not answer itself: its process died, or it is gone; with an exit code,
            no node can answer any more.
    """

    facts: Mapping[str, Any]
    tensors: Tensors
    num_bytes: int
    error: str | None = None
    exit_code: int = 0
    lost: bool = False


class Exchange(Protocol):
    """Asks nodes; each engine and the gathering of clients talk through one."""

    def nodes(self) -> Mapping[int, str]:
        """Nodes online now -> the name of the approved key behind each ("" in simulation)."""
        ...

    def ask(
        self,
        kind: str,
        requests: Mapping[int, Request],
        deadline_seconds: float | None = None,
        *,
        max_bytes: int = SMALL_REPLY,
    ) -> Iterator[tuple[int, Answer]]:
        """One request to each node; answers as they come, at most one a node.

        Ends when all have answered or at the deadline (None: never); nodes that were silent have
        not been yielded. ``facts`` may hold ``round`` (else 0). A reply of more than ``max_bytes``
        is refused.
        """
        ...

    def traffic(self) -> Mapping[tuple[int, str], Traffic]:
        """What travelled so far, by (node, kind)."""
        ...


@dataclass(frozen=True)
class Traffic:
    """Bytes and messages between the server and one node."""

    sent: int
    received: int
    messages: int


@dataclass(frozen=True)
class Letter:
    """A request ready to travel, and what its answer must repeat."""

    content: bytes
    signature: bytes
    echo: Mapping[str, Any]


@dataclass
class Correspondence:
    """Seals requests, opens replies and counts both; what all exchanges share.

    Attributes:
        sign: gives the signature of a request's content; None where nodes ask for none.
        run: this federation's random id.
    """

    sign: Callable[[bytes], bytes] | None = None
    run: str = field(default_factory=lambda: secrets.token_hex(16))
    _sent: Counter[tuple[int, str]] = field(default_factory=Counter)
    _received: Counter[tuple[int, str]] = field(default_factory=Counter)
    _messages: Counter[tuple[int, str]] = field(default_factory=Counter)

    def seal(self, kind: str, node: int, name: str, request: Request) -> Letter:
        """The request to a node whose approved key has that name."""
        facts, tensors = request
        echo = {
            "protocol": PROTOCOL,
            "run": self.run,
            "round": int(facts.get("round", 0)),
            "nonce": secrets.token_hex(16),
        }
        content = pack({**facts, **echo, "kind": kind, "to": name}, tensors)
        self._sent[node, kind] += len(content)
        self._messages[node, kind] += 1
        return Letter(content, self.sign(content) if self.sign else b"", echo)

    def open(self, kind: str, node: int, letter: Letter, reply: bytes, max_bytes: int) -> Answer:
        """What a reply says, or why it is refused; never raises."""
        size = len(reply)
        self._received[node, kind] += size
        try:
            facts, tensors = unpack(reply, max_bytes)
        except FedtlError as error:
            return Answer({}, {}, size, f"its reply was refused: {error.line()}")
        for name in ECHOED:
            if facts.pop(name, None) != letter.echo[name]:
                return Answer({}, {}, size, f"its reply was refused: it answers another {name}")
        if "error" in facts:
            code = facts.get("exit_code")
            code = code if isinstance(code, int) else 1
            return Answer(facts, {}, size, str(facts["error"])[:500], code)
        return Answer(facts, tensors, size)

    def traffic(self) -> dict[tuple[int, str], Traffic]:
        """What travelled so far, by (node, kind)."""
        return {
            key: Traffic(self._sent[key], self._received[key], count)
            for key, count in self._messages.items()
        }


class Answering(Protocol):
    """What stands at the other end; ``node.Node`` is one."""

    def answer(self, kind: str, content: bytes, signature: bytes = b"") -> bytes:
        """The reply to a request."""
        ...


class LocalExchange:
    """Nodes in this process, asked one after the other: no Flower, no network.

    Args:
        nodes: what answers, by node id; a node whose ``answer`` gives b"" stays silent.
        names: the names of the nodes' approved keys; "" where not given.
        sign: see Correspondence.
    """

    def __init__(
        self,
        nodes: Mapping[int, Answering],
        names: Mapping[int, str] | None = None,
        sign: Callable[[bytes], bytes] | None = None,
    ) -> None:
        self._nodes, self._names = nodes, names or {}
        self._correspondence = Correspondence(sign)

    def nodes(self) -> Mapping[int, str]:
        """All of them are always online."""
        return {node: self._names.get(node, "") for node in self._nodes}

    def ask(
        self,
        kind: str,
        requests: Mapping[int, Request],
        deadline_seconds: float | None = None,
        *,
        max_bytes: int = SMALL_REPLY,
    ) -> Iterator[tuple[int, Answer]]:
        """The answers in the order of the requests; a node that is not there is silent."""
        for node, request in requests.items():
            if node not in self._nodes:
                continue
            letter = self._correspondence.seal(kind, node, self._names.get(node, ""), request)
            reply = self._nodes[node].answer(kind, letter.content, letter.signature)
            if reply:
                yield node, self._correspondence.open(kind, node, letter, reply, max_bytes)

    def traffic(self) -> Mapping[tuple[int, str], Traffic]:
        """What would have travelled, by (node, kind)."""
        return self._correspondence.traffic()
