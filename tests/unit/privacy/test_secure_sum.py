"""Whole rounds of a secure sum: who drops out, who lies, and what the server gets to see."""

from __future__ import annotations

import os
from collections.abc import Mapping
from itertools import combinations, combinations_with_replacement, product
from pathlib import Path
from runpy import run_path
from types import SimpleNamespace

import numpy as np
import pytest

from fedtl.errors import InputError
from fedtl.privacy.masks import (
    add_mask,
    own_mask_key,
    pair_mask_key,
    private_key,
    public_bytes,
)
from fedtl.privacy.ring import Ring, quantise, ring_dtype, scale_for, to_signed, to_values
from fedtl.privacy.secure_client import ClientSide
from fedtl.privacy.secure_graph import connected, ring_graph, shares_needed
from fedtl.privacy.secure_messages import DEALT, HEADER, KEYS, SEED, SHARE, Step, message
from fedtl.privacy.secure_simulation import LocalCarrier, SimulatedSum
from fedtl.privacy.secure_sum import MaskedSum, PlainSum, SecureAbort, SecureSum

oracle = SimpleNamespace(**run_path(str(Path(__file__).with_name("secure_oracle.py"))))

STEPS = list(Step)
FATES = [*STEPS[:3], "vector", Step.REVEAL, "none"]
"""Where a client drops out."""


def expected_survivors(fates: Mapping[int, object], threshold: int) -> tuple[list[int], bool]:
    """Masks between all: who is in the sum (nobody: given up), and whether anything is revealed.

    All shares are held by all that sent keys; those that dealt are in it until the end.
    """
    place = {client: FATES.index(fate) for client, fate in fates.items()}
    reached = [sum(p > stage for p in place.values()) for stage in range(5)]
    needed = max(threshold, 2)
    if reached[0] < needed:
        return [], False
    needed = max(needed, shares_needed(reached[0]))
    if min(reached[:4]) < needed:
        return [], False
    if reached[4] < needed:
        return [], True
    return sorted(c for c, p in place.items() if p > 3), True


def check_fates(fates: Mapping[int, object], threshold: int, bits: int) -> None:
    clients = sorted(fates)
    vectors = oracle.vectors_for(clients, bits=bits)
    lost = {step: {c for c in clients if fates[c] == step} for step in STEPS}
    total, carrier = oracle.secure_sum(clients, threshold, bits=bits, lost=lost)
    survivors, reveals = expected_survivors(fates, threshold)
    senders = {c for c in clients if fates[c] != "vector"}
    if survivors:
        summed, found = oracle.play(total, carrier, vectors, senders)
        assert found == survivors
        assert summed.tolist() == oracle.plain(vectors, survivors, bits).tolist()
        assert total.facts["dropouts"] == len(clients) - len(survivors)
    else:
        with pytest.raises(SecureAbort):
            oracle.play(total, carrier, vectors, senders)
    assert (Step.REVEAL in [step for step, _ in carrier.asked]) == reveals


@pytest.mark.parametrize("threshold", [1, 3])
def test_three_clients_drop_out_in_every_way(threshold: int) -> None:
    for fates in product(FATES, repeat=3):
        check_fates(dict(zip((4, 7, 9), fates, strict=True)), threshold, 32)


def test_five_clients_drop_out_in_every_way_but_for_their_order() -> None:
    random = np.random.default_rng(0)
    for fates in combinations_with_replacement(FATES, 5):
        order = random.permutation([0, 1, 2, 5, 11]).tolist()
        check_fates(dict(zip(order, fates, strict=True)), 2, 64)


@pytest.mark.parametrize("seed", range(2))
def test_few_neighbours_and_dropouts_in_each_phase(seed: int) -> None:
    clients, random = list(range(3, 60)), np.random.default_rng(seed)
    gone = random.permutation(clients).tolist()
    lost = {step: set(gone[2 * i : 2 * i + 2]) for i, step in enumerate(STEPS)}
    silent = set(gone[8:11])
    vectors = oracle.vectors_for(clients, seed=seed)
    totals = []
    for neighbours in (20, None):
        total, carrier = oracle.secure_sum(clients, 40, neighbours, lost=lost, seed=seed)
        summed, survivors = oracle.play(total, carrier, vectors, set(clients) - silent)
        assert survivors == sorted(set(clients) - silent - set(gone[:6]))
        assert total.failures.keys() == set(gone[:8])
        totals.append(summed.tolist())
    assert totals[0] == totals[1] == oracle.plain(vectors, survivors, 32).tolist()
    assert total.facts["neighbours"] == 54
    assert [len(asked) for _, asked in carrier.asked] == [57, 55, 53, 48]


