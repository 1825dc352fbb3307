"""The client's end of a secure sum: what it tells, when, and what it refuses to tell."""

from __future__ import annotations

from dataclasses import dataclass, field

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from fedtl.errors import SecurityRefusal
from fedtl.privacy import shamir
from fedtl.privacy.masks import (
    Randomness,
    add_mask,
    agreed,
    bound_to,
    dealing_key,
    opened,
    own_mask_key,
    pair_mask_key,
    private_key,
    public_bytes,
    sealed,
    seed_commitment,
    share_commitments,
)
from fedtl.privacy.ring import Ring, ring_dtype
from fedtl.privacy.secure_graph import shares_needed
from fedtl.privacy.secure_messages import (
    ASKED,
    CLIENT,
    DEALT,
    KEYS,
    NEIGHBOUR,
    PHASES,
    SEALED_BYTES,
    SEED,
    SHARE,
    Step,
    body,
    by_client,
    context_of,
    malformed,
    message,
    opened_start,
)


@dataclass
class _Secrets:
    """What a client holds during one round, and forgets after it."""

    sealing: X25519PrivateKey
    masking: X25519PrivateKey
    seed: bytes
    threshold: int = 0
    keys: dict[int, bytes] = field(default_factory=dict)
    """Neighbours' public keys for masks."""
    common: dict[int, bytes] = field(default_factory=dict)
    """Secrets agreed with neighbours, for sealing."""
    held: dict[int, tuple[bytes, bytes] | None] = field(default_factory=dict)
    """Shares of seed and key of each client that gave out any, its own too; None: unusable."""


