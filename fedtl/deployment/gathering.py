"""The start of a real federation: who is there, which classes there are, and everybody made ready.

Clients come when they come. The server waits for all that are approved, at most ``join_seconds``
and then with the quorum; settles the classes; sends the backbone to whom it lacks; and has each
client prepare its data. Whoever fails on the way is left out with the reason while the quorum
holds. The result depends on who takes part, never on the order in which they came.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from fedtl.deployment.class_table import ClassTable, agree_on_classes
from fedtl.deployment.membership import POLL_SECONDS, Member, Settling
from fedtl.deployment.terms import make_terms
from fedtl.engines.exchange import Exchange
from fedtl.errors import InputError, PolicyStop
from fedtl.scenario.schema import Scenario
from fedtl.transfer.backbones import Backbone
from fedtl.types import Int64, Roster

STEP_SECONDS = 0.2
"""Between two looks at who is there."""

AGAIN_SECONDS = 5.0
"""A client that was refused is asked again after this long: it may have been mended."""

JOIN_SECONDS = 5.0
"""For the answer to a request to join; clients that need longer say so."""

SEAT_SECONDS = 10.0
"""So long a round waits for clients that came back to be made ready."""

REST_SECONDS = 30.0
"""A client that could not be taken back in is left alone for so long."""


_TWICE = "another machine takes part with the same key already"


class GatheringObserver:
    """Is told what happens; does nothing with it unless a method is overridden."""

    def joined(self, name: str, facts: Mapping[str, Any]) -> None:
        """A client is here; ``facts`` as ``PrivateHost.join`` gives them."""

    def left(self, name: str, reason: str) -> None:
        """A client that was here is gone, or is left out."""

    def refused(self, name: str, reason: str) -> None:
        """A client cannot take part as it is; told once for each reason."""

    def waiting(self, names: Collection[str], seconds_left: float) -> None:
        """These clients are missing; called again and again."""

    def classes(self, table: ClassTable) -> None:
        """The classes are settled."""

    def sending_weights(self, name: str, done: int, total: int) -> None:
        """Pieces of the backbone that a client has."""

    def preparing(self, name: str, done: int, total: int) -> None:
        """Examples that a client has been through."""

    def prepared(self, name: str, facts: Mapping[str, Any]) -> None:
        """A client is ready; ``facts`` as ``PrivateHost.prepare`` gives them."""


@dataclass(frozen=True)
class Gathered:
    """A federation that is ready for rounds.

    Attributes:
        roster: its clients, sorted by name.
        seats: node -> the clients behind it.
        facts: what each client said when it joined and when it was ready, by name.
        left_out: approved clients that came and could not take part, with the reason.
        identity: of clients and data, for a resumed run to be compared with.
    """

    roster: Roster
    seats: Mapping[int, Int64]
    facts: Mapping[str, Mapping[str, Any]]
    left_out: Mapping[str, str]
    identity: Mapping[str, str]


@dataclass
class Gathering:
    """Gathers clients, and takes them back in when they come again.

    Attributes:
        exchange: reaches the nodes.
        scenario, backbone: the server's; the backbone is opened.
        approved: names of the approved clients, now; asked again and again.
        data_key: keys the data's fingerprints; the same when a run is resumed, else random.
        quorum: clients that suffice when the time to join is over.
        join_seconds: the time to join; also the longest that a client may make no progress.
        expected: when resuming, who took part: all of them must come, nobody else may.
        observer: is told what happens.
        check: called often; may raise to stop.
        clock, sleep: of time, in seconds.
    """

    exchange: Exchange
    scenario: Scenario
    backbone: Backbone
    approved: Callable[[], Collection[str]]
    data_key: bytes
    quorum: int
    join_seconds: float
    expected: Collection[str] | None = None
    observer: GatheringObserver = field(default_factory=GatheringObserver)
    check: Callable[[], None] = lambda: None
    clock: Callable[[], float] = time.monotonic
    sleep: Callable[[float], None] = time.sleep
    _gathered: Gathered | None = None
    _settled: Mapping[str, Any] | None = None
    _told: set[tuple[int, str, str]] = field(default_factory=set)
    _rest: dict[int, float] = field(default_factory=dict)

    def gather(self) -> Gathered:
        """Wait, agree, send, prepare.

        Raises:
            PolicyStop: fewer clients than the quorum, or when resuming than took part.
            InputError: the clients' classes or features cannot go together.
        """
        members = self._wait()
        left_out: dict[str, str] = {}
        while True:
            self._count(members, left_out)
            held = {name: member.held for name, member in members.items()}
            table = agree_on_classes(held)
            self.observer.classes(table)
            # Classes follow from who takes part: when somebody drops out they are settled anew.
            failed = self._settle(members, table.classes, None)
            if not failed:
                break
            for name, reason in failed.items():
                self.observer.left(name, reason)
                left_out[name] = reason
                del members[name]
        self._gathered = self._conclude(members, table.classes, left_out)
        return self._gathered

    def settle(self, facts: Mapping[str, Any]) -> None:
        """Tell everybody what is known of privacy now that all are here, and who comes back later.

        Whoever does not agree says so, and will answer no round.
        """
        gathered, now = self._gathered, self.clock()
        assert gathered is not None, "gather first"
        self._settled = dict(facts)
        names = gathered.roster.names
        members = {
            names[own[0]]: Member(names[own[0]], node, now) for node, own in gathered.seats.items()
        }
        for name, reason in self._settling(members, JOIN_SECONDS).join().items():
            self._refuse(members[name].node, name, reason)

    def seat(self, nodes: Collection[int]) -> dict[int, Int64]:
        """Make clients ready that came back behind these nodes; who is, by node.

        A client whose data are not those it began with stays out. Never raises for a client.
        """
        gathered = self._gathered
        assert gathered is not None, "gather first"
        names, online, now = gathered.roster.names, self.exchange.nodes(), self.clock()
        members: dict[str, Member] = {}
        for node in sorted(nodes):
            name = online.get(node, "")
            if self._rest.get(node, 0.0) > now or name in members:
                continue
            if name not in names:
                self._refuse(node, name, "it did not take part when the run began")
            elif any(other == name for n, other in online.items() if n not in nodes):
                self._refuse(node, name, _TWICE)
            else:
                members[name] = Member(name, node, now)
        if not members:
            return {}
        failed = self._settle(members, gathered.roster.classes, SEAT_SECONDS)
        seats: dict[int, Int64] = {}
        for name, member in members.items():
            index = names.index(name)
            reason = failed.get(name)
            if reason is None and member.ready is not None:
                changed = _changes(gathered.facts[name], member.facts)
                reason = (
                    f"since the run began its {' and '.join(changed)} changed" if changed else ""
                )
            silent = member.joined is None and not member.reading
            if reason or silent:  # the rounds go on without it
                self._rest[member.node] = self.clock() + REST_SECONDS
                self._refuse(member.node, name, reason or "it does not answer")
            elif member.ready is not None:
                self.observer.prepared(name, member.ready)
                seats[member.node] = np.array([index], np.int64)
        return seats

    def _wait(self) -> dict[str, Member]:
        """Whoever has joined when everybody has, or when the time is over."""
        members: dict[str, Member] = {}
        asked_again: dict[int, float] = {}
        until = self.clock() + self.join_seconds
        while True:
            self.check()
            wanted = set(self.approved() if self.expected is None else self.expected)
            online = self.exchange.nodes()
            for name, member in list(members.items()):
                if online.get(member.node) != name:
                    self.observer.left(name, "its connection ended")
                    del members[name]
            fresh = self._newcomers(online, wanted, members, asked_again)
            left = until - self.clock()
            if fresh and left > 0:
                failed = self._settling(fresh, min(left, JOIN_SECONDS)).join()
                for name, member in fresh.items():
                    again = POLL_SECONDS if member.reading else AGAIN_SECONDS
                    asked_again[member.node] = self.clock() + again
                    if member.joined is not None:
                        members[name] = member
                        self.observer.joined(name, member.joined)
                    elif name in failed:
                        self._refuse(member.node, name, failed[name])
            missing = sorted(wanted - set(members))
            if not missing and len(members) >= self.quorum:
                return members
            if self.clock() >= until:
                return members
            self.observer.waiting(missing, max(0.0, until - self.clock()))
            self.sleep(STEP_SECONDS)

    def _newcomers(
        self,
        online: Mapping[int, str],
        wanted: Collection[str],
        members: Mapping[str, Member],
        asked_again: Mapping[int, float],
    ) -> dict[str, Member]:
        """Nodes to be asked to join now, one for each name."""
        now, fresh = self.clock(), dict[str, Member]()
        # Who has not been asked yet comes first: a silent node must not hide a second one.
        for node in sorted(online, key=lambda node: (node in asked_again, node)):
            name = online[node]
            if name not in wanted:
                resumed = self.expected is not None
                why = "this run was begun without it" if resumed else "its key is not approved"
                self._refuse(node, name, why)
            elif name in members:
                if members[name].node != node:
                    self._refuse(node, name, _TWICE)
            elif asked_again.get(node, 0.0) <= now and name not in fresh:
                fresh[name] = Member(name, node, now)
        return fresh

    def _settle(
        self, members: Mapping[str, Member], classes: tuple[str, ...], seconds: float | None
    ) -> dict[str, str]:
        """Make members ready; the reasons of those who failed."""
        return self._settling(members, seconds).prepare(classes, self.data_key)

    def _settling(self, members: Mapping[str, Member], seconds: float | None) -> Settling:
        return Settling(
            self.exchange,
            make_terms(self.scenario, self.backbone, self._settled),
            self.backbone,
            members,
            self.join_seconds if seconds is None else seconds,
            seconds,
            self.observer,
            self.check if seconds is None else lambda: None,  # a round is not torn apart
            self.clock,
            self.sleep,
        )

    def _count(self, members: Collection[str], left_out: Mapping[str, str]) -> None:
        """Raise PolicyStop where too few are left."""
        reasons = "".join(f"; {name}: {why}" for name, why in sorted(left_out.items()))
        if self.expected is not None and (gone := sorted(set(self.expected) - set(members))):
            raise PolicyStop(
                f"this run was begun with clients that are missing: {', '.join(gone)}{reasons}",
                do="Bring them back and resume again",
            )
        if len(members) < self.quorum:
            there = ", ".join(sorted(members)) or "nobody"
            raise PolicyStop(
                f"{len(members)} client{'' if len(members) == 1 else 's'} could take part, and "
                f"{self.quorum} {'is' if self.quorum == 1 else 'are'} needed; here: "
                f"{there}{reasons}",
                do="Mend that and resume, or lower --min-clients"
                if reasons
                else "Start the others and resume, raise engine.join_seconds or lower "
                "--min-clients",
            )

    def _refuse(self, node: int, name: str, reason: str) -> None:
        if (node, name, reason) not in self._told:
            self._told.add((node, name, reason))
            self.observer.refused(name, reason)

    def _conclude(
        self, members: Mapping[str, Member], classes: tuple[str, ...], left_out: Mapping[str, str]
    ) -> Gathered:
        names = tuple(sorted(members))
        facts = {name: members[name].facts for name in names}
        widths = {name: facts[name]["width"] for name in names}
        if len(set(widths.values())) > 1:
            told = ", ".join(f"{name}: {width}" for name, width in widths.items())
            raise InputError("the clients' features differ in width", got=told)
        # Where a scenario has one client per domain, a client without domains is one.
        alone = self.scenario.clients.partition == "domain"
        domains = tuple(facts[name]["domain"] or (name if alone else "") for name in names)
        counts = [
            np.array([facts[name][key] for name in names], np.int64) for key in ("train", "test")
        ]
        seats = {members[name].node: np.array([i], np.int64) for i, name in enumerate(names)}
        roster = Roster(names, domains, classes, counts[0], counts[1], widths[names[0]])
        return Gathered(roster, seats, facts, dict(left_out), _identity(roster, facts))


def _identity(roster: Roster, facts: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """What must be the same when a run is resumed, a line for each client."""
    return {
        "clients": ", ".join(roster.names),
        **{f"data of {name}": facts[name]["fingerprint"] for name in roster.names},
        **{f"extraction at {name}": facts[name]["way"] for name in roster.names},
    }


def _changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What a client that came back says otherwise than before."""
    words = {"fingerprint": "data", "train": "training examples", "test": "test examples",
             "width": "features", "way": "way of extraction"}  # fmt: skip
    return [word for key, word in words.items() if before[key] != now[key]]
