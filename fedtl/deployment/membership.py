"""From a node that is online to a client that is ready: asked to join, given weights, prepared.

Each client goes its own way through these stages, several at a time; one that is restarted on the
way begins again behind whatever node it comes back as. What a client says is judged before it is
believed. Nothing here waits for ever: a client that makes no progress for its patience has failed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from fedtl.deployment.backbone_transfer import FILE, PIECE_BYTES, read_piece
from fedtl.deployment.class_table import Held
from fedtl.deployment.terms import refuse_other_version
from fedtl.engines.exchange import Answer, Exchange, Request
from fedtl.errors import FedtlError, InputError, SecurityRefusal, printable
from fedtl.transfer.backbones import Backbone

if TYPE_CHECKING:
    from fedtl.deployment.gathering import GatheringObserver

JOIN, WEIGHTS, PREPARE = "join", "weights", "prepare"

ASK_SECONDS = 30.0
"""For one answer; who is silent so long is asked again, until its patience is over."""

POLL_SECONDS = 0.5
"""Between two questions how far a client's features are."""

REPLY_BYTES = 2**22
"""Room for the names of many classes."""

JOINED = (
    "name", "classes", "numbered", "examples", "versions", "cpu", "device", "threads",
    "has_backbone", "free_disk_bytes",
)  # fmt: skip
READY = (
    "train", "test", "width", "domain", "left_out", "leaks", "way", "seconds", "fingerprint",
    "backbone",
)  # fmt: skip
"""What is kept of a client's answers; anything else it may say is dropped."""

MAX_NAME = 200
MAX_WIDTH = 65_536
MAX_EXAMPLES = 2**40


@dataclass
class Member:
    """A client on its way.

    Attributes:
        since: when it last made progress.
        joined, ready: what it said at the end of those stages.
        held: its classes, once it has joined.
        piece: of the weights, the next it wants.
        best: the furthest it came, in pieces and in examples.
        next_at: it is not asked before.
        gone: no node of its name is online.
        reading: it is here, and still reads its data.
    """

    name: str
    node: int
    since: float
    stage: str = JOIN
    joined: Mapping[str, Any] | None = None
    ready: Mapping[str, Any] | None = None
    held: Held = field(default_factory=lambda: Held(()))
    piece: int = 0
    sent: int = 0
    best: dict[str, int] = field(default_factory=dict)
    next_at: float = 0.0
    gone: bool = False
    reading: bool = False

    @property
    def facts(self) -> dict[str, Any]:
        """All it said."""
        return {**(self.joined or {}), **(self.ready or {})}


