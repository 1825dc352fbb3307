"""A node's part in secure sums: keys, shares, masks, and what is revealed of them.

A request of a phase carries one message of ``privacy.secure_sum`` to one client, and the reply the
client's answer. What a round needs to be kept secret lives in this process's memory alone, one
round at a time: a client that is restarted is out of the round, and the others' shares make up
for it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np

from fedtl.engines.wire import SECURE_PHASES, Tensors, refuse
from fedtl.errors import InputError, SecurityRefusal
from fedtl.plans import RING, RoundPlan
from fedtl.privacy.ring import Ring
from fedtl.privacy.secure_client import ClientSide
from fedtl.privacy.secure_sum import MaskedSum, SecureAbort
from fedtl.types import ClientUpdates, Head, Int64

KEYS, SHARES, REVEAL = SECURE_PHASES
MESSAGE = "message"
LIE = "gave shares that are not those it promised"


def phase_request(
    round: int, clients: Int64, messages: Mapping[int, bytes]
) -> tuple[dict[str, Any], Tensors]:
    """Facts and tensors of one phase's request to the one client behind a node."""
    if len(clients) != 1:
        raise InputError("clients behind one node cannot be hidden from it, or it from them")
    return phase_reply(round, clients, messages[int(clients[0])])


def phase_reply(round: int, clients: Int64, message: bytes) -> tuple[dict[str, Any], Tensors]:
    """Facts and tensors of one client's answer to it; both are read by ``read_phase``."""
    return {"round": round}, {"clients": clients, MESSAGE: np.frombuffer(message, np.uint8)}


def read_phase(clients: Int64, tensors: Tensors) -> bytes:
    """The message in a request or a reply about exactly these clients."""
    answered, message = tensors.get("clients"), tensors.get(MESSAGE)
    if answered is None or not np.array_equal(answered, clients) or len(tensors) != 2:
        refuse("it answers for other clients than it was asked for")
    if message is None or message.dtype != np.uint8 or message.ndim != 1:
        refuse("it has no message of a secure sum")
    return message.tobytes()


@dataclass
class Masking:
    """The secure sum at hand.

    Attributes:
        make: a client's part in a new sum.
    """

    make: Callable[[], ClientSide]
    _run: object = None
    _round: int = -1
    _side: ClientSide | None = None

    def answer(self, kind: str, facts: Mapping[str, Any], clients: Int64, message: bytes) -> bytes:
        """The answer to a phase's message; a round is begun once in a run, and never again.

        Raises:
            SecurityRefusal: out of turn, once more, or something that would unmask a client.
        """
        run, round = facts.get("run"), int(facts["round"])
        if kind == KEYS:
            if run == self._run and round <= self._round:
                raise SecurityRefusal("the server asks again for a secure sum that was begun")
            side = self.make()
            answer = side.answer(kind, message)
            self._run, self._round, self._side = run, round, side
            self._of(run, round, clients)  # the message is about the same round and client
            return answer
        answer = self._of(run, round, clients).answer(kind, message)
        if kind == REVEAL:  # nothing is left that could be asked for
            self._side = None
        return answer

    def check(self, run: object, round: int, clients: Int64) -> None:
        """Raises SecurityRefusal where no sum was begun that could hide the round's answer."""
        self._of(run, round, clients)

    def mask(self, run: object, updates: ClientUpdates) -> ClientUpdates:
        """The one client's integers under its masks.

        Raises:
            SecurityRefusal: its masks are not settled, or were used.
        """
        side = self._of(run, updates.round, updates.clients)
        masked = side.mask(updates.tensors[RING][0])
        return replace(updates, tensors={RING: masked[None]})

    def _of(self, run: object, round: int, clients: Int64) -> ClientSide:
        """This client's part in the sum at hand, if it is that which is asked about."""
        side = self._side
        if side is None or (run, round) != (self._run, self._round):
            raise SecurityRefusal(
                "the server asks about a secure sum that was not begun, or is over"
            )
        if side.round != round or [side.client] != clients.tolist():
            raise SecurityRefusal("the server means another client or round than it says")
        return side


def new_side() -> ClientSide:
    """A client's part, with keys that nobody can foresee."""
    return ClientSide(os.urandom)


class Carrying(Protocol):
    """What brings phases to clients; ``flower_engine.FlowerEngine`` does."""

    def carry(self, round: int, phase: str, messages: Mapping[int, bytes]) -> Mapping[int, bytes]:
        """The answers to a phase's messages; clients that gave none are missing."""
        ...

    def missed(self, round: int) -> Mapping[int, str]:
        """Who missed a part of the round so far, and why."""
        ...


@dataclass(frozen=True)
class RoundCarrier:
    """The engine as the ``secure_sum.Carrier`` of one round."""

    engine: Carrying
    round: int

    def carry(self, phase: str, messages: Mapping[int, bytes]) -> Mapping[int, bytes]:
        """See ``secure_sum.Carrier``."""
        return self.engine.carry(self.round, phase, messages)


class CarriedSum(MaskedSum):
    """A masked sum over real clients, which says why those are missing that are.

    Args:
        engine: reaches the clients.
        plan, head: the round's.
        threshold, neighbours, run: as for ``MaskedSum``.
        tell: told (client, what it did) of who broke the rules when masks were taken off.
    """

    def __init__(
        self,
        engine: Carrying,
        plan: RoundPlan,
        head: Head,
        threshold: int,
        neighbours: int | None,
        *,
        run: str,
        tell: Callable[[int, str], None] = lambda client, what: None,
    ) -> None:
        assert plan.protection is not None
        ((size,), _) = plan.reply(head)[RING]
        self._engine, self._round, self._tell = engine, plan.round, tell
        super().__init__(
            plan.clients,
            threshold,
            neighbours,
            plan.protection.ring_bits,
            RoundCarrier(engine, plan.round),
            size=size,
            run=run,
            round=plan.round,
            randomness=os.urandom,
        )

    def begin(self) -> Int64:
        """See ``SecureSum``."""
        try:
            return super().begin()
        finally:
            self.failures.update(
                {
                    c: why
                    for c, why in self._engine.missed(self._round).items()
                    if c in self.failures
                }
            )

    def finish(self) -> tuple[Ring, Int64]:
        """See ``SecureSum``."""
        try:
            found = super().finish()
        except SecureAbort as abort:
            self._name(abort.clients)
            raise
        self._name(self.facts["liars"])
        return found

    def _name(self, clients: Iterable[int]) -> None:
        for client in clients:
            self._tell(client, LIE)
