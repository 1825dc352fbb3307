"""What a client refuses, whoever asks."""

from __future__ import annotations

import os
from pathlib import Path
from runpy import run_path
from types import SimpleNamespace

import numpy as np
import pytest

from fedtl.errors import SecurityRefusal
from fedtl.privacy.secure_client import ClientSide
from fedtl.privacy.secure_messages import (
    ASKED,
    CLIENT,
    DEALT,
    HEADER,
    NEIGHBOUR,
    PHASES,
    Step,
    context_of,
    message,
    start,
)

oracle = SimpleNamespace(**run_path(str(Path(__file__).with_name("secure_oracle.py"))))

ZEROS = np.zeros(7, np.uint32)


class Played:
    """A round of five among which client 2 is the one that is asked wrong things."""

    def __init__(self) -> None:
        self.total, self.carrier = oracle.secure_sum([1, 2, 3, 4, 5], 4)
        agreed = self.total.begin()
        self.sides = self.carrier.sides
        for client in agreed.tolist():
            if client != 2:
                self.total.add(np.array([client]), self.carrier.mask(client, ZEROS)[None])
        self.context = context_of(self.carrier.sent[Step.KEYS, 2])

    def until(self, step: Step) -> ClientSide:
        """A fresh client 2 that has answered everything before this step."""
        side = ClientSide(oracle.seeded(1, 1, 2))
        for before in Step:
            if before == step:
                break
            side.answer(PHASES[before], self.carrier.sent[before, 2])
        return side

    def reveal(self, *survivors: int) -> bytes:
        return message(Step.REVEAL, self.context, *(CLIENT.pack(c) for c in survivors))


@pytest.fixture(scope="module")
def played() -> Played:
    return Played()


def refused(side: ClientSide, step: Step, content: bytes, match: str) -> None:
    for _ in range(2):  # a refusal changes nothing
        with pytest.raises(SecurityRefusal, match=match):
            side.answer(PHASES[step], content)


def test_each_phase_is_answered_once_and_in_order(played: Played) -> None:
    sent = played.carrier.sent
    side = ClientSide(oracle.seeded(1, 1, 2))
    for step in list(Step)[:3]:
        for other in list(Step)[:3]:
            if PHASES[other] != PHASES[step]:
                refused(side, other, sent[other, 2], "out of order")
            elif other != step:
                refused(side, other, sent[other, 2], "malformed")
        refused(side, Step.REVEAL, played.reveal(1, 2, 3, 4, 5), "out of order")
        with pytest.raises(SecurityRefusal, match="out of order"):
            side.mask(ZEROS)
        side.answer(PHASES[step], sent[step, 2])
    refused(side, Step.REVEAL, played.reveal(1, 2, 3, 4, 5), "out of order")
    side.mask(ZEROS)
    with pytest.raises(SecurityRefusal, match="repeated"):
        side.mask(ZEROS)
    assert len(side.answer("secagg_reveal", played.reveal(1, 2, 3, 4, 5))) > HEADER.size
    for step in Step:
        refused(side, step, sent.get((step, 2), played.reveal(1, 2, 3, 4, 5)), "repeated")
    refused(side, Step.REVEAL, played.reveal(1, 2, 3, 4), "repeated")
    with pytest.raises(SecurityRefusal, match="repeated"):
        side.mask(ZEROS)


def test_an_unknown_phase_is_refused() -> None:
    with pytest.raises(SecurityRefusal, match="out of order"):
        ClientSide(os.urandom).answer("train", start(1, 1, 32, bytes(32), bytes(16)))


def test_what_it_knows_after_the_first_phase(played: Played) -> None:
    side = played.until(Step.SHARES)
    assert (side.client, side.round) == (2, 1)


def masked(played: Played) -> ClientSide:
    side = played.until(Step.REVEAL)
    side.mask(ZEROS)
    return side


def test_too_few_survivors_unmask_nobody(played: Played) -> None:
    refused(masked(played), Step.REVEAL, played.reveal(1, 2, 3), "too few survived")
    refused(masked(played), Step.REVEAL, played.reveal(2), "too few survived")
    masked(played).answer("secagg_reveal", played.reveal(1, 2, 3, 5))


def test_wrong_survivors(played: Played) -> None:
    refused(masked(played), Step.REVEAL, played.reveal(1, 3, 4, 5), "wrong survivors")
    refused(masked(played), Step.REVEAL, played.reveal(1, 2, 3, 4, 6), "wrong survivors")
    refused(masked(played), Step.REVEAL, played.reveal(1, 2, 3, 4, 4), "malformed")


def test_one_share_of_each_is_revealed(played: Played) -> None:
    """Of survivors the seed's, of others the key's: checked against what the owners dealt."""
    side = masked(played)
    held = dict(side._secrets.held)  # type: ignore[union-attr]
    answer = side.answer("secagg_reveal", played.reveal(1, 2, 3, 5))
    assert side._secrets is None
    for owner, (seed, key) in held.items():
        assert (seed in answer, key in answer) == ((True, False) if owner != 4 else (False, True))