@dataclass
class Settling:
    """Takes members through the stages; see ``Gathering`` for most attributes.

    Attributes:
        terms: facts of the request to join.
        members: by name; changed in place.
        patience: seconds without progress after which a member has failed.
        limit: seconds after which whoever is not ready is left as it is; None for none.
    """

    exchange: Exchange
    terms: Mapping[str, Any]
    backbone: Backbone
    members: Mapping[str, Member]
    patience: float
    limit: float | None
    observer: GatheringObserver
    check: Callable[[], None]
    clock: Callable[[], float]
    sleep: Callable[[float], None]
    _failed: dict[str, str] = field(default_factory=dict)
    _order: Mapping[str, Any] = field(default_factory=dict)

    def join(self) -> dict[str, str]:
        """Ask all members to join, once; the reasons of those who cannot."""
        self._ask(JOIN, list(self.members.values()), self.patience)
        return self._failed

    def prepare(self, classes: Sequence[str], data_key: bytes) -> dict[str, str]:
        """Make all members ready; the reasons of those who failed."""
        self._order = {"classes": list(classes), "data_key": data_key.hex()}
        started = self.clock()
        for member in self.members.values():
            member.ready, member.since, member.next_at = None, started, started
        while pending := self._pending():
            self.check()
            now = self.clock()
            left = ASK_SECONDS if self.limit is None else started + self.limit - now
            if left <= 0:
                break
            self._follow(pending)
            due = [member for member in pending if member.next_at <= now]
            for stage in (JOIN, WEIGHTS, PREPARE):
                self._ask(stage, [m for m in due if m.stage == stage], min(left, ASK_SECONDS))
            for member in self._pending():
                if self.clock() - member.since > self.patience:
                    what = "was gone" if member.gone else "made no progress"
                    self._failed[member.name] = f"it {what} for {self.patience:g} s"
            if not due:
                self.sleep(POLL_SECONDS / 4)
        return self._failed

    def _pending(self) -> list[Member]:
        return [
            member
            for name, member in self.members.items()
            if member.ready is None and name not in self._failed
        ]

    def _follow(self, members: Sequence[Member]) -> None:
        """Look for members whose node is gone behind another one."""
        online = self.exchange.nodes()
        for member in members:
            member.gone = False
            if online.get(member.node) == member.name:
                continue
            others = [node for node, name in sorted(online.items()) if name == member.name]
            if others:
                member.node, member.stage = others[0], JOIN
            else:
                member.gone, member.next_at = True, self.clock() + POLL_SECONDS / 4

    def _ask(self, stage: str, members: Sequence[Member], seconds: float) -> None:
        if not members:
            return
        by_node = {member.node: member for member in members}
        requests: dict[int, Request] = {}
        for node, member in by_node.items():
            requests[node] = self._request(stage, member)
            member.next_at = self.clock() + POLL_SECONDS  # where it stays silent
        answers = self.exchange.ask(stage, requests, seconds, max_bytes=REPLY_BYTES)
        for node, answer in answers:
            member = by_node[node]
            try:
                self._hear(stage, member, answer)
            except FedtlError as error:
                self._failed[member.name] = printable(error.what)
            self.check()

    def _request(self, stage: str, member: Member) -> Request:
        if stage == JOIN:
            return {**self.terms, "key_name": member.name}, {}
        if stage == PREPARE:
            return self._order, {}
        path, facts = self.backbone.weights_path, self.terms["backbone"]
        assert path is not None
        member.sent += 1
        asked = {
            "sha256": self.backbone.weights_hash,
            "index": member.piece,
            "count": self._count(),
            "num_bytes": facts["num_bytes"],
        }
        return asked, {"piece": read_piece(path, member.piece)}

    def _count(self) -> int:
        return int(-(-self.terms["backbone"]["num_bytes"] // PIECE_BYTES))

    def _hear(self, stage: str, member: Member, answer: Answer) -> None:
        """Take one answer in. Raises FedtlError where the member cannot take part."""
        if answer.lost or answer.facts.get("unprepared"):  # it was restarted
            member.stage = JOIN
            return
        if answer.error is not None:
            raise InputError(answer.error)
        if stage == JOIN:
            self._hear_join(member, answer.facts)
        elif stage == WEIGHTS:
            self._hear_weights(member, answer.facts)
        else:
            self._hear_prepare(member, answer.facts)

    def _hear_join(self, member: Member, facts: Mapping[str, Any]) -> None:
        if facts.get("name") != member.name:
            raise SecurityRefusal(
                f"it calls itself {str(facts.get('name'))[:MAX_NAME]!r}, and its key is approved "
                f"as {member.name!r}"
            )
        if facts.get("reading") is True:
            member.reading = True
            return
        refuse_other_version(facts.get("versions"), "the client", "the server")
        held = _read_held(facts)
        _number(facts, "examples", 1, MAX_EXAMPLES)
        _number(facts, "threads", 1, MAX_EXAMPLES)
        _number(facts, "free_disk_bytes", 0, 2**63)
        _text(facts, "cpu")
        if facts.get("device") not in ("cpu", "cuda"):
            raise InputError("it computes on no device that fedtl knows")
        if member.joined is not None and held != member.held:
            raise InputError("its classes changed while others were made ready")
        stage = PREPARE if facts.get("has_backbone") is True else WEIGHTS
        if stage == WEIGHTS and self.terms["backbone"]["weights"] != FILE:
            raise InputError("it has no backbone, and there is no file to send it")
        member.joined = {key: facts.get(key) for key in JOINED}
        member.held, member.stage = held, stage
        member.piece, member.next_at = 0, 0.0

    def _hear_weights(self, member: Member, facts: Mapping[str, Any]) -> None:
        count = self._count()
        member.piece, member.next_at = _number(facts, "next", 0, count), 0.0
        if member.sent > 3 * count + 10:
            raise InputError("it asks for the backbone's weights over and over")
        self._progress(member, WEIGHTS, member.piece)
        self.observer.sending_weights(member.name, member.piece, count)
        if member.piece == count:
            member.stage = PREPARE

    def _hear_prepare(self, member: Member, facts: Mapping[str, Any]) -> None:
        assert member.joined is not None
        total = int(member.joined["examples"])
        if facts.get("ready") is not True:
            done = _number(facts, "done", 0, total)
            self._progress(member, PREPARE, done)
            self.observer.preparing(member.name, done, total)
            return
        train, test = _number(facts, "train", 1, total), _number(facts, "test", 0, total)
        _number(facts, "width", 1, MAX_WIDTH)
        _number(facts, "left_out", 0, total)
        _number(facts, "leaks", 0, total)
        if train + test > total:
            raise InputError("it says it has more examples than before")
        for key in ("fingerprint", "way", "domain"):
            _text(facts, key)
        seconds = facts.get("seconds")
        if (
            not isinstance(seconds, int | float)
            or isinstance(seconds, bool)
            or not 0 <= seconds < MAX_EXAMPLES
        ):
            raise InputError("it does not say how long it took")
        if facts.get("backbone") != self.terms["backbone"]["identity"]:
            raise InputError("it made features with another backbone than the announced one")
        member.ready = {key: facts.get(key) for key in READY}
        self.observer.prepared(member.name, member.ready)

    def _progress(self, member: Member, stage: str, done: int) -> None:
        if done > member.best.get(stage, -1):
            member.best[stage], member.since = done, self.clock()


def _read_held(facts: Mapping[str, Any]) -> Held:
    """The classes of a reply to a request to join."""
    classes = facts.get("classes")
    if (
        not isinstance(classes, list)
        or not classes
        or not all(isinstance(n, str) and 0 < len(n) <= MAX_NAME for n in classes)
        or len(set(classes)) < len(classes)
    ):
        raise InputError("it names no classes, or no proper ones")
    if not all(name.isprintable() for name in classes):
        raise InputError("its class names have characters that cannot be shown")
    return Held(tuple(classes), facts.get("numbered") is True)


def _number(facts: Mapping[str, Any], key: str, low: int, high: int) -> int:
    value = facts.get(key)
    if type(value) is not int or not low <= value <= high:
        shown = json.dumps(value)[:40] if isinstance(value, int | float | str) else "no number"
        raise InputError(f"it says {key} = {shown}; {low} to {high} is possible")
    return value


def _text(facts: Mapping[str, Any], key: str) -> None:
    value = facts.get(key)
    if not isinstance(value, str) or len(value) > MAX_NAME or not re.fullmatch(r"[^\n\r]*", value):
        raise InputError(f"it says nothing proper of its {key}")
    if not value.isprintable():
        raise InputError(f"its {key} has characters that cannot be shown")
