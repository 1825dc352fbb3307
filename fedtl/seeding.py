"""The one source of randomness: counter-based streams keyed by (seed, purpose, indices).

A stream depends on its key alone, never on what was drawn before, so any engine, block size,
worker count or resume draws the same numbers. Purposes are plain words ("cohort", "batches",
"partition", "split", "head"); indices are round, client and the like.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import numpy as np
import numpy.typing as npt


def _digest(seed: int, purpose: str, indices: Iterable[int], size: int) -> bytes:
    text = "/".join([str(int(seed)), purpose, *(str(int(i)) for i in indices)])
    return hashlib.blake2b(text.encode(), digest_size=size, person=b"fedtl-stream").digest()


def key(seed: int, purpose: str, *indices: int) -> int:
    """The 64-bit key of one stream, in [0, 2**64)."""
    return int.from_bytes(_digest(seed, purpose, indices, 8), "little")


def client_keys(
    seed: int, purpose: str, round: int, clients: npt.NDArray[np.int64]
) -> npt.NDArray[np.uint64]:
    """One 64-bit key per client: ``key(seed, purpose, round, client)`` for each, shape [k]."""
    return np.array([key(seed, purpose, round, c) for c in clients.tolist()], dtype=np.uint64)


def generator(seed: int, purpose: str, *indices: int) -> np.random.Generator:
    """A NumPy generator (Philox, counter-based) for one stream."""
    key128 = int.from_bytes(_digest(seed, purpose, indices, 16), "little")
    return np.random.Generator(np.random.Philox(key=key128))
