"""The secure sum's messages: a header, then records of one fixed size; read with suspicion.

Little-endian. A header is the format's number, the step and 32 bytes that bind the message to one
attempt at one round of one run.
"""

from __future__ import annotations

from collections.abc import Iterable
from enum import IntEnum
from struct import Struct
from typing import Any, NoReturn

from fedtl.errors import SecurityRefusal
from fedtl.privacy.masks import KEY_BYTES, TAG_BYTES, committed
from fedtl.privacy.shamir import SHARE_BYTES

FORMAT = 1


class Step(IntEnum):
    """What the server asks, in this order; the masked vector comes before the last."""

    KEYS = 1
    SHARES = 2
    DELIVERY = 3
    REVEAL = 4


PHASES = {
    Step.KEYS: "secagg_keys",
    Step.SHARES: "secagg_shares",
    Step.DELIVERY: "secagg_shares",
    Step.REVEAL: "secagg_reveal",
}
"""The phase in which a step's message is carried."""

MOST_NEIGHBOURS = 10_000
SEALED_BYTES = 2 * SHARE_BYTES + TAG_BYTES

HEADER = Struct("<BB32s")
START = Struct("<BBQIB32s16s")
"""Of the very first message: format, step, whose, round, bits, digest of the run, session."""
KEYS = Struct(f"<{KEY_BYTES}s{KEY_BYTES}s")
"""A client's public keys: for sealing, for masks."""
ASKED = Struct("<I")
"""Shares that give a secret back."""
NEIGHBOUR = Struct(f"<Q{KEY_BYTES}s{KEY_BYTES}s")
"""A neighbour and its public keys."""
SEED = Struct("<32s")
"""The commitment to a client's own seed."""
DEALT = Struct(f"<Q{SEALED_BYTES}s32s32s")
"""Holder (from the owner) or owner (to a holder), both shares sealed, the commitments to the seed's
and to the key's share; zeros for the seal of what the owner keeps itself."""
CLIENT = Struct("<Q")
SHARE = Struct(f"<Q{SHARE_BYTES}s")
"""Owner and one share; of which secret is known from whether the owner survived."""


def start(client: int, round: int, bits: int, run: bytes, session: bytes) -> bytes:
    """The message that opens a round with one client."""
    return START.pack(FORMAT, Step.KEYS, client, round, bits, run, session)


def context_of(content: bytes) -> bytes:
    """What all later messages are bound to: the opening one, but for whose it is."""
    return committed(b"fedtl secure sum" + content[:2], content[10:])


def opened_start(content: bytes) -> tuple[int, int, int]:
    """Client, round and bits of an opening message. Raises SecurityRefusal."""
    if len(content) != START.size:
        malformed(f"{len(content)} bytes")
    version, step, client, round, bits, _, _ = START.unpack(content)
    if version != FORMAT or step != Step.KEYS or bits not in (32, 64):
        malformed("another form")
    return client, round, bits


def message(step: Step, context: bytes, *parts: bytes) -> bytes:
    """One message."""
    return HEADER.pack(FORMAT, step, context) + b"".join(parts)


def body(content: bytes, step: Step, context: bytes, lead: int, record: Struct) -> memoryview:
    """The message without its header, ``lead`` bytes and then whole records.

    Raises:
        SecurityRefusal: it has another size, or belongs to another step, round or run.
    """
    rest = len(content) - HEADER.size - lead
    if rest < 0 or rest % record.size or rest // record.size > MOST_NEIGHBOURS + 1:
        malformed(f"{len(content)} bytes")
    version, found, bound = HEADER.unpack_from(content)
    if version != FORMAT or found != step:
        malformed("another form or step")
    if bound != context:
        raise SecurityRefusal("a message of the secure sum belongs to another round or run")
    return memoryview(content)[HEADER.size :]


def by_client(records: Iterable[tuple[Any, ...]]) -> dict[int, tuple[Any, ...]]:
    """Records by the client that each begins with. Raises SecurityRefusal: one comes twice."""
    found: dict[int, tuple[Any, ...]] = {}
    for client, *rest in records:
        if client in found:
            malformed("a client twice")
        found[client] = tuple(rest)
    return found


def malformed(got: str) -> NoReturn:
    """Refuse what is no message of ours."""
    raise SecurityRefusal("a message of the secure sum is malformed", got=got)
