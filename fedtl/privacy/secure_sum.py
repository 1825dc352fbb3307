"""Sums of clients' vectors of which nothing but the sum is meant to be seen: the server's end.

Protocol: Bonawitz et al., "Practical Secure Aggregation for Privacy-Preserving Machine Learning",
CCS 2017, figure 4, without its signatures; with few neighbours each (``secure_graph``) that of
Bell et al., CCS 2020. A client's vector is sent under a mask of its own seed and one mask for each
neighbour, which the neighbour subtracts. Neighbours hold shares of the seed and of the key to the
masks: of who survived the seed is put together again, of who dropped out the key.

What is promised, and to whom:

- A server that follows the protocol and looks at all it gets (honest but curious) learns the
  survivors' sum and who they are; with clients that collude with it the sum of the others, as long
  as they hold fewer than ``share_threshold`` shares of each and the others' masks hang together.
  Clients without the server learn nothing of each other's vectors.
- Dropouts at every phase. With too few left the round is given up before anything is revealed.
- A client that reveals a wrong share is found out by the commitment its owner made to it; the
  others' shares do. A client that dealt inconsistent shares is found out by its public key, or by
  the commitment to its seed: then the round is given up, as its mask stays on.

What is not promised:

- The clients' public keys reach each other through the server, and nobody vouches for them. A
  server that makes up neighbours for a client (or shows it false keys) can take its masks off:
  only a directory of keys that the server does not write would prevent that.
- Much against a server that lies about who survived. It cannot get both secrets of a client (more
  than half of the holders are needed for either, and each tells one of them, once). But with
  different lists for different clients it can take off the masks between a few clients and all
  others, and see the sum of those few. The paper's consistency check, a further phase of signed
  lists, is what prevents this; it needs a directory of keys too.
- That a vector is a sensible one. Any client can spoil the sum; nobody can tell which did.
- That the sum of few, or sums of different rounds, tell nothing of one client: that is for
  differential privacy.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from typing import Any, Protocol, TypeVar

import numpy as np

from fedtl.errors import InputError, SecurityRefusal
from fedtl.privacy.masks import Randomness, usable
from fedtl.privacy.ring import Ring, ring_dtype
from fedtl.privacy.secure_graph import Graph, connected, ring_graph, shares_needed
from fedtl.privacy.secure_messages import (
    ASKED,
    CLIENT,
    DEALT,
    KEYS,
    MOST_NEIGHBOURS,
    NEIGHBOUR,
    PHASES,
    SEED,
    SHARE,
    Step,
    body,
    by_client,
    context_of,
    malformed,
    message,
    start,
)
from fedtl.privacy.secure_recovery import Dealt, recovered, take_off
from fedtl.privacy.secure_recovery import SecureAbort as SecureAbort
from fedtl.types import Int64

Read = TypeVar("Read")


class Carrier(Protocol):
    """Takes messages to clients and brings their answers."""

    def carry(self, phase: str, messages: Mapping[int, bytes]) -> Mapping[int, bytes]:
        """Answers by client; who does not answer in time is missing."""


class SecureSum(Protocol):
    """One round's sum: ``begin`` once, ``add`` as vectors come, ``finish`` once."""

    def begin(self) -> Int64:
        """The clients that agreed to take part and may be asked for vectors, sorted, int64 [a].

        Raises:
            SecureAbort: they are too few.
        """

    def add(self, clients: Int64, vectors: Ring) -> None:
        """Take in the vectors [k, P] of some of them; nothing of a single one is kept."""

    def finish(self) -> tuple[Ring, Int64]:
        """The sum over all that were added [P], and who they are, sorted, int64 [s].

        Raises:
            SecureAbort: they are too few, or the masks cannot be taken off.
        """

    @property
    def facts(self) -> Mapping[str, Any]:
        """What was done, as JSON values.

        protocol: "arithmetic", "secagg" or "secagg_plus"; threshold: fewest clients in a sum;
        neighbours: masks that a client shares (null without masks); dropouts: clients asked that
        are not in the sum. With masks also share_threshold: fewest holders that take a mask off;
        liars: ids of clients that revealed wrong shares.
        """

    @property
    def failures(self) -> Mapping[int, str]:
        """Why clients fell out of the protocol; not those that were never added."""


class Running:
    """The sum so far and whose vectors are in it."""

    def __init__(self, size: int, bits: int) -> None:
        self.total: Ring = np.zeros(size, ring_dtype(bits))
        self.added: set[int] = set()

    def add(self, clients: Int64, vectors: Ring, agreed: Int64) -> None:
        """Add vectors [k, P] of clients that agreed, each once."""
        assert vectors.dtype == self.total.dtype, vectors.dtype
        assert vectors.shape == (len(clients), len(self.total)), vectors.shape
        new = set(clients.tolist())
        assert len(new) == len(clients), "a client twice"
        assert new <= set(agreed.tolist()) - self.added, "a client that was not asked"
        self.total += vectors.sum(axis=0, dtype=self.total.dtype)  # wraps, as it should
        self.added |= new

    def survivors(self, threshold: int) -> Int64:
        """Whose vectors are in the sum, sorted. Raises SecureAbort: fewer than the threshold."""
        require(len(self.added), threshold, "sent a vector")
        return np.array(sorted(self.added), np.int64)