def test_one_alone_and_below_the_threshold() -> None:
    for clients, threshold in (([3], 1), ([], 1), ([1, 2], 3)):
        total, carrier = oracle.secure_sum(clients, threshold)
        with pytest.raises(SecureAbort, match=f"{len(clients)} clients"):
            total.begin()
        assert carrier.asked == []
    total, carrier = oracle.secure_sum([1, 2, 3, 4], 3)
    vectors = oracle.vectors_for([1, 2, 3, 4])
    with pytest.raises(SecureAbort, match="2 clients sent a vector, 3 are needed"):
        oracle.play(total, carrier, vectors, {1, 4})
    assert Step.REVEAL not in [step for step, _ in carrier.asked]


def test_too_many_masks_are_refused() -> None:
    many, carrier = np.arange(10_002), LocalCarrier({})
    with pytest.raises(InputError, match="too many masks"):
        MaskedSum(many, 9, None, 32, carrier, size=1, run="r", round=1, randomness=os.urandom)
    MaskedSum(many, 9, 40, 32, carrier, size=1, run="r", round=1, randomness=os.urandom)


def test_who_is_left_alone_with_too_few_neighbours() -> None:
    """Client 0's neighbours deal no shares, so that nobody could take its mask off: it is out."""
    clients = list(range(20))
    vectors = oracle.vectors_for(clients)
    probe, _ = oracle.secure_sum(clients, 5, 4)
    probe.begin()
    lonely = set(probe._graph[0])
    total, carrier = oracle.secure_sum(clients, 5, 4, lost={Step.SHARES: lonely})
    summed, survivors = oracle.play(total, carrier, vectors, set(clients))
    assert 0 in total.failures
    assert "neighbours" in total.failures[0]
    assert survivors == sorted(set(clients) - total.failures.keys())
    assert summed.tolist() == oracle.plain(vectors, survivors, 32).tolist()


def test_survivors_in_two_parts_are_not_unmasked() -> None:
    """Each part has its sum under masks of its own: the server would learn two sums."""
    clients, seen = list(range(10)), []
    vectors = oracle.vectors_for(clients)
    for pair in combinations(clients, 2):
        total, carrier = oracle.secure_sum(clients, 4, 2)
        with pytest.raises(SecureAbort) as caught:
            oracle.play(total, carrier, vectors, set(clients) - set(pair))
        seen.append("too few are left" in caught.value.reason)
        # A ring without two: in two parts, but where one client between them is all there is.
        first, second = (total._graph[client] | {client} for client in pair)
        assert seen[-1] == bool(first & second)
        assert connected(total._graph, set(clients) - set(pair)) <= seen[-1]
        assert Step.REVEAL not in [step for step, _ in carrier.asked]
    assert 0 < sum(seen) < len(seen)
    total, carrier = oracle.secure_sum(clients, 4, 2)
    assert oracle.play(total, carrier, vectors, set(clients) - {5})[1] == [
        0,
        1,
        2,
        3,
        4,
        *range(6, 10),
    ]


def flipped(content: bytes, place: int) -> bytes:
    return content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]


@pytest.mark.parametrize("neighbours", [None, 6])
@pytest.mark.parametrize("dropped", [None, 4])
def test_a_lying_share_is_found_and_left_out(neighbours: int | None, dropped: int | None) -> None:
    clients = list(range(9))
    vectors = oracle.vectors_for(clients)

    def lie(step: Step, client: int, content: bytes) -> bytes:
        return flipped(content, len(content) - 1) if (step, client) == (Step.REVEAL, 3) else content

    total, carrier = oracle.secure_sum(clients, 5, neighbours, change=lie)
    summed, survivors = oracle.play(total, carrier, vectors, set(clients) - {dropped})
    assert total.facts["liars"] == [3]
    assert summed.tolist() == oracle.plain(vectors, survivors, 32).tolist()


def test_shares_of_strangers_are_lies() -> None:
    def lie(step: Step, client: int, content: bytes) -> bytes:
        stranger = SHARE.pack(77, bytes(33)) if (step, client) == (Step.REVEAL, 3) else b""
        return content + stranger

    total, carrier = oracle.secure_sum([1, 2, 3, 4], 2, change=lie)
    oracle.play(total, carrier, oracle.vectors_for([1, 2, 3, 4]), {1, 2, 3, 4})
    assert total.facts["liars"] == [3]