def shares_request(played: Played, threshold: int, *neighbours: int) -> bytes:
    sent = played.carrier.sent[Step.SHARES, 2][HEADER.size + ASKED.size :]
    records = {r[0]: NEIGHBOUR.pack(*r) for r in NEIGHBOUR.iter_unpack(sent)}
    records[2] = NEIGHBOUR.pack(2, bytes(32), bytes(32))
    chosen = [records[n] for n in neighbours]
    return message(Step.SHARES, played.context, ASKED.pack(threshold), *chosen)


@pytest.mark.parametrize(
    ("threshold", "neighbours"),
    [(2, (1, 3, 4, 5)), (6, (1, 3, 4, 5)), (1, (1,)), (1, ()), (0, ()), (2**32 - 1, (1, 3))],
)
def test_a_graph_in_which_too_few_could_unmask_it(
    played: Played, threshold: int, neighbours: tuple[int, ...]
) -> None:
    content = shares_request(played, threshold, *neighbours)
    refused(played.until(Step.SHARES), Step.SHARES, content, "too few")


def test_odd_neighbours(played: Played) -> None:
    side = played.until(Step.SHARES)
    refused(side, Step.SHARES, shares_request(played, 3, 1, 3, 3, 4), "malformed")
    refused(side, Step.SHARES, shares_request(played, 3, 1, 2, 3, 4), "malformed")
    low = shares_request(played, 2, 1) + NEIGHBOUR.pack(3, bytes(32), bytes(32))
    refused(side, Step.SHARES, low, "not usable")


def test_shares_of_strangers_or_of_too_few(played: Played) -> None:
    sent = played.carrier.sent[Step.DELIVERY, 2]
    records = [DEALT.pack(*r) for r in DEALT.iter_unpack(sent[HEADER.size :])]
    side = played.until(Step.DELIVERY)
    stranger = DEALT.pack(9, *DEALT.unpack(records[0])[1:])
    own = DEALT.pack(2, *DEALT.unpack(records[0])[1:])
    for content in (records[:2], [*records, stranger], [*records, own]):
        refused(side, Step.DELIVERY, message(Step.DELIVERY, played.context, *content), "wrong")
    twice = message(Step.DELIVERY, played.context, *records, records[0])
    refused(side, Step.DELIVERY, twice, "malformed")
    side.answer("secagg_shares", message(Step.DELIVERY, played.context, *records[:3]))


def test_another_round_run_or_session(played: Played) -> None:
    """What is right but for what it is bound to."""
    openings = [
        start(2, 2, 32, bytes(32), bytes(16)),
        start(2, 1, 32, bytes(32), bytes(16)),
        start(2, 1, 64, bytes(32), bytes(16)),
        start(2, 1, 32, b"\1" * 32, bytes(16)),
        start(2, 1, 32, bytes(32), b"\1" * 16),
    ]
    contexts = {context_of(opening) for opening in openings}
    assert len(contexts) == len(openings)
    assert context_of(start(3, 1, 32, bytes(32), bytes(16))) in contexts
    for context in contexts:
        for step in list(Step)[1:3]:
            content = message(step, context, played.carrier.sent[step, 2][HEADER.size :])
            refused(played.until(step), step, content, "another round or run")
        content = message(Step.REVEAL, context, *(CLIENT.pack(c) for c in (1, 2, 3, 4, 5)))
        refused(masked(played), Step.REVEAL, content, "another round or run")


def test_shares_replayed_from_another_session_are_of_no_use() -> None:
    """In a new session with the same keys old sealed shares do not open."""
    (_, before), (total, after) = (oracle.secure_sum([1, 2, 3], run=run) for run in ("a", "b"))
    for client in (1, 2, 3):
        before.sides[client].answer("secagg_keys", start(client, 1, 32, b"\1" * 32, bytes(16)))
    total.begin()
    context = context_of(after.sent[Step.KEYS, 2])
    keys = {c: after.answers[Step.KEYS, c][HEADER.size :] for c in (1, 2, 3)}
    asked = message(
        Step.SHARES,
        before.sides[1]._context,
        ASKED.pack(2),
        *(NEIGHBOUR.pack(c, keys[c][:32], keys[c][32:]) for c in (2, 3)),
    )
    old = before.sides[1].answer("secagg_shares", asked)
    stale = {r[0]: r for r in DEALT.iter_unpack(old[HEADER.size + 32 :])}
    records = {r[0]: r for r in DEALT.iter_unpack(after.sent[Step.DELIVERY, 2][HEADER.size :])}
    side = ClientSide(oracle.seeded(1, 1, 2))
    for step in (Step.KEYS, Step.SHARES):
        side.answer(PHASES[step], after.sent[step, 2])
    content = message(Step.DELIVERY, context, DEALT.pack(1, *stale[2][1:]), DEALT.pack(*records[3]))
    assert side.answer("secagg_shares", content) == message(Step.DELIVERY, context, CLIENT.pack(1))


@pytest.mark.parametrize("bits", [0, 1, 31, 33, 255])
def test_a_ring_of_another_size(bits: int) -> None:
    with pytest.raises(SecurityRefusal, match="malformed"):
        ClientSide(os.urandom).answer("secagg_keys", start(1, 1, bits, bytes(32), bytes(16)))
