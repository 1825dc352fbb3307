"""DP-FedAvg, adaptive clips and banded noise against their definitions, and what is passed on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from fedtl.plans import Protection, RoundPlan
from fedtl.privacy.matrix import coefficients
from fedtl.privacy.noise import seeded
from fedtl.strategies import STRATEGIES
from fedtl.strategies.averaging import FedAvg
from fedtl.strategies.base import ServerState, Strategy, personal_of
from fedtl.strategies.private import CLIP, AtClients, Central, Private, SecureRing
from fedtl.types import ClientUpdates, Head, LocalTraining

Make = Callable[..., ClientUpdates]

FALSE_ALARM = 1e-6
"""Of each statistical test; noise is seeded, so that one that passes always does."""

HEAD: Head = {
    "weight": np.linspace(-1, 1, 12, dtype=np.float32).reshape(3, 4),
    "bias": np.array([0.5, 0.0, -0.5], np.float32),
}
SIZE = 15

MEANS = [
    "fedavg", "fedprox", "fedavgm", "fedadagrad", "fedadam", "fedyogi",
    "finetune", "ditto", "pfedme", "apfl", "fedper", "fedrep", "fedbabu", "lgfedavg", "knnper",
]  # fmt: skip
"""Strategies whose step rests on the mean alone."""


def made(name: str) -> Strategy:
    return STRATEGIES[name]()


def central(**changes) -> Central:
    return Central(**{"clip": 1.0, "multiplier": 0.0, "denominator": 4.0, **changes})


def random_updates(updates: Make, count: int, seed: int = 0, size: float = 1.0, round: int = 1):
    rng = np.random.default_rng(seed)
    tensors = {n: t + size * rng.normal(size=(count, *t.shape)) for n, t in HEAD.items()}
    sizes = rng.integers(1, 50, count).tolist()
    made = updates(tensors, examples=sizes, round=round)
    return replace(made, training=LocalTraining(1, 8, 0.1))


def delta_of(state: ServerState, before: Head = HEAD) -> np.ndarray:
    """What a step of FedAvg moved, float64 [P], tensors by name."""
    parts = [(state.head[n].astype(float) - before[n]).ravel() for n in sorted(before)]
    return np.concatenate(parts)


def exact_step(strategy: Private, state: ServerState, given: ClientUpdates) -> np.ndarray:
    """The pseudo-update that the inner strategy is handed, float64 [P], without float32 between."""
    seen = []

    class Spy(FedAvg):
        def step(self, state: ServerState, updates: ClientUpdates) -> ServerState:
            seen.append(updates)
            return super().step(state, updates)

    replace(strategy, then=Spy()).step(state, given)
    (one,) = seen
    assert len(one.clients) == 1
    parts = [(one.tensors[n][0] - HEAD[n].astype(float)).ravel() for n in sorted(HEAD)]
    return np.concatenate(parts)


@pytest.mark.parametrize("name", MEANS)
def test_no_noise_and_a_wide_clip_is_the_plain_uniform_strategy(name: str, updates: Make) -> None:
    """To float32's last bit: the mean is added in another order."""
    plain = made(name)
    if hasattr(plain, "weighting"):
        plain = replace(plain, weighting="uniform")
    private = Private(made(name), central(clip=1e6))
    one, other = plain.init(HEAD, 4), private.init(HEAD, 4)
    for round in (1, 2, 3):
        given = random_updates(updates, 4, seed=round, size=0.1, round=round)
        one, other = plain.step(one, given), private.step(other, given)
        for tensor in HEAD:
            np.testing.assert_allclose(other.head[tensor], one.head[tensor], rtol=0, atol=2.5e-7)
        assert set(one.slots) == set(other.slots)


@pytest.mark.parametrize("count", [0, 1, 2, 7])
def test_the_denominator_is_fixed(count: int, updates: Make) -> None:
    given = random_updates(updates, count)
    moved = exact_step(Private(FedAvg(), central()), ServerState(HEAD), given)
    rows = [
        (given.tensors[n].astype(float) - HEAD[n]).reshape(count, HEAD[n].size)
        for n in sorted(HEAD)
    ]
    flat = np.concatenate(rows, axis=1)
    norms = np.linalg.norm(flat, axis=1, keepdims=True)
    wanted = (flat * np.minimum(1, 1.0 / np.maximum(norms, 1e-300))).sum(axis=0) / 4.0
    np.testing.assert_allclose(moved, wanted, atol=1e-15)


