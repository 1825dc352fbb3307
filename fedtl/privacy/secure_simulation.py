"""All ends of a secure sum in one process, with seeded randomness: hidden from nobody.

It is the protocol itself, message by message: sums, dropouts and cost are the real ones.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from fedtl import seeding
from fedtl.errors import FedtlError
from fedtl.privacy.masks import Randomness
from fedtl.privacy.ring import Ring
from fedtl.privacy.secure_client import ClientSide
from fedtl.privacy.secure_sum import MaskedSum
from fedtl.types import Int64

SERVER = -1
"""In place of a client's id."""


def seeded(seed: int, round: int, client: int) -> Randomness:
    """A client's randomness (or the SERVER's) in one round of a simulation."""
    return seeding.generator(seed, "secure sum", round, client).bytes


class LocalCarrier:
    """Clients of this process; who refuses does not answer."""

    def __init__(self, sides: Mapping[int, ClientSide]) -> None:
        self.sides = sides

    def carry(self, phase: str, messages: Mapping[int, bytes]) -> Mapping[int, bytes]:
        """See ``secure_sum.Carrier``."""
        answers = {}
        for client, content in messages.items():
            try:
                answers[client] = self.sides[client].answer(phase, content)
            except FedtlError:
                continue
        return answers

    def mask(self, client: int, vector: Ring) -> Ring:
        """A client's vector [P] as it would send it."""
        return self.sides[client].mask(vector)


class SimulatedSum(MaskedSum):
    """The whole protocol in one process; ``add`` takes vectors without masks and masks them.

    Args:
        clients, threshold, neighbours, bits, size, run, round: as for ``MaskedSum``.
        seed: of the run.
    """

    def __init__(
        self,
        clients: Int64,
        threshold: int,
        neighbours: int | None,
        bits: int,
        *,
        size: int,
        run: str,
        round: int,
        seed: int,
    ) -> None:
        sides = {c: ClientSide(seeded(seed, round, c)) for c in clients.tolist()}
        self._local = LocalCarrier(sides)
        super().__init__(
            clients,
            threshold,
            neighbours,
            bits,
            self._local,
            size=size,
            run=run,
            round=round,
            randomness=seeded(seed, round, SERVER),
        )

    def add(self, clients: Int64, vectors: Ring) -> None:
        """Mask and add, one client at a time."""
        for client, vector in zip(clients.tolist(), vectors, strict=True):
            masked = self._local.mask(client, vector)
            super().add(np.array([client]), masked[None])
