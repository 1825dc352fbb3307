"""Which examples a client sees in which order: one permutation per client, round and epoch.

The order is a Fisher-Yates shuffle driven by a counter-based splitmix64 stream (Steele, Lea and
Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014), so it is a function of the
client's key and the epoch alone. Indices are drawn without bias by Lemire's rejection ("Fast random
integer generation in an interval", 2019) on the upper 32 bits. Every training path takes its
batches as consecutive slices of this one order; the last batch may be shorter.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from fedtl.types import Int64

GAMMA = np.uint64(0x9E3779B97F4A7C15)
"""From one number of a stream to the next."""
_FIRST = np.uint64(0xBF58476D1CE4E5B9)
_SECOND = np.uint64(0x94D049BB133111EB)
_LOW = np.uint64(0xFFFFFFFF)
_SPAN = np.uint64(1 << 32)
_ONE = np.uint64(1)


@njit(nogil=True, cache=True)
def mix(state: np.uint64) -> np.uint64:
    """The number of a stream that stands at ``state``."""
    state = (state ^ (state >> np.uint64(30))) * _FIRST
    state = (state ^ (state >> np.uint64(27))) * _SECOND
    return state ^ (state >> np.uint64(31))


@njit(nogil=True, cache=True)
def stream_start(key: np.uint64, which: int) -> np.uint64:
    """Where stream ``which`` (0 or more) of a key starts; its numbers are mix(start + i * GAMMA)
    for i = 1, 2, ... ``which`` is mixed before it meets the key: neighbours share no part."""
    return mix(key ^ mix((np.uint64(which) + _ONE) * GAMMA))


@njit(nogil=True, cache=True)
def fill_order(key: np.uint64, epoch: int, order: Int64) -> None:
    """Write the permutation of ``len(order)`` examples into ``order`` (int64, below 2**32)."""
    for position in range(len(order)):
        order[position] = position
    counter = stream_start(key, epoch)
    for last in range(len(order) - 1, 0, -1):
        bound = np.uint64(last + 1)
        counter += GAMMA
        product = (mix(counter) >> np.uint64(32)) * bound
        if product & _LOW < bound:
            threshold = (_SPAN - bound) % bound
            while product & _LOW < threshold:
                counter += GAMMA
                product = (mix(counter) >> np.uint64(32)) * bound
        other = np.int64(product >> np.uint64(32))
        order[last], order[other] = order[other], order[last]


def batch_order(key: int, num_examples: int, epoch: int) -> Int64:
    """The order in which a client uses its examples in one epoch.

    Args:
        key: the client's 64-bit key of the round, in [0, 2**64).
        num_examples: n, in [0, 2**32).
        epoch: 0 for the first local epoch.

    Returns:
        A permutation of ``range(n)``, int64 [n]; batch b is ``order[b * size:(b + 1) * size]``.
    """
    order = np.empty(num_examples, dtype=np.int64)
    fill_order(np.uint64(key), epoch, order)
    return order
