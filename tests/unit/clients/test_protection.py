"""What leaves a client is clipped, noised and in a ring, and a bad client fails alone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from fedtl import seeding
from fedtl.clients.personal_store import PersonalStore
from fedtl.clients.tasks import do_task
from fedtl.errors import InputError
from fedtl.plans import RING, Compression, Personal, Protection, RoundPlan, Statistics, misfit
from fedtl.privacy.noise import seeded
from fedtl.privacy.ring import scale_for, to_signed, to_values
from fedtl.types import ClientUpdates, Head, LocalTraining, Population, Rows

HEAD: Head = {"weight": np.full((3, 9), 0.01, np.float32), "bias": np.zeros(3, np.float32)}
SIZE = 30

FALSE_ALARM = 1e-6
"""Of the statistical tests here; their noise is seeded, so that one that passes always does."""


def plan_of(*clients: int, **changes) -> RoundPlan:
    ids = np.array(clients or range(5), np.int64)
    keys = seeding.client_keys(1, "batches", 1, ids)
    noise = seeding.client_keys(1, "noise", 1, ids)
    return RoundPlan(1, ids, keys, LocalTraining(2, 8, 0.5), noise_keys=noise, **changes)


def ring(clients: int = 5, value_range: float = 8.0, bits: int = 32, **more) -> Protection:
    scale, limit = scale_for(value_range, clients, bits)
    return Protection(ring_bits=bits, scale=scale, limit=limit, **more)


def flat(updates: ClientUpdates, head: Head = HEAD) -> np.ndarray:
    """Updates w_k - w as float64 [k, P], tensors by name."""
    rows = [(updates.tensors[n].astype(float) - head[n]).reshape(len(updates.clients), -1)
            for n in sorted(head)]  # fmt: skip
    return np.concatenate(rows, axis=1)


def test_clipped_over_all_tensors_together(population: Population) -> None:
    plain = flat(do_task(population, HEAD, plan_of()))
    norms = np.linalg.norm(plain, axis=1)
    bound = float(np.median(norms))
    clipped = flat(do_task(population, HEAD, plan_of(protection=Protection(clip=bound))))
    wanted = plain * np.minimum(1, bound / norms)[:, None]
    np.testing.assert_allclose(clipped, wanted, atol=1e-7)  # heads are float32
    assert (np.linalg.norm(clipped, axis=1) <= bound * (1 + 1e-5)).all()
    assert (np.linalg.norm(clipped, axis=1) < norms - 1e-6).sum() == 2


def test_the_noise_on_the_wire_has_the_deviation_asked_for(population: Population) -> None:
    """In total, by client and by entry; two tails of chi square at 1e-6 each."""
    deviation, found = 0.7, []
    for round in range(40):
        keys = seeding.client_keys(round, "noise", 1, np.arange(5))
        clipped = replace(plan_of(protection=Protection(clip=0.1)), noise_keys=keys)
        noised = replace(clipped, protection=Protection(clip=0.1, noise=deviation))
        answers = (flat(do_task(population, HEAD, plan)) for plan in (noised, clipped))
        found.append((next(answers) - next(answers)) / deviation)
    drawn = np.stack(found)  # [rounds, clients, entries]
    for axes in ((0, 1, 2), (0, 2), (0, 1)):
        squares = (drawn**2).sum(axis=axes)
        count = drawn.size // squares.size
        low, high = stats.chi2.ppf([FALSE_ALARM / 2, 1 - FALSE_ALARM / 2], count)
        assert (low < squares).all()
        assert (squares < high).all()
    assert stats.kstest(drawn.ravel(), "norm").pvalue > FALSE_ALARM
    between = np.corrcoef(drawn.reshape(40, 5, SIZE).transpose(1, 0, 2).reshape(5, -1))
    assert np.abs(between[~np.eye(5, dtype=bool)]).max() < 0.2  # streams of their own


@pytest.mark.parametrize("asked", [Protection(clip=0.3, noise=0.1), ring(clip=0.3, noise=0.1)])
def test_threads_blocks_and_company_do_not_change_a_bit(
    population: Population, asked: Protection
) -> None:
    whole = do_task(population, HEAD, plan_of(protection=asked))
    for options in ({"threads": 2}, {"block_size": 1}, {"threads": 2, "block_size": 3}):
        again = do_task(population, HEAD, plan_of(protection=asked), **options)
        for name, tensor in whole.tensors.items():
            assert tensor.tobytes() == again.tensors[name].tobytes()
    for client in range(5):  # alone, as behind a node of its own
        alone = do_task(population, HEAD, plan_of(client, protection=asked))
        for name, tensor in whole.tensors.items():
            assert tensor[client].tobytes() == alone.tensors[name][0].tobytes()


def test_losses_stay(population: Population) -> None:
    for asked in (Protection(clip=1.0), Protection(noise=1.0), ring()):
        assert np.isnan(do_task(population, HEAD, plan_of(protection=asked)).loss).all()
    assert np.isfinite(do_task(population, HEAD, plan_of()).loss).all()


def test_noise_of_the_system_is_another_each_time_and_needs_no_keys(
    population: Population,
) -> None:
    plan = replace(plan_of(protection=Protection(clip=0.3, noise=0.1)), noise_keys=None)
    with pytest.raises(InputError, match="where from"):
        do_task(population, HEAD, plan)
    one, other = (flat(do_task(population, HEAD, plan, secure=True)) for _ in range(2))
    assert (one != other).all()
    keyed = plan_of(protection=Protection(clip=0.3, noise=0.1))
    assert (flat(do_task(population, HEAD, keyed, secure=True)) != one).all()


def test_the_ring_holds_the_rounded_weighted_clipped_updates_exactly(
    population: Population,
) -> None:
    asked, weights = ring(clip=0.3), np.array([1.0, 0.5, 0.25, 0.3, 0.9])
    plan = plan_of(protection=asked, weights=weights)
    updates = do_task(population, HEAD, plan)
    assert misfit(updates, plan.reply(HEAD)) is None
    plain = flat(do_task(population, HEAD, plan_of()))
    norms = np.linalg.norm(plain, axis=1)
    clipped = plain * np.minimum(1, 0.3 / norms * (1 - 2.0**-50))[:, None]
    wanted = np.rint(clipped * weights[:, None] * asked.scale)
    got = to_signed(updates.tensors[RING], 32)
    assert np.abs(got - wanted).max() <= 1  # a rounding of the length may tip a half
    assert (got == wanted).mean() > 0.9
    part = do_task(population, HEAD, plan.part(np.array([1, 3])))
    assert np.array_equal(part.tensors[RING], updates.tensors[RING][[1, 3]])


def test_noise_in_a_ring_has_the_deviation_asked_for(population: Population) -> None:
    quiet, loud = ring(clip=0.3), ring(clip=0.3, noise=0.2)
    drawn = []
    for seed in range(20):
        keys = seeding.client_keys(seed, "noise", 1, np.arange(5))
        plans = (replace(plan_of(protection=p), noise_keys=keys) for p in (loud, quiet))
        sent = [do_task(population, HEAD, plan).tensors[RING] for plan in plans]
        drawn.append(
            (to_values(sent[0], loud.scale, 32) - to_values(sent[1], quiet.scale, 32)) / 0.2
        )
    squares, count = float((np.stack(drawn) ** 2).sum()), 20 * 5 * SIZE
    low, high = stats.chi2.ppf([FALSE_ALARM / 2, 1 - FALSE_ALARM / 2], count)
    assert low < squares < high


def test_who_is_too_large_or_not_finite_fails_alone(population: Population) -> None:
    features = population.features.copy()
    features[population.train.of(3)] = np.nan
    features[population.train.of(1)] *= 1e4
    bad = replace(population, features=features)
    whole = do_task(bad, HEAD, plan_of(protection=ring()))
    assert whole.clients.tolist() == [0, 2, 4]
    reasons = {failure.client: failure.reason for failure in whole.failures}
    assert set(reasons) == {1, 3}
    assert "too large for the secure sum" in reasons[1]
    assert "not finite" in reasons[3]
    assert len(whole.loss) == len(whole.num_examples) == 3
    kept = do_task(population, HEAD, plan_of(protection=ring()))
    assert np.array_equal(whole.tensors[RING], kept.tensors[RING][[0, 2, 4]])
    # without a ring it is for the server to refuse
    sent = do_task(bad, HEAD, plan_of(protection=Protection(clip=1.0)))
    finite = np.isfinite(flat(sent)).all(axis=1)
    assert finite.tolist() == [True, True, True, False, True]


@pytest.mark.parametrize("bits", [0, 32])
def test_beside_noise_nothing_tells_that_an_update_is_not_finite(
    bits: int, population: Population
) -> None:
    """It counts as 0, and what is sent is the noise."""
    features = population.features.copy()
    features[population.train.of(3)] = np.nan
    bad = replace(population, features=features)
    asked = ring(clip=1.0, noise=0.1) if bits else Protection(clip=1.0, noise=0.1)
    sent = do_task(bad, HEAD, plan_of(protection=asked))
    assert sent.clients.tolist() == [0, 1, 2, 3, 4]
    assert not sent.failures
    plan = plan_of(protection=asked)
    assert plan.noise_keys is not None
    noise = 0.1 * seeded(int(plan.noise_keys[3])).normal(SIZE)
    if bits:
        got = to_signed(sent.tensors[RING][3], 32)
        assert np.array_equal(got, np.rint(noise * asked.scale))
    else:
        np.testing.assert_allclose(flat(sent)[3], noise, atol=1e-6)


def test_packed_before_the_ring_and_clipped_again_after(
    population: Population, tmp_path: Path
) -> None:
    """What feedback adds does not lead past the bound."""
    packing = Compression("top_k", fraction=0.2, error_feedback=True)
    store = PersonalStore(tmp_path)
    longest = 0.0
    for round in (1, 2, 3):
        plan = replace(plan_of(protection=ring(clip=0.3), compression=packing), round=round)
        updates = do_task(population, HEAD, plan, store=store)
        assert misfit(updates, plan.reply(HEAD)) is None
        values = to_values(updates.tensors[RING], plan.protection.scale, 32)
        assert ((values != 0).sum(axis=1) <= 6).all()
        longest = max(longest, float(np.linalg.norm(values, axis=1).max()))
    assert 0.3 * 0.99 < longest <= 0.3 + SIZE**0.5 / plan.protection.scale


def test_layers_that_stay_are_in_no_ring(population: Population) -> None:
    hidden = np.full((4, 9), 0.1, np.float32)
    head = {
        "hidden.0.weight": hidden, "hidden.0.bias": np.zeros(4, np.float32),
        "weight": np.full((3, 4), 0.1, np.float32), "bias": np.zeros(3, np.float32),
    }  # fmt: skip
    plan = plan_of(protection=ring(clip=1.0))
    assert plan.reply(head)[RING][0] == (4 * 9 + 4 + 3 * 4 + 3,)
    kept = replace(plan, personal=Personal("partial", local=("weight", "bias")))
    assert kept.reply(head)[RING][0] == (4 * 9 + 4,)


def test_statistics_in_a_ring_come_out_to_half_a_step(population: Population) -> None:
    plan = replace(plan_of(), task="statistics", statistics=Statistics())
    plain = do_task(population, HEAD, plan).tensors
    asked = ring(value_range=2.0**30, bits=64)
    ringed = replace(plan, protection=asked)
    sent = do_task(population, HEAD, ringed)
    assert misfit(sent, ringed.reply(HEAD)) is None
    values = to_values(sent.tensors[RING], asked.scale, 64)
    wanted = np.concatenate([plain[n].reshape(5, -1) for n in sorted(plain)], axis=1)
    assert np.abs(values - wanted).max() <= 0.5 / asked.scale


def test_a_client_without_rows_sends_a_zero_update(population: Population) -> None:
    counts = population.train.counts
    counts[2] = 0
    index = np.concatenate([population.train.of(k) for k in range(5) if k != 2])
    empty = replace(population, train=Rows(index, np.cumsum([0, *counts])))
    sent = do_task(empty, HEAD, plan_of(protection=ring(clip=1.0)))
    assert not sent.tensors[RING][2].any()
    clipped = do_task(empty, HEAD, plan_of(protection=Protection(clip=1.0)))
    assert not flat(clipped)[2].any()