def require(count: int, threshold: int, what: str) -> None:
    """Raise SecureAbort where fewer clients than the threshold did ``what``."""
    if count < threshold:
        raise SecureAbort(f"{count} clients {what}, {threshold} are needed for a secure sum")


class PlainSum:
    """The ring's arithmetic alone: the same sum, but the server sees every vector.

    Args:
        clients: asked, int64 [k].
        threshold: fewest clients in a sum.
        size: P, of the vectors.
        bits: 32 or 64, of their entries.
    """

    def __init__(self, clients: Int64, threshold: int, size: int, bits: int) -> None:
        self._clients, self._threshold = np.sort(clients), max(1, threshold)
        self._running = Running(size, bits)

    def begin(self) -> Int64:
        """All that were asked."""
        require(len(self._clients), self._threshold, "were asked")
        return self._clients

    def add(self, clients: Int64, vectors: Ring) -> None:
        """See ``SecureSum``."""
        self._running.add(clients, vectors, self._clients)

    def finish(self) -> tuple[Ring, Int64]:
        """See ``SecureSum``."""
        survivors = self._running.survivors(self._threshold)
        return self._running.total, survivors

    @property
    def failures(self) -> Mapping[int, str]:
        """Of nobody: there are no phases."""
        return {}

    @property
    def facts(self) -> Mapping[str, Any]:
        """See ``SecureSum``."""
        return {
            "protocol": "arithmetic",
            "threshold": self._threshold,
            "neighbours": None,
            "dropouts": len(self._clients) - len(self._running.added),
        }


