"""Real numbers as integers modulo 2^32 or 2^64, so that their sum is exact whatever the order.

A value v is sent as q = round(scale * v) mod 2^bits. As long as every client's |q| is at most
``limit``, and clients * limit < 2^(bits - 1), the sum in the ring is the sum of the integers. Each
client checks its own part before it sends, so that nothing can wrap unseen. The sum of K values is
off by at most K / (2 * scale).

Source: Bonawitz et al., "Federated Learning with Autotuned Communication-Efficient Secure
Aggregation", Asilomar 2019, section II.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from fedtl.errors import InputError
from fedtl.types import Float64, Int64

Ring = npt.NDArray[np.unsignedinteger[Any]]
"""Entries of a ring, uint32 or uint64."""

LEAST_LIMIT = 2**10
"""Fewer steps than this on either side of zero are too coarse to be of use."""


class Beyond(InputError):
    """An entry does not fit into the ring's share of one client."""


def ring_dtype(bits: int) -> np.dtype[Any]:
    """uint32 or uint64."""
    assert bits in (32, 64), bits
    return np.dtype(np.uint32 if bits == 32 else np.uint64)


def scale_for(value_range: float, num_clients: int, bits: int) -> tuple[float, int]:
    """The finest scale at which values up to ``value_range`` fit, and the largest integer to send.

    The scale is a power of two: whole numbers, such as counts, come out of the sum as they were.

    Args:
        value_range: largest size of a value, above 0 and finite.
        num_clients: whose values may be summed, at least 1.
        bits: 32 or 64.

    Returns:
        scale, and limit with num_clients * limit < 2^(bits - 1) and scale * value_range <= limit.

    Raises:
        InputError: so many clients, that too few integers are left for each.
    """
    assert num_clients >= 1, num_clients
    assert 0.0 < value_range < math.inf, value_range
    limit = (ring_dtype(bits).type(-1 % 2**bits).item() // 2) // num_clients
    if limit < LEAST_LIMIT:
        raise InputError(
            f"the sum of so many clients does not fit into {bits} bits",
            got=f"{num_clients} clients",
            allowed=f"at most {(2 ** (bits - 1) - 1) // LEAST_LIMIT}",
            do="Ask fewer clients in a round",
        )
    exponent = math.frexp(limit)[1] - math.frexp(value_range)[1]
    scale = math.ldexp(1.0, min(exponent, 1000))  # for a tiny range still a number
    while scale * value_range > limit:
        scale /= 2.0
    return scale, limit


def quantise(values: npt.ArrayLike, scale: float, limit: int, bits: int) -> Ring:
    """Values as entries of the ring, rounded to even; of their shape.

    Raises:
        Beyond: an entry is not finite, or its integer is larger than ``limit``. The entry itself
            is not told: it is private.
    """
    assert 0 <= limit < 2 ** (bits - 1), limit
    with np.errstate(over="ignore", invalid="ignore"):
        scaled = np.rint(np.asarray(values, np.float64) * scale)
    largest = float(np.abs(scaled).max(initial=0.0))
    if not largest <= limit:  # also where one is no number
        if not np.isfinite(values).all():
            raise Beyond("an entry that is not finite")
        raise Beyond(
            "an entry too large for the secure sum (privacy.value_range)",
            allowed=f"up to {limit / scale:g}",
            do="Raise privacy.value_range, or train more gently",
        )
    return scaled.astype(np.int32 if bits == 32 else np.int64).view(ring_dtype(bits))


def to_signed(total: Ring, bits: int) -> Int64:
    """Entries of the ring as the whole numbers from -2^(bits-1) that they stand for, int64."""
    assert total.dtype == ring_dtype(bits), total.dtype
    return total.view(np.int32 if bits == 32 else np.int64).astype(np.int64)


def to_values(total: Ring, scale: float, bits: int) -> Float64:
    """Entries of the ring as the real numbers that they stand for, float64."""
    return to_signed(total, bits) / scale
