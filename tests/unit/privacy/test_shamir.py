from __future__ import annotations

from fractions import Fraction
from itertools import combinations

import numpy as np
import pytest

from fedtl.privacy import shamir


def test_a_known_polynomial() -> None:
    """1234 + 166 x + 94 x^2, the textbook example of Shamir's scheme."""
    coefficients = b"".join(v.to_bytes(48, "big") for v in (94, 166))
    shares = shamir.split((1234).to_bytes(32, "big"), range(6), 3, lambda n: coefficients[:n])
    values = [int.from_bytes(shares[holder], "big") for holder in range(6)]
    assert values == [1494, 1942, 2578, 3402, 4414, 5614]
    secret = shamir.join({holder: shares[holder] for holder in (1, 3, 4)})
    assert secret == (1234).to_bytes(32, "big")


def lagrange(shares: dict[int, bytes]) -> int:
    """The value at 0 over the rational numbers, then modulo the prime."""
    total = 0
    for holder, share in shares.items():
        weight = Fraction(1)
        for other in shares.keys() - {holder}:
            weight *= Fraction(other + 1, other - holder)
        inverse = pow(weight.denominator, -1, shamir.PRIME)
        total += int.from_bytes(share, "big") * weight.numerator * inverse
    return total % shamir.PRIME


@pytest.mark.parametrize("threshold", [1, 2, 4, 5])
@pytest.mark.parametrize("secret", [bytes(32), b"\xff" * 32, bytes(range(32))])
def test_any_threshold_of_shares_gives_the_secret(threshold: int, secret: bytes) -> None:
    holders = [0, 3, 17, 2**40, 2**62]
    shares = shamir.split(secret, holders, threshold, np.random.default_rng(0).bytes)
    assert {len(share) for share in shares.values()} == {shamir.SHARE_BYTES}
    for chosen in combinations(holders, threshold):
        some = {holder: shares[holder] for holder in chosen}
        assert shamir.join(some) == secret
        assert lagrange(some) == int.from_bytes(secret, "big")


def test_fewer_shares_fit_any_secret() -> None:
    """With threshold - 1 shares, each other secret has one last share that leads to it."""
    secret, other = b"\1" * 32, b"\2" * 32
    shares = shamir.split(secret, range(5), 3, np.random.default_rng(0).bytes)
    known = {holder: shares[holder] for holder in (0, 4)}
    value = {**known, 2: bytes(33)}
    rest = int.from_bytes(other, "big") - lagrange(value)
    unit = lagrange({0: bytes(33), 4: bytes(33), 2: (1).to_bytes(33, "big")})
    last = rest * pow(unit, -1, shamir.PRIME) % shamir.PRIME
    assert shamir.join({**known, 2: last.to_bytes(33, "big")}) == other


def test_shares_of_one_secret_look_uniform() -> None:
    random = np.random.default_rng(0).bytes
    values = [shamir.split(bytes(32), [5], 2, random)[5] for _ in range(4000)]
    top = np.array([int.from_bytes(v, "big") / shamir.PRIME for v in values])
    counts = np.histogram(top, 16, (0.0, 1.0))[0]
    # Chi-square with 15 degrees of freedom: above 52.1 once in 200,000 draws; the seed is fixed.
    assert ((counts - 250) ** 2 / 250).sum() < 52.1


def test_no_secret_on_wrong_shares() -> None:
    """A value of the field above 2^256 is no secret, and shares need not be below the prime."""
    assert shamir.join({0: (2**256 + 5).to_bytes(33, "big")}) is None
    assert shamir.join({0: b"\xff" * 33}) is not None