def test_too_many_liars_and_no_sum() -> None:
    def lie(step: Step, client: int, content: bytes) -> bytes:
        return flipped(content, len(content) - 1) if step is Step.REVEAL and client < 3 else content

    total, carrier = oracle.secure_sum([0, 1, 2, 3, 4], 3, change=lie)
    with pytest.raises(SecureAbort, match="2 usable shares") as caught:
        oracle.play(total, carrier, oracle.vectors_for([0, 1, 2, 3, 4]), {0, 1, 2, 3, 4})
    assert caught.value.clients == (0, 1, 2)


def test_a_wrong_secret_stops_the_round() -> None:
    """Client 3 promised another seed, or another key, than its shares lie on."""
    clients = [1, 2, 3, 4, 5]
    vectors = oracle.vectors_for(clients)

    def other_seed(step: Step, client: int, content: bytes) -> bytes:
        return flipped(content, HEADER.size) if (step, client) == (Step.SHARES, 3) else content

    def other_key(step: Step, client: int, content: bytes) -> bytes:
        if (step, client) != (Step.KEYS, 3):
            return content
        sealing, _ = KEYS.unpack(content[HEADER.size :])
        return content[: HEADER.size] + KEYS.pack(sealing, public_bytes(private_key(bytes(32))))

    for change, senders in ((other_seed, {1, 2, 3, 4, 5}), (other_key, {1, 2, 4, 5})):
        total, carrier = oracle.secure_sum(clients, 3, change=change)
        with pytest.raises(SecureAbort, match="do not lie on") as caught:
            oracle.play(total, carrier, vectors, senders)
        assert caught.value.clients == (3,)
    total, carrier = oracle.secure_sum(clients, 3, change=other_seed)
    summed, survivors = oracle.play(total, carrier, vectors, {1, 2, 4, 5})
    assert summed.tolist() == oracle.plain(vectors, survivors, 32).tolist()


def test_replayed_answers_of_another_run_are_refused() -> None:
    """As they were they do not count; with the header of this run they are lies."""
    clients = [1, 2, 3, 4, 5]
    vectors = oracle.vectors_for(clients)
    earlier, old = oracle.secure_sum(clients, 3, run="earlier")
    oracle.play(earlier, old, vectors, set(clients))

    def replayed(whole: bool) -> oracle.Change:
        def change(step: Step, client: int, content: bytes) -> bytes:
            if step is not Step.REVEAL or client != 2:
                return content
            stale = old.answers[step, client]
            return stale if whole else content[: HEADER.size] + stale[HEADER.size :]

        return change

    total, carrier = oracle.secure_sum(clients, 3, change=replayed(True))
    summed, _ = oracle.play(total, carrier, vectors, set(clients))
    assert "another round or run" in total.failures[2]
    assert summed.tolist() == oracle.plain(vectors, clients, 32).tolist()
    # Same seed, so the same secrets and coefficients: only what they are bound to differs, and a
    # share of the same polynomial is no lie. With another seed it is one.
    earlier, old = oracle.secure_sum(clients, 3, seed=2)
    oracle.play(earlier, old, vectors, set(clients))
    total, carrier = oracle.secure_sum(clients, 3, change=replayed(False))
    summed, _ = oracle.play(total, carrier, vectors, set(clients))
    assert total.facts["liars"] == [2]
    assert summed.tolist() == oracle.plain(vectors, clients, 32).tolist()


def test_a_client_with_a_weak_key_harms_only_itself() -> None:
    def weak(step: Step, client: int, content: bytes) -> bytes:
        return content[:-32] + bytes(32) if (step, client) == (Step.KEYS, 3) else content

    total, carrier = oracle.secure_sum([1, 2, 3, 4], 3, change=weak)
    _, survivors = oracle.play(total, carrier, oracle.vectors_for([1, 2, 3, 4]), {1, 2, 3, 4})
    assert survivors == [1, 2, 4]
    assert "not usable" in total.failures[3]


