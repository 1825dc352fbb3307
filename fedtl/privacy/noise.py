"""Where the noise comes from: a seeded stream in simulation, the operating system elsewhere.

Whoever could guess the noise could take it off again. A simulated run is to be repeated, and
protects nobody, so its noise follows from the seed; real clients and their server draw theirs from
a generator for cryptography that the operating system keys afresh.

Both are normal deviates in float64, whose last bits are not those of a true Gaussian (Mironov,
CCS 2012). The system's are each made of four uniform pairs (Holohan and Braghin, ESORICS 2021),
which takes away the grid of values that the attack reads; what is proven, is proven of real
numbers.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from fedtl.types import Float64

SEEDED, SYSTEM = "seeded stream", "operating system"

SUMMED = 4
"""Deviates that one of the system's is made of."""

AT_A_TIME = 2**18
"""Deviates made in one go: some 20 MiB of random bytes and what becomes of them."""


class Noise(Protocol):
    """A stream of standard normal deviates.

    Attributes:
        source: "seeded stream" or "operating system".
        id: the same for streams that give the same numbers, and for no others.
    """

    @property
    def source(self) -> str:
        """See above."""

    @property
    def id(self) -> str:
        """See above."""

    def normal(self, size: int) -> Float64:
        """The next ``size`` deviates, float64 [size], independent N(0, 1)."""
        ...


@dataclass(frozen=True)
class Seeded:
    """Always the same numbers for the same key; for simulation alone.

    Attributes:
        key: of the stream, in [0, 2**64).
    """

    key: int
    _stream: np.random.Generator = field(repr=False, compare=False)
    source: str = SEEDED

    @property
    def id(self) -> str:
        """The key."""
        return f"seeded-{self.key:016x}"

    def normal(self, size: int) -> Float64:
        """See ``Noise``."""
        return self._stream.standard_normal(size)


@dataclass(frozen=True)
class System:
    """Numbers that nobody can foresee: ChaCha20 (RFC 8439) under a key of the operating system.

    Attributes:
        id: drawn anew.
    """

    id: str
    _cipher: Any = field(repr=False, compare=False)
    source: str = SYSTEM

    def normal(self, size: int) -> Float64:
        """See ``Noise``; by Box and Muller 1958, four for one."""
        out = np.empty(size)
        for first in range(0, size, AT_A_TIME):
            part = out[first : first + AT_A_TIME]
            part[:] = self._some(len(part))
        return out

    def _some(self, size: int) -> Float64:
        zeros = bytes(SUMMED * 8 * (size + size % 2))
        bits = np.frombuffer(self._cipher.update(zeros), np.uint64).reshape(2, -1)
        # in (0, 1]: the logarithm of the first is finite
        uniform = ((bits >> np.uint64(11)).astype(np.float64) + 1) * 2.0**-53
        radius = np.sqrt(-2 * np.log(uniform[0]))
        angle = 2 * np.pi * uniform[1]
        pairs = np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])
        four = pairs.reshape(SUMMED, -1).sum(axis=0) / np.sqrt(SUMMED)
        return np.asarray(four[:size])


def seeded(key: int) -> Seeded:
    """The stream of a 64-bit key (NumPy's Philox); ``seeding.key`` makes such keys."""
    return Seeded(key, np.random.Generator(np.random.Philox(key=key)))


def from_system() -> System:
    """A stream of the operating system's, another one each time."""
    from cryptography.hazmat.primitives.ciphers import Cipher, algorithms

    nonce = bytes(16)  # a key serves one stream only
    cipher = Cipher(algorithms.ChaCha20(secrets.token_bytes(32), nonce), mode=None)
    return System(f"system-{secrets.token_hex(16)}", cipher.encryptor())
