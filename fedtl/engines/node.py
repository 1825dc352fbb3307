"""What stands where the data are: answers the server's requests, whoever carries them.

A node trusts nothing it is sent: it reads facts and tensors only, runs no code of the server's,
opens no path that the server names, and says of every answer what leaves.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np

from fedtl.clients.evaluation import Right, evaluate_clients, evaluate_own
from fedtl.clients.personal import judge_personal
from fedtl.clients.personal_store import PersonalStore
from fedtl.clients.tasks import do_task
from fedtl.clients.training import train_clients
from fedtl.engines.alone import AloneMetrics, alone_reply, read_alone
from fedtl.engines.exchange import ECHOED
from fedtl.engines.masking import Masking, new_side, phase_reply, read_phase
from fedtl.engines.wire import (
    PROTOCOL,
    SECURE_PHASES,
    Tensors,
    metrics_reply,
    pack,
    read_clients,
    read_head,
    read_plan,
    unpack,
    updates_reply,
)
from fedtl.errors import EXIT_BUG, FedtlError, InputError, SecurityRefusal, printable
from fedtl.failpoints import failpoint
from fedtl.plans import RoundPlan
from fedtl.types import ClientMetrics, ClientUpdates, Head, Int64, Population

LARGEST_REQUEST = 2**30
"""Bytes: a head of a hundred million weights and more."""

MASKED = "masked"
"""Fact of an answer of which the server can learn the sum with others' alone."""

Reply = tuple[dict[str, Any], Tensors]


class NotPrepared(InputError):
    """The node has no data ready: it was restarted, or never prepared. The server prepares it."""


class Host(Protocol):
    """Where a node's data come from."""

    def join(self, facts: Mapping[str, Any]) -> Mapping[str, Any]:
        """Who is here: what the server may know before the rounds."""
        ...

    def weights(self, facts: Mapping[str, Any], tensors: Tensors) -> Mapping[str, Any]:
        """Take one piece of the backbone's weights."""
        ...

    def prepare(self, facts: Mapping[str, Any]) -> Mapping[str, Any]:
        """Make the clients' data ready for rounds."""
        ...

    def population(self) -> Population:
        """The data of the clients hosted here. Raises NotPrepared."""
        ...

    def consent(self, plan: RoundPlan) -> None:
        """Raises SecurityRefusal for a task that the clients here did not agree to."""
        ...

    def protected(self, plan: RoundPlan) -> None:
        """Raises SecurityRefusal for an answer that would leave with less protection than told."""
        ...

    def store(self) -> PersonalStore | None:
        """Where the clients hosted here keep what is theirs; None where nothing can be kept."""
        ...

    def ids(self, clients: Int64) -> Int64:
        """Where in ``population()`` the federation's clients are, int64 [k].

        Raises InputError for clients that are not hosted here.
        """
        ...


@dataclass(frozen=True)
class Sent:
    """What leaves a node in one answer.

    Attributes:
        kind, round: what was asked.
        facts: what is said in words and numbers.
        shapes: the tensors' names and shapes.
        num_bytes, sha256: of the reply as it travels.
    """

    kind: str
    round: int
    facts: Mapping[str, Any]
    shapes: Mapping[str, tuple[int, ...]]
    num_bytes: int
    sha256: str


Audit = Callable[[Sent], None]