def test_who_got_no_good_share_says_so() -> None:
    """Client 3 seals something else for client 4, which then reveals no share of client 3's."""
    clients = [1, 2, 3, 4, 5]
    vectors = oracle.vectors_for(clients)

    def spoil(field: int) -> oracle.Change:
        def change(step: Step, client: int, content: bytes) -> bytes:
            if (step, client) != (Step.SHARES, 3):
                return content
            records = [list(r) for r in DEALT.iter_unpack(content[HEADER.size + SEED.size :])]
            for record in records:
                record[field] = flipped(record[field], 5) if record[0] == 4 else record[field]
            packed = [DEALT.pack(*record) for record in records]
            return content[: HEADER.size + SEED.size] + b"".join(packed)

        return change

    for field in (1, 2, 3):  # the sealed shares, the commitment to either
        for senders in ({1, 2, 3, 4, 5}, {1, 2, 4, 5}):
            total, carrier = oracle.secure_sum(clients, 3, change=spoil(field))
            summed, survivors = oracle.play(total, carrier, vectors, senders)
            assert total.facts["liars"] == []
            assert total._dealt[3].holders == {1, 2, 3, 5}
            assert summed.tolist() == oracle.plain(vectors, survivors, 32).tolist()


def test_a_round_that_cannot_be_unmasked_is_given_up_before_training() -> None:
    clients = list(range(20))
    probe, _ = oracle.secure_sum(clients, 5, 4)
    probe.begin()
    total, carrier = oracle.secure_sum(clients, 5, 4, lost={Step.DELIVERY: set(probe._graph[0])})
    with pytest.raises(SecureAbort, match="too few are left"):
        total.begin()
    assert [step for step, _ in carrier.asked] == STEPS[:3]


def randomness_test(numbers: Ring) -> float:
    """Chi-square of the bytes' frequencies, 255 degrees of freedom, as deviations from its mean."""
    counts = np.bincount(numbers.view(np.uint8), minlength=256)
    expected = numbers.nbytes / 256
    statistic = ((counts - expected) ** 2 / expected).sum()
    return float((statistic - 255) / (2 * 255) ** 0.5)


def test_only_the_sum_is_to_be_seen() -> None:
    """Of any proper subset, even once the seeds are known, the masked sum looks like noise.

    The server knows every survivor's seed in the end; without its mask only those of pairs are
    left. The test's statistic is above 6 less than once in 10^6 draws (chi-square, 255 degrees of
    freedom), and 124 are looked at: a false alarm once in 8,000 seeds, and the seed is fixed.
    """
    clients, size = [0, 1, 2, 3, 4], 50_000
    masked: dict[str, dict[int, Ring]] = {}
    sums = {}
    first = {c: np.full(size, 1000 * c + 7, np.uint32) for c in clients}
    second = {c: np.full(size, 2007, np.uint32) for c in clients}
    for name, vectors in (("one", first), ("other", second)):
        total, carrier = oracle.secure_sum(clients, 3, size=size)
        total.begin()
        seeds = {c: carrier.sides[c]._secrets.seed for c in clients}
        masked[name] = {c: carrier.mask(c, vectors[c]) for c in clients}
        for client, vector in masked[name].items():
            total.add(np.array([client]), vector[None])
        sums[name] = total.finish()[0]
        for count in range(1, 6):
            for chosen in combinations(clients, count):
                partial = sum((masked[name][c] for c in chosen), np.zeros(size, np.uint32))
                assert abs(randomness_test(partial)) < 6
                for client in chosen:
                    key = own_mask_key(total._context, client, seeds[client])
                    add_mask(partial, key, subtract=True)
                if count < 5:
                    assert abs(randomness_test(partial)) < 6
                else:
                    assert (partial == 10035).all()
    assert randomness_test(first[3]) > 1000  # what the test finds where there is no mask
    assert (sums["one"] == 10035).all()
    assert (sums["one"] == sums["other"]).all()


def test_a_vector_that_comes_too_late_stays_hidden() -> None:
    """The server has put the late client's key together, and takes its shared masks off."""
    clients, size = [0, 1, 2, 3], 50_000
    vectors = dict.fromkeys(clients, np.full(size, 9, np.uint32))
    total, carrier = oracle.secure_sum(clients, 3, size=size)
    oracle.play(total, carrier, vectors, {0, 1, 3})
    late, secrets = carrier.sides[2].mask(vectors[2]), carrier.sides[2]._secrets
    for other in (0, 1, 3):
        key = pair_mask_key(total._context, (2, other), secrets.masking, total._dealt[other].key)
        add_mask(late, key, subtract=other > 2)
    assert abs(randomness_test(late)) < 6
    add_mask(late, own_mask_key(total._context, 2, secrets.seed), subtract=True)
    assert (late == 9).all()