def test_no_neighbour_moves_the_sum_by_more_than_the_clip(updates: Make) -> None:
    """A search: one client more or less, ordinary, huge, tiny or opposed to the others."""
    strategy, state = Private(FedAvg(), central(clip=0.5)), ServerState(HEAD)
    worst = 0.0
    for seed in range(60):
        size = 10.0 ** np.random.default_rng(seed).uniform(-3, 6)
        given = random_updates(updates, 6, seed, size)
        whole = exact_step(strategy, state, given)
        for gone in range(6):
            keep = np.arange(6) != gone
            rest = replace(
                given,
                clients=given.clients[keep],
                tensors={n: t[keep] for n, t in given.tensors.items()},
                num_examples=given.num_examples[keep],
            )
            moved = 4.0 * np.linalg.norm(whole - exact_step(strategy, state, rest))
            worst = max(worst, float(moved))
    assert 0.5 * (1 - 1e-9) < worst <= 0.5 * (1 + 1e-9)


def test_examples_weigh_nothing(updates: Make) -> None:
    """Weights by examples would let one client count for more than the clip."""
    given = random_updates(updates, 3)
    strategy = Private(FedAvg(weighting="examples"), central())
    one = strategy.step(strategy.init(HEAD, 3), given)
    lopsided = replace(given, num_examples=np.array([1, 10**6, 1]))
    other = strategy.step(strategy.init(HEAD, 3), lopsided)
    assert delta_of(one).tobytes() == delta_of(other).tobytes()


def test_the_noise_in_the_head_has_the_deviation_promised(updates: Make) -> None:
    """z S / m in every entry: chi square over all, and Kolmogorov."""
    own = central(clip=0.5, multiplier=1.5)
    given = random_updates(updates, 3)
    quiet = exact_step(Private(FedAvg(), replace(own, multiplier=0.0)), ServerState(HEAD), given)
    drawn = np.concatenate([
        exact_step(Private(FedAvg(), own).with_noise(seeded(i)), ServerState(HEAD), given) - quiet
        for i in range(400)
    ]) * 4.0 / (1.5 * 0.5)  # fmt: skip
    low, high = stats.chi2.ppf([FALSE_ALARM / 2, 1 - FALSE_ALARM / 2], drawn.size)
    assert low < float(drawn @ drawn) < high
    assert stats.kstest(drawn, "norm").pvalue > FALSE_ALARM


def test_no_noise_before_it_is_given(updates: Make) -> None:
    strategy = Private(FedAvg(), central(multiplier=1.0))
    with pytest.raises(AssertionError, match="written down"):
        strategy.step(strategy.init(HEAD, 2), random_updates(updates, 2))


def test_a_round_of_nobody_moves_by_noise_alone(updates: Make) -> None:
    strategy = Private(FedAvg(), central(multiplier=2.0)).with_noise(seeded(9))
    state = strategy.step(strategy.init(HEAD, 4), random_updates(updates, 0))
    wanted = seeded(9).normal(SIZE) * 2.0 / 4.0
    np.testing.assert_allclose(delta_of(state), wanted, atol=1e-6)


def test_zero_updates_stay_zero(updates: Make) -> None:
    given = random_updates(updates, 3, size=0.0)
    strategy = Private(FedAvg(), central(adaptive=True))
    state = strategy.step(strategy.init(HEAD, 3), given)
    assert not delta_of(state).any()
    assert state.slots[CLIP][0] < 1.0  # all of them were inside


