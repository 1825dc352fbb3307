"""A secure sum whose messages can be lost or changed on their way, for tests."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from fedtl.privacy.ring import Ring, ring_dtype
from fedtl.privacy.secure_client import ClientSide
from fedtl.privacy.secure_messages import PHASES, Step
from fedtl.privacy.secure_simulation import SERVER, LocalCarrier, seeded
from fedtl.privacy.secure_sum import MaskedSum

Change = Callable[[Step, int, bytes], bytes | None]


class Carrier(LocalCarrier):
    """Loses the messages to some clients at some steps, and changes answers (None: lost)."""

    def __init__(
        self, clients: list[int], seed: int, lost: Mapping[Step, set[int]], change: Change
    ) -> None:
        super().__init__({c: ClientSide(seeded(seed, 1, c)) for c in clients})
        self.lost, self.change = lost, change
        self.asked: list[tuple[Step, set[int]]] = []
        self.sent: dict[tuple[Step, int], bytes] = {}
        self.answers: dict[tuple[Step, int], bytes] = {}

    def carry(self, phase: str, messages: Mapping[int, bytes]) -> Mapping[int, bytes]:
        step = Step(next(iter(messages.values()))[1])
        assert phase == PHASES[step]
        self.asked.append((step, set(messages)))
        self.sent |= {(step, c): content for c, content in messages.items()}
        reached = {c: m for c, m in messages.items() if c not in self.lost.get(step, ())}
        answers = super().carry(phase, reached)
        self.answers |= {(step, c): content for c, content in answers.items()}
        changed = {c: self.change(step, c, content) for c, content in answers.items()}
        return {c: content for c, content in changed.items() if content is not None}


def secure_sum(
    clients: list[int],
    threshold: int = 2,
    neighbours: int | None = None,
    bits: int = 32,
    *,
    size: int = 7,
    seed: int = 1,
    run: str = "run",
    lost: Mapping[Step, set[int]] | None = None,
    change: Change = lambda step, client, content: content,
) -> tuple[MaskedSum, Carrier]:
    carrier = Carrier(clients, seed, lost or {}, change)
    total = MaskedSum(
        np.array(clients),
        threshold,
        neighbours,
        bits,
        carrier,
        size=size,
        run=run,
        round=1,
        randomness=seeded(seed, 1, SERVER),
    )
    return total, carrier


def vectors_for(
    clients: list[int], size: int = 7, bits: int = 32, seed: int = 0
) -> dict[int, Ring]:
    random = np.random.default_rng(seed)
    drawn = random.integers(0, 2**bits, (len(clients), size), dtype=ring_dtype(bits))
    return dict(zip(clients, drawn, strict=True))


def plain(vectors: Mapping[int, Ring], clients: list[int], bits: int) -> Ring:
    """The sum, one whole number at a time."""
    columns = zip(*(vectors[c].tolist() for c in clients), strict=True)
    return np.array([sum(column) % 2**bits for column in columns], ring_dtype(bits))


def play(
    total: MaskedSum, carrier: Carrier, vectors: Mapping[int, Ring], senders: set[int]
) -> tuple[Ring, list[int]]:
    """A whole round, in which some of those that agreed send their vectors."""
    for client in total.begin().tolist():
        if client in senders:
            total.add(np.array([client]), carrier.mask(client, vectors[client])[None])
    summed, survivors = total.finish()
    return summed, survivors.tolist()
