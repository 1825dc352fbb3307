"""Secrets of 32 bytes dealt out in shares: any ``threshold`` of them give it back, fewer nothing.

Source: Shamir, "How to share a secret", CACM 1979, over the integers modulo the smallest prime
above 2^256. Holder h, an id from 0, has the polynomial's value at h + 1.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache

PRIME = 2**256 + 297
SECRET_BYTES = 32
SHARE_BYTES = 33

_COEFFICIENT_BYTES = 48
"""128 bits more than the prime has, so that the remainder is as good as uniform."""


def split(
    secret: bytes, holders: Iterable[int], threshold: int, randomness: Callable[[int], bytes]
) -> dict[int, bytes]:
    """A share of SHARE_BYTES for each holder; ``randomness(n)`` gives n fresh random bytes."""
    assert len(secret) == SECRET_BYTES
    drawn = randomness(_COEFFICIENT_BYTES * (threshold - 1))
    coefficients = [  # the highest power's first
        int.from_bytes(drawn[first : first + _COEFFICIENT_BYTES], "big") % PRIME
        for first in range(0, len(drawn), _COEFFICIENT_BYTES)
    ]
    constant = int.from_bytes(secret, "big")
    shares = {}
    for holder in holders:
        place, value = holder + 1, 0
        for coefficient in coefficients:
            value = (value + coefficient) * place % PRIME
        shares[holder] = ((value + constant) % PRIME).to_bytes(SHARE_BYTES, "big")
    return shares


def join(shares: Mapping[int, bytes]) -> bytes | None:
    """The secret that these shares of as many holders as the threshold lie on.

    None where they lie on no secret of SECRET_BYTES; wrong shares may also give a wrong secret.
    """
    holders = tuple(sorted(shares))
    value = sum(
        weight * int.from_bytes(shares[holder], "big")
        for holder, weight in zip(holders, _weights(holders), strict=True)
    )
    value %= PRIME
    return value.to_bytes(SECRET_BYTES, "big") if value < 2 ** (8 * SECRET_BYTES) else None


@lru_cache(maxsize=16)  # where all share with all, the same holders give back every secret
def _weights(holders: tuple[int, ...]) -> tuple[int, ...]:
    """Lagrange's weights of the polynomial's value at 0."""
    places = [holder + 1 for holder in holders]
    weights = []
    for place in places:
        above, below = 1, 1
        for other in places:
            if other != place:
                above = above * other % PRIME
                below = below * (other - place) % PRIME
        weights.append(above * pow(below, -1, PRIME) % PRIME)
    return tuple(weights)