class TestAdaptiveClip:
    def test_the_multipliers_together_are_what_is_accounted(self) -> None:
        """z_Delta^-2 + (2 sigma_b)^-2 = z^-2, also where the noise is larger than a tenth of m."""
        for multiplier, denominator in ((0.5, 100.0), (1.0, 10.0), (7.0, 3.0), (1.0, 1e4)):
            own = central(multiplier=multiplier, denominator=denominator, adaptive=True)
            both = own.deviation**-2 + (2 * own.count_noise) ** -2
            assert both == pytest.approx(multiplier**-2, rel=1e-12)
            assert own.count_noise >= denominator / 10

    @pytest.mark.parametrize("quantile", [0.2, 0.5, 0.8])
    @pytest.mark.parametrize("start", [0.5, 50.0])
    def test_the_clip_comes_to_the_quantile(
        self, quantile: float, start: float, updates: Make
    ) -> None:
        own = central(
            clip=start, adaptive=True, quantile=quantile, denominator=200.0, multiplier=0.5
        )
        strategy = Private(FedAvg(server_learning_rate=0.0), own)
        state = strategy.init(HEAD, 200)
        clips = []
        for round in range(1, 121):
            given = random_updates(updates, 200, seed=round, round=round)
            state = strategy.with_noise(seeded(round)).step(state, given)
            clips.append(float(state.slots[CLIP][0]))
        reached = stats.chi(SIZE).cdf(np.mean(clips[-40:]))
        assert abs(reached - quantile) < 0.05

    def test_the_clip_follows_the_equation(self, updates: Make) -> None:
        own = central(clip=2.0, adaptive=True, quantile=0.3, rate=0.7, denominator=5.0)
        strategy = Private(FedAvg(), own)
        rows = np.zeros((4, 3, 4))
        rows[:, 0, 0] = [0.1, 1.9, 2.5, 9.0]  # two of four inside; five were expected
        given = updates({"weight": HEAD["weight"] + rows, "bias": np.stack([HEAD["bias"]] * 4)})
        state = strategy.step(strategy.init(HEAD, 4), given)
        share = 0.5 + (2 * 0.5 - 2 * 0.5) / 5
        assert state.slots[CLIP][0] == pytest.approx(2.0 * np.exp(-0.7 * (share - 0.3)))

    def test_one_client_moves_the_noised_count_by_half(self, updates: Make) -> None:
        """Its sensitivity, on which the multiplier 2 sigma_b rests."""
        own = central(clip=1.0, adaptive=True, rate=1.0, denominator=5.0)
        strategy = Private(FedAvg(), own)
        given = random_updates(updates, 3, size=0.01)
        nobody = random_updates(updates, 0)
        one = random_updates(updates, 1, size=0.01)
        clips = [
            float(strategy.step(strategy.init(HEAD, 5), g).slots[CLIP][0])
            for g in (nobody, one, given)
        ]
        shares = -np.log(clips) + own.quantile
        np.testing.assert_allclose(np.diff(shares) * 5.0, [0.5, 1.0], rtol=1e-9)


class TestBandedNoise:
    ROUNDS, BANDS = 7, 3

    def strategy(self) -> Private:
        column = tuple(coefficients(self.BANDS).tolist())
        own = central(clip=0.5, multiplier=1.2, bands=column, sensitivity=1.7)
        return Private(FedAvg(server_learning_rate=1.0), own)

    def noises(self, updates: Make, rounds: list[int]) -> dict[int, np.ndarray]:
        """What was added to the sums of these rounds; the others missed their quorum."""
        strategy = self.strategy()
        state, found = strategy.init(HEAD, 4), {}
        for round in rounds:
            given = random_updates(updates, 0, round=round)
            found[round] = 4.0 * exact_step(strategy.with_noise(seeded(round)), state, given)
            state = strategy.with_noise(seeded(round)).step(state, given)
            state = replace(state, head=HEAD)
        return found

    def test_the_sums_get_the_rows_of_the_inverse(self, updates: Make) -> None:
        fresh = np.stack([seeded(t).normal(SIZE) for t in range(1, self.ROUNDS + 1)])
        fresh *= 1.2 * 0.5 * 1.7
        column = np.zeros(self.ROUNDS)
        column[: self.BANDS] = coefficients(self.BANDS)
        matrix = np.array([
            [column[i - j] if i >= j else 0.0 for j in range(self.ROUNDS)]
            for i in range(self.ROUNDS)
        ])  # fmt: skip
        found = self.noises(updates, [*range(1, self.ROUNDS + 1)])
        wanted = np.linalg.inv(matrix) @ fresh
        np.testing.assert_allclose(np.stack([*found.values()]), wanted, atol=1e-12)

    def test_rounds_without_a_sum_leave_no_gap(self, updates: Make) -> None:
        """Rounds 3 and 4 were given up: round 5 still has noise of row 5."""
        found = self.noises(updates, [1, 2, 5])
        stream = seeded(5)
        fresh = [seeded(1).normal(SIZE), seeded(2).normal(SIZE)]
        fresh += [stream.normal(SIZE) for _ in range(3)]
        column = coefficients(self.BANDS)
        rows: list[np.ndarray] = []
        for t, own in enumerate(fresh):
            noise = own * 1.2 * 0.5 * 1.7
            for i in (1, 2):
                if t >= i:
                    noise = noise - column[i] * rows[t - i]
            rows.append(noise)
        np.testing.assert_allclose(found[5], rows[4], atol=1e-12)


