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
    return _hash("/".join([str(int(seed)), purpose, *(str(int(i)) for i in indices)]), size)


def _hash(text: str, size: int) -> bytes:
    content = text.encode("utf-8", "surrogateescape")  # folder names may be any bytes
    return hashlib.blake2b(content, digest_size=size, person=b"fedtl-stream").digest()


def _key64(text: str) -> int:
    return int.from_bytes(_hash(text, 8), "little")


def key(seed: int, purpose: str, *indices: int) -> int:
    """The 64-bit key of one stream, in [0, 2**64)."""
    return int.from_bytes(_digest(seed, purpose, indices, 8), "little")


def client_keys(
    seed: int, purpose: str, round: int, clients: npt.NDArray[np.int64]
) -> npt.NDArray[np.uint64]:
    """One 64-bit key per client: ``key(seed, purpose, round, client)`` for each, shape [k]."""
    return np.array([key(seed, purpose, round, c) for c in clients.tolist()], dtype=np.uint64)


def named_keys(seed: int, purpose: str, names: Iterable[str]) -> npt.NDArray[np.uint64]:
    """One 64-bit key per name, uint64 [K]: a client draws the same whoever else there is."""
    prefix = f"{int(seed)}/{purpose}/name:"
    return np.array([_key64(prefix + name) for name in names], dtype=np.uint64)


def counted(
    keys: npt.NDArray[np.uint64], counters: npt.NDArray[np.int64]
) -> npt.NDArray[np.uint64]:
    """Number ``counters[i]`` of the splitmix64 stream of ``keys[i]``, for whole arrays at once.

    Source: Steele, Lea and Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014.
    """
    state = keys + (counters.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.asarray(state ^ (state >> np.uint64(31)))


def fractions(numbers: npt.NDArray[np.uint64]) -> npt.NDArray[np.float64]:
    """Random 64-bit numbers as float64 in [0, 1)."""
    return np.asarray((numbers >> np.uint64(11)).astype(np.float64) * 2.0**-53)


def generator(seed: int, purpose: str, *indices: int) -> np.random.Generator:
    """A NumPy generator (Philox, counter-based) for one stream."""
    key128 = int.from_bytes(_digest(seed, purpose, indices, 16), "little")
    return np.random.Generator(np.random.Philox(key=key128))