def test_the_same_vector_looks_different_in_every_round_and_session() -> None:
    side_of, zeros = {}, np.zeros(1000, np.uint32)
    for name, run, seed in (("a", "a", 1), ("b", "b", 1), ("c", "a", 2)):
        total, carrier = oracle.secure_sum([1, 2, 3], run=run, seed=seed, size=1000)
        total.begin()
        side_of[name] = carrier.mask(1, zeros)
    for one, other in combinations(side_of.values(), 2):
        assert (one == other).mean() < 0.01


@pytest.mark.parametrize("bits", [32, 64])
def test_the_systems_own_randomness(bits: int) -> None:
    clients = np.arange(6)
    carrier = LocalCarrier({c: ClientSide(os.urandom) for c in range(6)})
    vectors = oracle.vectors_for(list(range(6)), 20, bits)
    total: SecureSum = MaskedSum(
        clients, 4, 2, bits, carrier, size=20, run="r", round=3, randomness=os.urandom
    )
    assert total.begin().tolist() == list(range(6))
    assert {side.round for side in carrier.sides.values()} == {3}
    for client in range(6):
        total.add(np.array([client]), carrier.mask(client, vectors[client])[None])
    assert total.finish()[0].tolist() == oracle.plain(vectors, list(range(6)), bits).tolist()


@pytest.mark.parametrize("bits", [32, 64])
def test_arithmetic_and_simulated_protocol_give_the_same(bits: int) -> None:
    random, asked = np.random.default_rng(0), np.array([5, 2, 9, 14, 3])
    scale, limit = scale_for(8.0, 5, bits)
    values = random.uniform(-8, 8, (5, 40))
    whole = quantise(values, scale, limit, bits)
    every: list[SecureSum] = [
        PlainSum(asked, 3, 40, bits),
        SimulatedSum(asked, 3, None, bits, size=40, run="r", round=1, seed=4),
        SimulatedSum(asked, 3, 2, bits, size=40, run="r", round=1, seed=4),
    ]
    for total in every:
        assert total.begin().tolist() == [2, 3, 5, 9, 14]
        total.add(asked[:2], whole[:2])
        total.add(asked[3:], whole[3:])
        summed, survivors = total.finish()
        assert survivors.tolist() == [2, 3, 5, 14]
        kept = [0, 1, 3, 4]
        exact = np.rint(values[kept] * scale).astype(np.int64).sum(axis=0)
        assert to_signed(summed, bits).tolist() == exact.tolist()
        error = np.abs(to_values(summed, scale, bits) - values[kept].sum(axis=0))
        assert error.max() <= 4 / (2 * scale) + 1e-14
        assert total.facts["dropouts"] == 1
    assert [total.facts["protocol"] for total in every] == ["arithmetic", "secagg", "secagg_plus"]
    assert [total.facts["neighbours"] for total in every] == [None, 4, 2]
    assert [total.facts["threshold"] for total in every] == [3, 3, 3]
    majority = SimulatedSum(asked, 2, None, bits, size=40, run="r", round=1, seed=4)
    majority.begin()
    assert (majority.facts["threshold"], majority.facts["share_threshold"]) == (3, 3)


def test_a_seeded_round_is_the_same_again() -> None:
    sent = []
    for _ in range(2):
        total, carrier = oracle.secure_sum([1, 2, 3, 4], neighbours=2)
        oracle.play(total, carrier, oracle.vectors_for([1, 2, 3, 4]), {1, 2, 3})
        sent.append((carrier.sent, carrier.answers))
    assert sent[0] == sent[1]


def test_the_plain_sum_below_its_threshold() -> None:
    with pytest.raises(SecureAbort):
        PlainSum(np.array([1, 2]), 3, 4, 32).begin()
    total = PlainSum(np.array([1, 2, 3]), 2, 4, 32)
    total.begin()
    total.add(np.array([2]), np.zeros((1, 4), np.uint32))
    with pytest.raises(SecureAbort):
        total.finish()


def test_a_graph_of_the_round_is_drawn_anew() -> None:
    graphs = []
    for seed in (1, 2):
        total, _ = oracle.secure_sum(list(range(30)), 5, 4, seed=seed)
        total.begin()
        graphs.append(total._graph)
    assert graphs[0] != graphs[1]
    assert graphs[0] != ring_graph(range(30), 4)


def test_rings_have_their_types() -> None:
    assert (ring_dtype(32), ring_dtype(64)) == (np.dtype(np.uint32), np.dtype(np.uint64))
    assert len(message(Step.KEYS, bytes(32))) == HEADER.size