def test_what_is_remembered_is_in_the_slots(updates: Make) -> None:
    """A strategy made anew goes on from the tensors of a commit with the same bits."""
    column = tuple(coefficients(3).tolist())
    for own in (central(multiplier=1.0, adaptive=True), central(multiplier=1.0, bands=column)):
        whole = Private(made("fedavgm"), own)
        state = whole.init(HEAD, 4)
        shapes = {n: (t.shape, t.dtype) for n, t in state.slots.items()}
        for round in range(1, 6):
            given = random_updates(updates, 3, seed=round, round=round)
            anew = Private(made("fedavgm"), own)
            copied = ServerState(
                {n: t.copy() for n, t in state.head.items()},
                {n: t.copy() for n, t in state.slots.items()},
            )
            again = anew.with_noise(seeded(round)).step(copied, given)
            state = whole.with_noise(seeded(round)).step(state, given)
            assert {n: (t.shape, t.dtype) for n, t in state.slots.items()} == shapes
            for one, other in ((state.head, again.head), (state.slots, again.slots)):
                assert all(one[n].tobytes() == other[n].tobytes() for n in one)


@pytest.mark.parametrize("name", [n for n in MEANS if hasattr(STRATEGIES[n], "personal")])
def test_what_clients_do_for_themselves_is_passed_on(name: str) -> None:
    inner = made(name)
    for outer in (
        Private(inner, central(adaptive=True)),
        AtClients(inner, Protection(clip=1.0, noise=1.0)),
    ):
        state, own = outer.init(HEAD, 3), inner.init(HEAD, 3)
        assert personal_of(outer, state) == personal_of(inner, own)
        assert personal_of(outer, state) is not None
        assert not outer.finished(state)
        plan = plan_of(3)
        assert outer.plan(state, plan).personal == inner.plan(own, plan).personal


def plan_of(count: int) -> RoundPlan:
    ids = np.arange(count, dtype=np.int64)
    return RoundPlan(1, ids, ids.astype(np.uint64), LocalTraining(1, 8, 0.1))


class _Ones:
    """Noise of 1 everywhere, to be measured."""

    source, id = "test", "ones"

    def normal(self, size: int) -> np.ndarray:
        return np.ones(size)