class MaskedSum:
    """The sum under masks; ``add`` takes vectors as the clients masked them.

    Args:
        clients: asked, int64 [k].
        threshold: fewest clients in a sum; at least 2, and among all with all more than half.
        neighbours: masks that a client shares (see ``secure_graph.neighbours_for``); None: with
            all (SecAgg).
        bits: 32 or 64, of the vectors' entries.
        carrier: to the clients.
        size: P, of the vectors.
        run: names the run; with ``round`` all messages are bound to it.
        randomness: ``os.urandom``, but for simulations.

    Raises:
        InputError: too many clients for masks between all.
    """

    def __init__(
        self,
        clients: Int64,
        threshold: int,
        neighbours: int | None,
        bits: int,
        carrier: Carrier,
        *,
        size: int,
        run: str,
        round: int,
        randomness: Randomness,
    ) -> None:
        if min(len(clients) - 1, neighbours or len(clients)) > MOST_NEIGHBOURS:
            raise InputError(
                "too many masks for each client",
                where="privacy.secure_aggregation",
                allowed=f"up to {MOST_NEIGHBOURS}",
                do="Use 'secagg_plus', or ask fewer clients in a round",
            )
        self._clients, self._threshold = sorted(clients.tolist()), max(2, threshold)
        self._neighbours, self._carrier = neighbours, carrier
        self._running, self._randomness = Running(size, bits), randomness
        digest, session = hashlib.sha256(run.encode()).digest(), randomness(16)
        self._openings = {c: start(c, round, bits, digest, session) for c in self._clients}
        self._context = context_of(start(0, round, bits, digest, session))
        self._graph: Graph = {}
        self._shares = 0
        self._dealt: dict[int, Dealt] = {}
        self._agreed = np.empty(0, np.int64)
        self._liars: list[int] = []
        self.failures: dict[int, str] = {}

    def begin(self) -> Int64:
        """See ``SecureSum``: keys, shares, and their delivery."""
        require(len(self._clients), self._threshold, "were asked")
        keys = self._ask(Step.KEYS, self._openings, self._read_keys)
        require(len(keys), self._threshold, "sent keys")
        self._meet(sorted(keys))
        meetings = {
            client: message(
                Step.SHARES,
                self._context,
                ASKED.pack(self._shares),
                *(NEIGHBOUR.pack(other, *keys[other]) for other in sorted(self._graph[client])),
            )
            for client in keys
        }
        dealt = self._ask(Step.SHARES, meetings, self._read_dealt)
        while few := [c for c in dealt if len(self._holders(c) & dealt.keys()) < self._shares]:
            for client in few:
                del dealt[client]
                self.failures[client] = "too few of its neighbours are left"
        require(len(dealt), self._threshold, "dealt shares")
        self._dealt = {c: Dealt(keys[c][1], seed, records) for c, (seed, records) in dealt.items()}
        self._deliver()
        return self._agreed

    def add(self, clients: Int64, vectors: Ring) -> None:
        """See ``SecureSum``."""
        self._running.add(clients, vectors, self._agreed)

    def finish(self) -> tuple[Ring, Int64]:
        """See ``SecureSum``."""
        survivors = self._running.survivors(self._threshold)
        alive = set(survivors.tolist())
        self._require_holders(alive)
        if not connected(self._graph, alive):
            raise SecureAbort("the survivors' masks do not hold together, only parts of the sum")
        requests = {
            client: message(
                Step.REVEAL,
                self._context,
                *(CLIENT.pack(other) for other in sorted(self._holders(client) & alive)),
            )
            for client in sorted(alive)
        }
        revealed = self._ask(Step.REVEAL, requests, self._read_revealed)
        secrets, self._liars = recovered(self._context, self._dealt, alive, revealed, self._shares)
        total = self._running.total
        take_off(total, self._context, self._graph, self._dealt, alive, secrets)
        return total, survivors

    @property
    def facts(self) -> Mapping[str, Any]:
        """See ``SecureSum``."""
        return {
            "protocol": "secagg" if self._neighbours is None else "secagg_plus",
            "threshold": self._threshold,
            "neighbours": max(map(len, self._graph.values()), default=0),
            "dropouts": len(self._clients) - len(self._running.added),
            "share_threshold": self._shares,
            "liars": self._liars,
        }

    def _meet(self, clients: list[int]) -> None:
        """Decide who shares masks with whom, and how many shares give a secret back."""
        key = int.from_bytes(self._randomness(16), "little")
        order = np.random.Generator(np.random.Philox(key=key)).permutation(clients).tolist()
        self._graph = ring_graph(order, self._neighbours)
        holders = len(self._graph[clients[0]]) + 1
        self._shares = shares_needed(holders)
        if holders == len(clients):  # all with all: as many as survive can take the masks off
            self._shares = self._threshold = max(self._shares, self._threshold)

    def _deliver(self) -> None:
        """Hand the shares to their holders, who say whose are of no use to them."""
        deliveries = {
            client: message(
                Step.DELIVERY,
                self._context,
                *(
                    DEALT.pack(owner, *self._dealt[owner].records[client])
                    for owner in sorted(self._graph[client] & self._dealt.keys())
                ),
            )
            for client in self._dealt
        }
        useless = self._ask(Step.DELIVERY, deliveries, self._read_useless)
        self._agreed = np.array(sorted(useless), np.int64)
        require(len(useless), self._threshold, "took their shares")
        for client, dealt in self._dealt.items():
            dealt.holders = {
                h for h in self._holders(client) & useless.keys() if client not in useless[h]
            }
            dealt.forget_sealed()
        self._require_holders(set(useless))

    def _holders(self, client: int) -> set[int]:
        return {client, *self._graph[client]} & (self._dealt.keys() or self._graph.keys())

    def _require_holders(self, alive: set[int]) -> None:
        """Give up where somebody's mask could not be taken off."""
        if any(len(dealt.holders & alive) < self._shares for dealt in self._dealt.values()):
            raise SecureAbort("too few are left of those who hold some client's shares")

    def _ask(
        self, step: Step, messages: Mapping[int, bytes], read: Callable[[int, bytes], Read]
    ) -> dict[int, Read]:
        """One phase: what was read of each answer. Who gave none, or a wrong one, is out."""
        answers, found = self._carrier.carry(PHASES[step], messages), {}
        for client in messages:
            if client not in answers:
                self.failures[client] = f"no answer to {PHASES[step]}"
                continue
            try:
                found[client] = read(client, answers[client])
            except SecurityRefusal as error:
                self.failures[client] = f"{PHASES[step]}: {error.what}"
        return found

    def _read_keys(self, client: int, content: bytes) -> tuple[bytes, bytes]:
        rest = body(content, Step.KEYS, self._context, 0, KEYS)
        if len(rest) != KEYS.size:
            malformed(f"{len(rest)} bytes")
        sealing, masking = KEYS.unpack(rest)
        if not usable(sealing) or not usable(masking):
            raise SecurityRefusal("a public key of the secure sum is not usable")
        return sealing, masking

    def _read_dealt(
        self, client: int, content: bytes
    ) -> tuple[bytes, dict[int, tuple[bytes, bytes, bytes]]]:
        rest = body(content, Step.SHARES, self._context, SEED.size, DEALT)
        records = by_client(DEALT.iter_unpack(rest[SEED.size :]))
        if records.keys() != self._holders(client):
            malformed("other holders")
        return SEED.unpack_from(rest)[0], records

    def _read_useless(self, client: int, content: bytes) -> set[int]:
        rest = body(content, Step.DELIVERY, self._context, 0, CLIENT)
        return set(by_client(CLIENT.iter_unpack(rest)))

    def _read_revealed(self, client: int, content: bytes) -> dict[int, bytes]:
        rest = body(content, Step.REVEAL, self._context, 0, SHARE)
        return {owner: share for owner, (share,) in by_client(SHARE.iter_unpack(rest)).items()}
