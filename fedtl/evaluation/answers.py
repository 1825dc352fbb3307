"""Which test examples heads have right: remembered until heads are compared, then forgotten."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fedtl.clients.evaluation import Right
from fedtl.evaluation.significance import Pairs
from fedtl.types import Int64


@dataclass(frozen=True)
class Answers:
    """The answers of k clients' heads, or of one head that they share.

    Attributes:
        own: right or not, on the clients' own tests, client after client, bool [n].
        tests: how many each client has, int64 [k].
        everyone: the same on everybody's, packed bits uint8 [k, ceil(m / 8)], [1, ...] if shared.
        num_everyone: m.
    """

    own: npt.NDArray[np.bool_]
    tests: Int64
    everyone: npt.NDArray[np.uint8]
    num_everyone: int

    @staticmethod
    def of(own: Right, everyone: Right) -> Answers:
        """From answers head by head; ``everyone`` has those of each client, or of one head."""
        num_everyone = len(everyone[0]) if everyone else 0
        rows = np.array(everyone, np.bool_).reshape(len(everyone), num_everyone)
        return Answers(
            np.concatenate([np.empty(0, np.bool_), *own]),
            np.array([len(answers) for answers in own], np.int64),
            np.packbits(rows, axis=1),
            num_everyone,
        )

    @staticmethod
    def join(parts: Sequence[Answers]) -> Answers:
        """Those of several groups of clients as one; at least one group."""
        return Answers(
            np.concatenate([part.own for part in parts]),
            np.concatenate([part.tests for part in parts]),
            np.concatenate([part.everyone for part in parts]),
            parts[0].num_everyone,
        )

    def at_home(self, other: Answers) -> Pairs:
        """These heads against others of the same clients, on the clients' own tests."""
        ends = np.concatenate([[0], np.cumsum(self.tests)])
        beats, loses = (
            np.diff(np.concatenate([[0], np.cumsum(only)])[ends])
            for only in (self.own & ~other.own, other.own & ~self.own)
        )
        return Pairs(beats, loses, self.tests)

    def everywhere(self, other: Answers) -> Pairs:
        """The same on everybody's tests."""
        beats, loses = (
            np.bitwise_count(only).sum(axis=1, dtype=np.int64)
            for only in (self.everyone & ~other.everyone, other.everyone & ~self.everyone)
        )
        size = len(self.tests)
        return Pairs(
            np.broadcast_to(beats, size),
            np.broadcast_to(loses, size),
            np.full(size, self.num_everyone),
        )