@dataclass
class Node:
    """Answers requests with the kernel every engine uses.

    Attributes:
        host: where the data are.
        threads, device, block_size: how the kernel runs here.
        public_key: the server's Ed25519 key, 32 bytes; requests must be signed with it. Without
            one any request is answered: in simulation, where server and node are one program.
        name: this node's own; a request to another name is refused. "" takes any.
        audit: told of every answer before it leaves; an answer it cannot record does not leave.
        discreet: errors are told without the place they happened at, which may be private.
        simulated: the clients are of this program, and their noise is that of the seeded stream.
            Otherwise it is the operating system's, and nobody can take it away again.
    """

    host: Host
    threads: int = 1
    device: str = "cpu"
    block_size: int | None = None
    public_key: bytes = b""
    name: str = ""
    audit: Audit = lambda sent: None
    discreet: bool = True
    simulated: bool = False
    _masking: Masking = field(default_factory=lambda: Masking(new_side))
    _nonces: set[str] = field(default_factory=set)

    def answer(self, kind: str, content: bytes, signature: bytes = b"") -> bytes:
        """The reply to a request; every error becomes a short reply without private data."""
        asked: dict[str, Any] = {}
        try:
            # Read first, as the reply must repeat the nonce even where the signature is refused.
            asked, tensors = unpack(content, LARGEST_REQUEST)
            self._check(kind, asked, content, signature)
            facts, out = self._act(kind, asked, tensors)
            return self._sealed(kind, asked, facts, out)
        except FedtlError as error:
            logging.getLogger("fedtl").warning("request %s failed: %s", kind, error.line())
            told = error.what if self.discreet else error.line()
            facts = {"error": told, "exit_code": error.exit_code}
            if isinstance(error, NotPrepared):
                facts["unprepared"] = True
        except Exception as error:  # the server hears of it, the traceback stays here
            logging.getLogger("fedtl").exception("request %s failed", kind)
            facts = {"error": f"a {type(error).__name__} at the client", "exit_code": EXIT_BUG}
        try:
            return self._sealed(kind, asked, facts, {})
        except FedtlError as error:  # the one answer that is not in the log says that it is not
            facts = {"error": "its audit log cannot be written", "exit_code": error.exit_code}
            return pack({**facts, **_echo(asked)}, {})

    def _sealed(
        self, kind: str, asked: Mapping[str, Any], facts: Mapping[str, Any], tensors: Tensors
    ) -> bytes:
        """The reply, once it is in the audit log."""
        reply = pack({**facts, **_echo(asked)}, tensors)
        shapes = {name: tensor.shape for name, tensor in tensors.items()}
        digest = hashlib.sha256(reply).hexdigest()
        round = asked.get("round")
        round = round if isinstance(round, int) else 0
        self.audit(Sent(kind, round, facts, shapes, len(reply), digest))
        return reply

    def _check(self, kind: str, asked: Mapping[str, Any], content: bytes, signature: bytes) -> None:
        """Whether the request comes from our server, now, to this node and for this purpose."""
        if self.public_key:
            _verify(self.public_key, content, signature)
        if asked.get("protocol") != PROTOCOL:
            raise InputError(
                f"server and client speak different protocols: {asked.get('protocol')!r} and "
                f"{PROTOCOL}; the same fedtl version is needed on both"
            )
        nonce = asked.get("nonce")
        if (
            not isinstance(nonce, str)
            or not 16 <= len(nonce) <= 64
            or type(asked.get("round")) is not int
        ):
            raise InputError("a request without a nonce or a round")
        if asked.get("kind") != kind:
            raise SecurityRefusal("a request that was meant for something else")
        if self.name and asked.get("to") != self.name:
            raise SecurityRefusal(
                f"a request to {printable(str(asked.get('to')))[:60]!r}, as this key is approved, "
                f"came to a client that calls itself {self.name!r}"
            )
        if nonce in self._nonces:
            raise SecurityRefusal("a request that was answered before came again")
        self._nonces.add(nonce)

    def _act(self, kind: str, facts: dict[str, Any], tensors: Tensors) -> Reply:
        if kind == "join":
            return dict(self.host.join(facts)), {}
        if kind == "weights":
            return dict(self.host.weights(facts, tensors)), {}
        if kind == "prepare":
            return dict(self.host.prepare(facts)), {}
        if kind == "train":
            return self._train(facts, tensors)
        if kind in SECURE_PHASES:
            return self._phase(kind, facts, tensors)
        if kind == "evaluate":
            return self._evaluate(tensors)
        if kind == "alone":
            return self._alone(facts, tensors)
        if kind == "personal":
            return self._personal(facts, tensors)
        raise InputError("a request of an unknown kind")

    def _train(self, facts: dict[str, Any], tensors: Tensors) -> Reply:
        """Local training of some of the clients here."""
        plan, head = read_plan(facts, tensors)
        run, asked = facts.get("run"), plan.protection
        masked = asked is not None and asked.masked and not self.simulated  # those are their loop's
        self.host.consent(plan)
        self.host.protected(plan)
        if masked:
            self._masking.check(run, plan.round, plan.clients)
        population = self.host.population()
        here = replace(plan, clients=self.host.ids(plan.clients))
        failpoint("client_before_train", plan.round)
        updates = do_task(
            population,
            head,
            here,
            threads=self.threads,
            device=self.device,
            block_size=self.block_size,
            store=self.host.store(),
            secure=not self.simulated,
        )
        updates = _renamed(updates, here.clients, plan.clients)
        if masked and len(updates.clients):
            updates = self._masking.mask(run, updates)
        failpoint("client_after_train", plan.round)
        said, out = updates_reply(updates)
        return ({**said, MASKED: True} if masked else said), out

    def _phase(self, kind: str, facts: dict[str, Any], tensors: Tensors) -> Reply:
        """A client's part in a secure sum."""
        clients = read_clients(tensors)
        self.host.ids(clients)
        self.host.population()  # who has nothing to train on takes no part
        failpoint(f"client_before_{kind}", int(facts["round"]))
        message = self._masking.answer(kind, facts, clients, read_phase(clients, tensors))
        return phase_reply(int(facts["round"]), clients, message)

    def _evaluate(self, tensors: Tensors) -> Reply:
        """The head on the clients' own test examples."""
        clients = read_clients(tensors)
        metrics = evaluate_clients(
            self.host.population(),
            read_head(tensors),
            self.host.ids(clients),
            threads=self.threads,
            device=self.device,
        )
        return metrics_reply(replace(metrics, clients=clients))

    def _alone(self, facts: dict[str, Any], tensors: Tensors) -> Reply:
        """Clients that train alone over all rounds: their heads stay, their metrics leave."""
        asked = read_alone(facts, tensors)
        clients, population = asked.plans[0].clients, self.host.population()
        here = self.host.ids(clients)
        heads: Head | None = None
        for plan in asked.plans:
            heads = train_clients(
                population,
                asked.head,
                replace(plan, clients=here),
                threads=self.threads,
                device=self.device,
                initial=heads,
            ).tensors
        assert heads is not None
        own: Right = []
        metrics = evaluate_own(
            population, heads, here, threads=self.threads, device=self.device, right=own
        )
        beats = np.zeros((len(clients), len(asked.rivals)), np.int64)
        loses = np.zeros_like(beats)
        for r, rival in enumerate(asked.rivals):
            for i, (theirs, mine) in enumerate(
                zip(self._right(asked.shared, rival), own, strict=True)
            ):
                beats[i, r], loses[i, r] = (theirs & ~mine).sum(), (mine & ~theirs).sum()
        return alone_reply(AloneMetrics(replace(metrics, clients=clients), beats, loses))

    def _right(self, head: Head, plan: RoundPlan) -> Right:
        """Which of their test examples the head, or what the clients make of it, has right."""
        found: Right = []
        if plan.personal is None:
            evaluate_clients(
                self.host.population(),
                head,
                self.host.ids(plan.clients),
                threads=self.threads,
                device=self.device,
                right=found,
            )
        else:
            self._judged(head, plan, found)
        return found

    def _judged(self, head: Head, plan: RoundPlan, right: Right | None = None) -> ClientMetrics:
        """What the clients make of the last head for themselves, on their own tests."""
        # nothing that is trained here leaves, so it is personal heads alone that need consent
        self.host.consent(replace(plan, training=replace(plan.training, epochs=0)))
        metrics, _ = judge_personal(
            self.host.population(),
            head,
            replace(plan, clients=self.host.ids(plan.clients)),
            store=self.host.store(),
            threads=self.threads,
            device=self.device,
            right=None if right is None else (right, []),
        )
        return replace(metrics, clients=plan.clients)

    def _personal(self, facts: dict[str, Any], tensors: Tensors) -> Reply:
        """What the clients make of the last head for themselves stays, its metrics leave."""
        plan, head = read_plan(facts, tensors)
        return metrics_reply(self._judged(head, plan))


def _renamed(updates: ClientUpdates, here: Int64, there: Int64) -> ClientUpdates:
    """Updates by the federation's ids, int64 [k], instead of ours."""
    name = dict(zip(here.tolist(), there.tolist(), strict=True))
    clients = np.array([name[client] for client in updates.clients.tolist()], np.int64)
    failures = tuple(replace(one, client=name[one.client]) for one in updates.failures)
    return replace(updates, clients=clients, failures=failures)


def _echo(asked: Mapping[str, Any]) -> dict[str, Any]:
    return {name: asked.get(name) for name in ECHOED}


def _verify(public_key: bytes, content: bytes, signature: bytes) -> None:
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    try:
        Ed25519PublicKey.from_public_bytes(public_key).verify(signature, content)
    except InvalidSignature:
        raise SecurityRefusal("a request that the server did not sign") from None
