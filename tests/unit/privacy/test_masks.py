from __future__ import annotations

import numpy as np
import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from fedtl.errors import SecurityRefusal
from fedtl.privacy.masks import (
    add_mask,
    agreed,
    derived,
    opened,
    pair_mask_key,
    private_key,
    public_bytes,
    sealed,
    share_commitments,
    usable,
)

LOW_ORDER = [bytes(32), b"\1" + bytes(31), b"\xec" + b"\xff" * 30 + b"\x7f"]
"""0, 1 and -1 on the curve."""


def test_two_ends_agree_as_rfc_7748_has_it() -> None:
    alice = private_key(
        bytes.fromhex("77076d0a7318a57d3c16c17251b26645df4c2f87ebc0992ab177fba51db92c2a")
    )
    bob = private_key(
        bytes.fromhex("5dab087e624a8a4b79e17f8b83800ee66f3bb1292618b6fd1c2f8b27ff88e0eb")
    )
    assert public_bytes(alice) == bytes.fromhex(
        "8520f0098930a754748b7ddcb43ef75a0dbf3a0d26381af4eba4a98eaa9b4e6a"
    )
    expected = bytes.fromhex("4a5d9d5ba4ce2de1728e3bf480350f25e07e21c947d19e3376f09b3c1e161742")
    assert agreed(alice, public_bytes(bob)) == agreed(bob, public_bytes(alice)) == expected


def test_keys_are_derived_as_rfc_5869_has_it() -> None:
    expected = "8da4e775a563c18f715f802a063c5a31b8a11f5c5ee1879ec3454e5f3c738d2d"
    assert derived(b"\x0b" * 22, b"") == bytes.fromhex(expected)


@pytest.mark.parametrize("public", LOW_ORDER)
def test_a_key_of_low_order_is_of_no_use(public: bytes) -> None:
    assert not usable(public)
    with pytest.raises(SecurityRefusal):
        agreed(private_key(bytes(32)), public)
    assert usable(public_bytes(private_key(bytes(32))))


@pytest.mark.parametrize("dtype", [np.uint32, np.uint64])
@pytest.mark.parametrize("size", [0, 1, 5, 2**16, 3 * 2**15 + 1])  # a piece has 2^18 bytes
def test_a_mask_is_the_cipher_of_a_counter(dtype: type, size: int) -> None:
    key, vector = bytes(range(32)), np.zeros(size, dtype)
    add_mask(vector, key)
    blocks = b"".join(block.to_bytes(16, "big") for block in range(size // 2 + 1))
    drawn = Cipher(algorithms.AES(key), modes.ECB()).encryptor().update(blocks)
    assert vector.astype(f"<u{vector.itemsize}").tobytes() == drawn[: vector.nbytes]
    add_mask(vector, key, subtract=True)
    assert not vector.any()


def test_a_pair_has_one_key_and_each_pair_and_round_another() -> None:
    first, second = private_key(b"\1" * 32), private_key(b"\2" * 32)
    here, there = bytes(32), b"\1" * 32
    keys = {
        pair_mask_key(context, pair, own, other)
        for context in (here, there)
        for pair in ((3, 5), (5, 3), (3, 6))
        for own, other in ((first, public_bytes(second)), (second, public_bytes(first)))
    }
    assert len(keys) == 4  # two rounds and two pairs; not the order, nor whose end it is


def test_what_is_sealed_opens_only_as_it_was_meant() -> None:
    key, content, bound = b"\1" * 32, b"two shares", b"round 3, from 1 to 2"
    hidden = sealed(key, content, bound)
    assert opened(key, hidden, bound) == content
    assert opened(b"\2" * 32, hidden, bound) is None
    assert opened(key, hidden, b"round 4, from 1 to 2") is None
    for place in range(len(hidden)):
        changed = bytearray(hidden)
        changed[place] ^= 1
        assert opened(key, bytes(changed), bound) is None
    assert opened(key, b"", bound) is None


def test_a_commitment_tells_all_that_may_differ() -> None:
    shares = bytes(33), bytes(33)
    found = {
        commitment
        for context in (bytes(32), b"\1" * 32)
        for owner, holder in ((1, 2), (2, 1), (1, 3))
        for commitment in share_commitments(context, owner, holder, shares)
    }
    assert len(found) == 12