class ClientSide:
    """One client in one round; it answers each phase once, in order, and reveals once.

    Of every neighbour it reveals the share of the seed or that of the key, never both, and only
    where more than half of those who hold shares are said to have survived: so no two lists of
    survivors, told to different clients, give away both secrets of anybody.

    Args:
        randomness: ``os.urandom``, but for simulations.
    """

    def __init__(self, randomness: Randomness) -> None:
        self._randomness = randomness
        self._next: Step | None = Step.KEYS
        self._masked = False
        self._secrets: _Secrets | None = None
        self._context = b""
        self._bits = 0
        self.client = -1
        """Its id, from the first phase on."""
        self.round = 0
        """The round that all this is bound to, from the first phase on."""

    def answer(self, phase: str, content: bytes) -> bytes:
        """The answer to a phase's message.

        Raises:
            SecurityRefusal: the message is malformed, out of order, of another round, or asks for
                what would unmask a single client. Nothing was told and nothing has changed.
        """
        step = self._next
        if step is None or phase != PHASES[step] or (step is Step.REVEAL and not self._masked):
            raise SecurityRefusal("a phase of the secure sum is out of order or repeated")
        if step is Step.KEYS:
            reply = self._keys(content)
        elif step is Step.SHARES:
            reply = self._deal(content)
        elif step is Step.DELIVERY:
            reply = self._take(content)
        else:
            reply = self._reveal(content)
        self._next = Step(step + 1) if step is not Step.REVEAL else None
        return reply

    def mask(self, vector: Ring) -> Ring:
        """The vector [P] under its own mask and those shared with the neighbours, once.

        Raises:
            SecurityRefusal: it is not the time for it, or it was done: two vectors under the same
                masks would tell their difference.
        """
        if self._next is not Step.REVEAL or self._masked:
            raise SecurityRefusal("a vector for the secure sum is out of order or repeated")
        assert vector.dtype == ring_dtype(self._bits), vector.dtype
        own, total = self._own(), vector.copy()
        add_mask(total, own_mask_key(self._context, self.client, own.seed))
        for other in own.held.keys() - {self.client}:
            pair = self.client, other
            key = pair_mask_key(self._context, pair, own.masking, own.keys[other])
            add_mask(total, key, subtract=other < self.client)
        self._masked = True
        return total

    def _own(self) -> _Secrets:
        assert self._secrets is not None
        return self._secrets

    def _keys(self, content: bytes) -> bytes:
        """Make fresh keys, tell the public ones."""
        self.client, self.round, self._bits = opened_start(content)
        self._context = context_of(content)
        random = self._randomness
        own = _Secrets(private_key(random(32)), private_key(random(32)), random(32))
        self._secrets = own
        public = KEYS.pack(public_bytes(own.sealing), public_bytes(own.masking))
        return message(Step.KEYS, self._context, public)

    def _deal(self, content: bytes) -> bytes:
        """Give every neighbour a share of the seed and of the masking key, sealed."""
        own, rest = self._own(), body(content, Step.SHARES, self._context, ASKED.size, NEIGHBOUR)
        (threshold,) = ASKED.unpack_from(rest)
        keys = by_client(NEIGHBOUR.iter_unpack(rest[ASKED.size :]))
        holders = sorted({*keys, self.client})
        if self.client in keys:
            malformed("itself among its neighbours")
        if not shares_needed(len(holders)) <= threshold <= len(holders) or threshold < 2:
            raise SecurityRefusal(
                "the secure sum asks for too few neighbours, or lets too few of them unmask",
                got=f"{threshold} of {len(holders)}",
                allowed="more than half, at least 2",
            )
        seeds = shamir.split(own.seed, holders, threshold, self._randomness)
        masking = own.masking.private_bytes_raw()
        masks = shamir.split(masking, holders, threshold, self._randomness)
        common = {holder: agreed(own.sealing, public) for holder, (public, _) in keys.items()}
        records = []
        for holder in holders:
            shares = seeds[holder], masks[holder]
            hidden = bytes(SEALED_BYTES)
            if holder != self.client:
                pair = self.client, holder
                key = dealing_key(self._context, *pair, common[holder])
                hidden = sealed(key, b"".join(shares), bound_to(self._context, b"deal", *pair))
            commitments = share_commitments(self._context, self.client, holder, shares)
            records.append(DEALT.pack(holder, hidden, *commitments))
        own.threshold, own.common = threshold, common
        own.keys = {holder: public for holder, (_, public) in keys.items()}
        own.held = {self.client: (seeds[self.client], masks[self.client])}
        promise = SEED.pack(seed_commitment(self._context, self.client, own.seed))
        return message(Step.SHARES, self._context, promise, *records)

    def _take(self, content: bytes) -> bytes:
        """Take the neighbours' shares; tell whose are of no use."""
        own, rest = self._own(), body(content, Step.DELIVERY, self._context, 0, DEALT)
        dealt = by_client(DEALT.iter_unpack(rest))
        if not dealt.keys() <= own.keys.keys() or len(dealt) + 1 < own.threshold:
            raise SecurityRefusal("the secure sum names wrong neighbours, or too few")
        held = {owner: self._opened(own, owner, *record) for owner, record in dealt.items()}
        bad = [CLIENT.pack(owner) for owner, shares in held.items() if shares is None]
        own.held |= held
        return message(Step.DELIVERY, self._context, *bad)

    def _opened(
        self, own: _Secrets, owner: int, hidden: bytes, *promised: bytes
    ) -> tuple[bytes, bytes] | None:
        """A neighbour's shares of its seed and its masking key, if they are what it promised."""
        pair = owner, self.client
        key = dealing_key(self._context, *pair, own.common[owner])
        content = opened(key, hidden, bound_to(self._context, b"deal", *pair))
        if content is None:
            return None
        shares = content[: shamir.SHARE_BYTES], content[shamir.SHARE_BYTES :]
        as_promised = share_commitments(self._context, *pair, shares) == promised
        return shares if as_promised else None

    def _reveal(self, content: bytes) -> bytes:
        """Give the shares that take the masks off the sum, and forget everything."""
        own, rest = self._own(), body(content, Step.REVEAL, self._context, 0, CLIENT)
        survivors = by_client(CLIENT.iter_unpack(rest)).keys()
        if self.client not in survivors or not survivors <= own.held.keys():
            raise SecurityRefusal("the secure sum names wrong survivors")
        if len(survivors) < own.threshold:
            raise SecurityRefusal(
                "too few survived to reveal anything", got=len(survivors), allowed=own.threshold
            )
        shares = [
            SHARE.pack(owner, held[0] if owner in survivors else held[1])
            for owner, held in own.held.items()
            if held is not None
        ]
        self._secrets = None
        return message(Step.REVEAL, self._context, *shares)