class TestSecureSums:
    RING = SecureRing(8.0, 0.67, masked=False)

    def test_the_plan_says_what_clients_do(self) -> None:
        weights = np.array([1.0, 0.5, 0.25, 0.1, 0.7])
        strategy = Private(FedAvg(), ring=replace(self.RING, weights=weights))
        plan = strategy.plan(strategy.init(HEAD, 5), plan_of(5).part(np.array([1, 3])))
        own = plan.protection
        assert own is not None
        assert (own.ring_bits, own.clip, own.noise, own.masked) == (32, 0, 0, False)
        assert own.scale * 8.0 <= own.limit < 2**31 / 2
        np.testing.assert_array_equal(plan.weights, [0.5, 0.1])

    @pytest.mark.parametrize(("asked", "least"), [(1, 1), (2, 2), (3, 3), (100, 67)])
    def test_the_noise_of_the_fewest_survivors_is_enough(self, asked: int, least: int) -> None:
        own = central(multiplier=1.5, clip=0.4)
        strategy = Private(FedAvg(), own, self.RING)
        plan = strategy.plan(strategy.init(HEAD, asked), plan_of(asked))
        assert self.RING.least(asked) == least
        assert plan.protection is not None
        assert plan.protection.clip == 0.4
        # as much in all for any number asked, or it would tell how many there are
        assert plan.protection.noise**2 * asked == pytest.approx((1.5 * 0.4) ** 2 / 0.67)
        assert plan.protection.noise**2 * least >= (1.5 * 0.4) ** 2 - 1e-12
        assert plan.weights is None
        assert plan.protection.scale * (0.4 + 12 * plan.protection.noise) <= plan.protection.limit

    def test_a_sum_is_divided_by_its_weight_or_by_the_fixed_denominator(self) -> None:
        total = {n: np.full(t.shape, 0.6) for n, t in HEAD.items()}
        plain = Private(FedAvg(), ring=self.RING)
        state = plain.step_sum(plain.init(HEAD, 4), total, 1.5, plan_of(4))
        np.testing.assert_allclose(delta_of(state), 0.4, atol=1e-7)
        noised = Private(FedAvg(), central(multiplier=1.0), self.RING).with_noise(seeded(1))
        state = noised.step_sum(noised.init(HEAD, 4), total, 3.0, plan_of(3))
        np.testing.assert_allclose(delta_of(state), 0.15, atol=1e-7)  # the noise is in the sum

    def test_where_nobody_is_asked_the_server_adds_the_noise(self) -> None:
        strategy = Private(FedAvg(), central(multiplier=2.0), self.RING).with_noise(seeded(3))
        total = {n: np.zeros(t.shape) for n, t in HEAD.items()}
        state = strategy.step_sum(strategy.init(HEAD, 4), total, 0.0, plan_of(0))
        wanted = seeded(3).normal(SIZE) * 0.5 / 0.67**0.5
        np.testing.assert_allclose(delta_of(state), wanted, atol=1e-6)

    def test_nothing_about_the_sum_tells_how_many_were_asked(self) -> None:
        """Neither the deviation of the noise, with and without dropouts, nor the grid."""
        strategy = Private(
            FedAvg(), central(multiplier=1.5, clip=0.4), replace(self.RING, population=9)
        )
        scales = set()
        for asked in range(10):
            plan = strategy.plan(strategy.init(HEAD, 9), plan_of(asked))
            assert plan.protection is not None
            scales.add(plan.protection.scale)
            for survivors in range(self.RING.least(asked) if asked else 0, asked + 1):
                ones = replace(strategy, noise=_Ones())
                zeros = {n: np.zeros(t.shape) for n, t in HEAD.items()}
                state = ones.step_sum(ones.init(HEAD, 9), zeros, float(survivors), plan)
                added = delta_of(state)[0] * central().denominator
                variance = survivors * plan.protection.noise**2 + added**2
                assert variance == pytest.approx((1.5 * 0.4) ** 2 / 0.67, rel=1e-5)
        assert len(scales) == 1

    def test_the_servers_noise_is_on_the_grid_of_the_sum(self) -> None:
        own = replace(central(multiplier=1.5, clip=0.4), denominator=1.0)
        strategy = Private(FedAvg(), own, SecureRing(8.0, 0.67, False, population=200_000))
        plan = strategy.plan(strategy.init(HEAD, 9), plan_of(0))
        zeros = {n: np.zeros(t.shape) for n, t in HEAD.items()}
        noised = strategy.with_noise(seeded(3))
        moved = delta_of(noised.step_sum(strategy.init(HEAD, 9), zeros, 0.0, plan))
        assert plan.protection is not None
        steps = moved.astype(np.float64) * plan.protection.scale
        assert np.abs(steps).max() > 100
        np.testing.assert_allclose(steps, np.rint(steps), atol=1e-3)

    def test_statistics_are_summed_in_the_wide_ring_without_weights(self) -> None:
        strategy = Private(STRATEGIES["fed3r"](), ring=replace(self.RING, weights=np.ones(5)))
        plan = strategy.plan(strategy.init(HEAD, 5), plan_of(5))
        assert plan.protection is not None
        assert plan.protection.ring_bits == 64
        assert plan.weights is None


def test_clients_protect_updates_only() -> None:
    asked = Protection(clip=0.3, noise=0.2)
    assert AtClients(FedAvg(), asked).plan(ServerState(HEAD), plan_of(2)).protection == asked
    fed3r = AtClients(STRATEGIES["fed3r"](), asked)
    assert fed3r.plan(fed3r.init(HEAD, 2), plan_of(2)).protection is None
