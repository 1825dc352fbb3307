"""Keys that two clients agree on, the masks drawn from them, and shares sealed with them.

X25519 and HKDF-SHA256 make a key, AES-256 in counter mode draws a mask from it, AES-256-GCM seals.
Each key is derived for one purpose of one round (``info``) and used once, so that a fixed nonce is
no repeated one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import numpy as np
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from fedtl.errors import SecurityRefusal
from fedtl.privacy.ring import Ring

Randomness = Callable[[int], bytes]
"""n -> n random bytes: ``os.urandom``, or in simulation a seeded stream."""

KEY_BYTES = 32
TAG_BYTES = 16

_NONCE = bytes(12)
_ANY_KEY = X25519PrivateKey.from_private_bytes(bytes(range(32)))
_ZEROS = bytes(2**18)
"""What is encrypted to draw a mask, a piece at a time: the piece stays in the processor's cache."""


def private_key(secret: bytes) -> X25519PrivateKey:
    """The key pair of 32 secret bytes."""
    return X25519PrivateKey.from_private_bytes(secret)


def public_bytes(key: X25519PrivateKey) -> bytes:
    """What others may know of it, 32 bytes."""
    return key.public_key().public_bytes_raw()


def derived(secret: bytes, info: bytes) -> bytes:
    """The key of 32 bytes for the purpose ``info``: HKDF-SHA256 (RFC 5869) without salt."""
    return HKDF(SHA256(), KEY_BYTES, None, info).derive(secret)


def agreed(own: X25519PrivateKey, other: bytes) -> bytes:
    """The secret of 32 bytes that both ends of a pair of keys come to (RFC 7748).

    Raises:
        SecurityRefusal: the other's public key is of low order: the secret would be known to all.
    """
    try:
        return own.exchange(X25519PublicKey.from_public_bytes(other))
    except ValueError as error:
        raise SecurityRefusal("a public key of the secure sum is not usable") from error


def bound_to(context: bytes, purpose: bytes, owner: int, holder: int) -> bytes:
    """A purpose of four bytes in one round (``context``, 32 bytes) and between two clients."""
    return context + purpose + owner.to_bytes(8, "little") + holder.to_bytes(8, "little")


def usable(public: bytes) -> bool:
    """Whether others come to a secret with this public key."""
    try:
        agreed(_ANY_KEY, public)
    except SecurityRefusal:
        return False
    return True


def committed(context: bytes, content: bytes) -> bytes:
    """SHA-256 of what it is bound to, of a fixed size, and of the content."""
    return hashlib.sha256(context + content).digest()


def seed_commitment(context: bytes, client: int, seed: bytes) -> bytes:
    """What a client tells of the seed of its own mask, 32 bytes."""
    return committed(bound_to(context, b"seed", client, client), seed)


def share_commitments(
    context: bytes, owner: int, holder: int, shares: tuple[bytes, bytes]
) -> tuple[bytes, bytes]:
    """What the owner tells of a holder's shares of its seed and of its masking key."""
    seed, key = (bound_to(context, purpose, owner, holder) for purpose in (b"s-sh", b"k-sh"))
    return committed(seed, shares[0]), committed(key, shares[1])


def own_mask_key(context: bytes, client: int, seed: bytes) -> bytes:
    """The key of the mask that a client draws from its own seed."""
    return derived(seed, bound_to(context, b"self", client, client))


def pair_mask_key(
    context: bytes, pair: tuple[int, int], own: X25519PrivateKey, other: bytes
) -> bytes:
    """The key of the mask of a pair of clients, from either one's key and the other's public one.

    The smaller id adds the mask, the larger one subtracts it.
    """
    return derived(agreed(own, other), bound_to(context, b"mask", min(pair), max(pair)))


def dealing_key(context: bytes, owner: int, holder: int, secret: bytes) -> bytes:
    """The key that seals the owner's shares for a holder, from what the two agreed on."""
    return derived(secret, bound_to(context, b"deal", owner, holder))


def sealed(key: bytes, content: bytes, bound: bytes) -> bytes:
    """Content that only the key opens, and only together with ``bound``; TAG_BYTES longer."""
    return AESGCM(key).encrypt(_NONCE, content, bound)


def opened(key: bytes, content: bytes, bound: bytes) -> bytes | None:
    """The content, or None where it was sealed by somebody else, for something else, or changed."""
    try:
        return AESGCM(key).decrypt(_NONCE, content, bound)
    except InvalidTag:
        return None


def add_mask(vector: Ring, key: bytes, *, subtract: bool = False) -> None:
    """Add the key's mask to a contiguous vector in place, or take it off."""
    draw = Cipher(algorithms.AES(key), modes.CTR(bytes(16))).encryptor()
    buffer = bytearray(min(vector.nbytes, len(_ZEROS)))
    mask = np.frombuffer(buffer, vector.dtype.newbyteorder("<"))
    zeros = memoryview(_ZEROS)
    for first in range(0, len(vector), max(1, len(mask))):
        piece = vector[first : first + len(mask)]
        draw.update_into(zeros[: piece.nbytes], buffer)
        if subtract:
            np.subtract(piece, mask[: len(piece)], out=piece)
        else:
            np.add(piece, mask[: len(piece)], out=piece)
