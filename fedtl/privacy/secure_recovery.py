"""Taking the masks off a sum: shares are checked, secrets put together and checked again."""

from __future__ import annotations

from collections.abc import Mapping, Set
from dataclasses import dataclass, field

from fedtl.privacy import shamir
from fedtl.privacy.masks import (
    add_mask,
    own_mask_key,
    pair_mask_key,
    private_key,
    public_bytes,
    seed_commitment,
    share_commitments,
)
from fedtl.privacy.ring import Ring
from fedtl.privacy.secure_graph import Graph


class SecureAbort(Exception):
    """The round has no sum, and nothing was learned of anybody's vector.

    Args:
        reason: why, in one clause without private data.
        clients: ids of those at fault, where that is known.
    """

    def __init__(self, reason: str, clients: tuple[int, ...] = ()) -> None:
        self.reason, self.clients = reason, clients
        super().__init__(reason)


@dataclass
class Dealt:
    """What the server keeps of a client that dealt shares.

    Attributes:
        key: its public key for masks.
        seed: the commitment to its seed.
        records: by holder: both shares sealed, the commitments to either.
        holders: who said that its shares are of use, itself among them.
    """

    key: bytes
    seed: bytes
    records: dict[int, tuple[bytes, bytes, bytes]]
    holders: set[int] = field(default_factory=set)

    def forget_sealed(self) -> None:
        """Sealed shares are of no use once they were delivered."""
        self.records = {holder: (b"", *record[1:]) for holder, record in self.records.items()}


def recovered(
    context: bytes,
    dealt: Mapping[int, Dealt],
    alive: Set[int],
    revealed: Mapping[int, Mapping[int, bytes]],
    threshold: int,
) -> tuple[dict[int, bytes], list[int]]:
    """Every client's secret, of who is alive the seed and else the masking key; and the liars.

    Args:
        revealed: by holder, its share of each owner's one secret.

    Raises:
        SecureAbort: somebody's shares are too few, or lie on a secret that is not the promised.
    """
    liars = [
        holder for holder in revealed if _lies(context, dealt, alive, holder, revealed[holder])
    ]
    honest = {holder: revealed[holder] for holder in revealed if holder not in liars}
    secrets = {}
    for owner, its in dealt.items():
        shares = {h: honest[h][owner] for h in its.holders if owner in honest.get(h, ())}
        if len(shares) < threshold:
            raise SecureAbort(
                f"{len(shares)} usable shares of a client's secret were revealed, "
                f"{threshold} are needed",
                tuple(liars),
            )
        secret = shamir.join({holder: shares[holder] for holder in sorted(shares)[:threshold]})
        if secret is None or not _promised(context, owner, its, secret, owner in alive):
            raise SecureAbort("a client's shares do not lie on the secret it promised", (owner,))
        secrets[owner] = secret
    return secrets, liars


def _lies(
    context: bytes,
    dealt: Mapping[int, Dealt],
    alive: Set[int],
    holder: int,
    shares: Mapping[int, bytes],
) -> bool:
    """Whether a share is not the one that its owner dealt to this holder."""
    for owner, share in shares.items():
        if owner not in dealt or holder not in dealt[owner].records:
            return True
        which = 0 if owner in alive else 1
        found = share_commitments(context, owner, holder, (share, share))[which]
        if found != dealt[owner].records[holder][1 + which]:
            return True
    return False


def _promised(context: bytes, owner: int, its: Dealt, secret: bytes, survived: bool) -> bool:
    """Whether a secret is the seed committed to, or the key of which the public one is known."""
    if survived:
        return seed_commitment(context, owner, secret) == its.seed
    return public_bytes(private_key(secret)) == its.key


def take_off(
    total: Ring,
    context: bytes,
    graph: Graph,
    dealt: Mapping[int, Dealt],
    alive: Set[int],
    secrets: Mapping[int, bytes],
) -> None:
    """Subtract from the sum, in place, the survivors' own masks and those shared with the lost."""
    for owner, secret in secrets.items():
        if owner in alive:
            add_mask(total, own_mask_key(context, owner, secret), subtract=True)
            continue
        key = private_key(secret)
        for other in graph[owner] & alive:
            mask = pair_mask_key(context, (owner, other), key, dealt[other].key)
            add_mask(total, mask, subtract=other < owner)
