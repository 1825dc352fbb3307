"""The accountants against published values, closed forms and each other.

The oracles here are slow and obvious: the Gaussian's own formula (Balle and Wang 2018, theorem 8),
numeric integrals over two densities, Renyi divergences at whole orders (Mironov et al. 2019), and
the accountants of Opacus.
"""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from scipy.optimize import brentq
from scipy.special import gammaln, logsumexp
from scipy.stats import norm

from fedtl.errors import InputError
from fedtl.privacy.accounting import (
    Release,
    accountant_for,
    epsilon_of,
    loosely,
    noise_for,
)

DELTA = 1e-5
MNIST = (256 / 60_000, 1.1, 14_062)
"""Rate, multiplier and steps of the tutorial that everybody quotes."""


def gaussian_delta(epsilon: float, sigma: float) -> float:
    """Balle and Wang 2018, theorem 8, sensitivity 1."""
    inside = norm.cdf(0.5 / sigma - epsilon * sigma)
    return float(inside - math.exp(epsilon) * norm.cdf(-0.5 / sigma - epsilon * sigma))


def gaussian_epsilon(sigma: float, delta: float) -> float:
    return float(brentq(lambda e: gaussian_delta(e, sigma) - delta, 0, 100, xtol=1e-12))


def mixture_epsilon(up: float, down: float, rate: float, delta: float) -> float:
    """The larger of both hockey-stick divergences of two mixtures of unit Gaussians.

    One of ``(1 - q) N(0, 1) + q N(up, 1)`` from the same with ``down``, by a sum over a fine grid.
    """
    x = np.linspace(-60, 60, 1_200_001)
    step = x[1] - x[0]
    p = (1 - rate) * norm.pdf(x) + rate * norm.pdf(x, up)
    q = (1 - rate) * norm.pdf(x) + rate * norm.pdf(x, down)

    def delta_of(epsilon: float) -> float:
        pair = [np.maximum(a - math.exp(epsilon) * b, 0).sum() * step for a, b in ((p, q), (q, p))]
        return float(max(pair))

    return float(brentq(lambda e: delta_of(e) - delta, 0, 60, xtol=1e-9))


def renyi(rate: float, sigma: float, order: int) -> float:
    """Of one Gaussian sampled by coins, at a whole order (Mironov et al. 2019, equation 5)."""
    i = np.arange(order + 1)
    log_choose = gammaln(order + 1) - gammaln(i + 1) - gammaln(order - i + 1)
    terms = log_choose + i * math.log(rate) + (order - i) * math.log1p(-rate)
    return float(logsumexp(terms + (i * i - i) / (2 * sigma**2))) / (order - 1)


@pytest.mark.parametrize(
    ("epsilon", "sigma"),
    [(0.5, 7.0318), (1.0, 3.7306), (2.0, 1.9938), (4.0, 1.0812), (8.0, 0.6002)],
)
def test_analytic_gaussian(epsilon: float, sigma: float) -> None:
    assert epsilon_of([Release(sigma)], DELTA) == pytest.approx(epsilon, rel=2e-4)
    found = noise_for(epsilon, DELTA, lambda noise: [Release(noise)])
    assert sigma - 5e-5 <= found <= sigma + 1.1e-3
    assert gaussian_delta(epsilon, found) <= DELTA < gaussian_delta(epsilon, found * (1 - 1e-3))


@pytest.mark.parametrize(("sigma", "count"), [(0.7, 1), (2.0, 5), (30.0, 900), (5.0, 1)])
def test_gaussians_compose_to_one(sigma: float, count: int) -> None:
    exact = gaussian_epsilon(sigma / math.sqrt(count), DELTA)
    assert epsilon_of([Release(sigma, count)], DELTA) == pytest.approx(exact, rel=1e-9)
    apart = [Release(sigma)] * (count // 2) + [Release(sigma, count - count // 2)]
    assert epsilon_of(apart, DELTA) == pytest.approx(exact, rel=1e-9)


def test_two_gaussians_add_their_precisions() -> None:
    exact = gaussian_epsilon(1 / math.sqrt(1 / 4 + 3 / 9), DELTA)
    assert epsilon_of([Release(2.0), Release(3.0, 3)], DELTA) == pytest.approx(exact, rel=1e-9)


def test_renyi_values_that_everybody_quotes() -> None:
    rate, sigma, steps = MNIST
    orders = range(2, 256)
    spent = {a: steps * renyi(rate, sigma, a) for a in orders}
    classic = min(spent[a] + math.log(1 / DELTA) / (a - 1) for a in orders)
    assert classic == pytest.approx(3.009, abs=5e-4)
    tight = min(
        spent[a] + math.log1p(-1 / a) - (math.log(DELTA) + math.log(a)) / (a - 1) for a in orders
    )
    assert tight == pytest.approx(2.597, abs=5e-4)
    ours = epsilon_of([Release(sigma, steps, "poisson", rate)], DELTA, "rdp")
    assert ours == pytest.approx(tight, abs=1e-3)
    assert ours <= tight + 1e-9  # it also looks between whole orders


def test_distributions_of_the_same_run() -> None:
    rate, sigma, steps = MNIST
    ours = epsilon_of([Release(sigma, steps, "poisson", rate)], DELTA)
    assert ours == pytest.approx(2.3817, rel=5e-4)  # on a grid of 1e-4; coarser is never below
    assert ours >= 2.3816


@pytest.mark.parametrize(
    ("rate", "sigma", "steps"), [*itertools.product((0.01, 0.3), (0.7, 1.0, 4.0), (1, 300))]
)
def test_distributions_are_never_above_renyi(rate: float, sigma: float, steps: int) -> None:
    release = [Release(sigma, steps, "poisson", rate)]
    exact, bound = epsilon_of(release, DELTA), epsilon_of(release, DELTA, "rdp")
    assert exact <= bound <= loosely(release, DELTA) + 1e-9
    assert exact <= epsilon_of([Release(sigma, steps)], DELTA)  # sampling only helps


@pytest.mark.parametrize(("rate", "sigma"), [(0.1, 0.8), (0.5, 2.0), (0.02, 0.5)])
def test_one_sampled_step_against_its_two_densities(rate: float, sigma: float) -> None:
    exact = mixture_epsilon(1 / sigma, 0.0, rate, DELTA)
    found = epsilon_of([Release(sigma, 1, "poisson", rate)], DELTA)
    assert exact - 1e-6 <= found <= exact * 1.002


@pytest.mark.parametrize(("sigma", "population", "sample"), [(3.0, 20, 10), (4.0, 10, 8)])
def test_fixed_numbers_are_counted_for_two_clips(
    sigma: float, population: int, sample: int
) -> None:
    """One client in another's place: its part goes from +S to -S where it was drawn."""
    rate = sample / population
    exact = mixture_epsilon(1 / sigma, -1 / sigma, rate, DELTA)
    release = Release(sigma / 2, 1, "fixed", 1.0, population, sample)
    assert epsilon_of([release], DELTA) >= exact
    halved = Release(sigma, 1, "fixed", 1.0, population, sample)  # the mistake to make
    assert epsilon_of([halved], DELTA) < exact


def test_fixed_numbers_of_everybody_are_no_sampling() -> None:
    everybody = Release(2.0, 7, "fixed", 1.0, 10, 10)
    assert epsilon_of([everybody], DELTA) == epsilon_of([Release(2.0, 7)], DELTA)
    assert accountant_for([everybody], "pld") == "pld"
    assert accountant_for([Release(2.0, 7, "fixed", 1.0, 10, 9)], "pld") == "rdp"


@pytest.mark.parametrize(("rate", "sigma", "steps"), [(0.01, 1.0, 1000), (0.1, 1.5, 200)])
def test_opacus_agrees_by_renyi(rate: float, sigma: float, steps: int) -> None:
    from opacus.accountants.analysis import rdp

    orders = [1 + x / 10 for x in range(1, 100)] + list(range(11, 64)) + [128, 256]
    spent = rdp.compute_rdp(q=rate, noise_multiplier=sigma, steps=steps, orders=orders)
    theirs, _ = rdp.get_privacy_spent(orders=orders, rdp=spent, delta=DELTA)
    ours = epsilon_of([Release(sigma, steps, "poisson", rate)], DELTA, "rdp")
    assert theirs - 1e-9 <= ours <= theirs * 1.0005  # it leaves out orders that are too long


def test_opacus_agrees_by_distributions() -> None:
    from opacus.accountants import PRVAccountant

    rate, sigma, steps = 0.1, 1.5, 200
    prv = PRVAccountant()
    prv.history = [(sigma, rate, steps)]
    upper = prv.get_epsilon(DELTA, eps_error=0.02)
    ours = epsilon_of([Release(sigma, steps, "poisson", rate)], DELTA)
    assert upper - 0.04 <= ours <= upper + 2e-3


def test_sampled_and_unsampled_together() -> None:
    """Between the larger part and the sum of both epsilons, each at half the delta."""
    parts = [Release(2.0, 10, "poisson", 0.2)], [Release(5.0, 4)]
    both = epsilon_of([*parts[0], *parts[1]], DELTA)
    assert max(epsilon_of(part, DELTA) for part in parts) < both
    assert both < sum(epsilon_of(part, DELTA / 2) for part in parts)
    half = epsilon_of([Release(2.0, 5, "poisson", 0.2)] * 2 + list(parts[1]), DELTA)
    assert half == both  # in whatever order and pieces


@pytest.mark.parametrize("accountant", ["pld", "rdp"])
@pytest.mark.parametrize("epsilon", [0.5, 8.0])
def test_noise_is_the_least_that_is_enough(accountant: str, epsilon: float) -> None:
    def releases(noise: float) -> list[Release]:
        return [Release(noise, 60, "poisson", 0.15)]

    found = noise_for(epsilon, DELTA, releases, accountant)
    assert epsilon_of(releases(found), DELTA, accountant) <= epsilon
    assert epsilon_of(releases(found * (1 - 3e-3)), DELTA, accountant) > epsilon
    assert float(f"{found:.4g}") == found


@pytest.mark.parametrize("edge", [2.001, 2.001 * (1 + 1e-6), 2.0015, 2.002 * (1 - 1e-6)])
def test_noise_is_enough_also_beside_an_edge(edge: float) -> None:
    """Where the search ends on the wrong side of it, rounding up need not be enough."""

    def releases(noise: float) -> list[Release]:
        return [Release(3.0 if noise >= edge else 1.0)]

    found = noise_for(2.0, DELTA, releases)
    assert edge <= found < edge * 1.001


def test_what_costs_nothing_and_what_costs_everything() -> None:
    assert epsilon_of([], DELTA) == 0
    assert epsilon_of([Release(1.0, 0)], DELTA) == 0
    assert epsilon_of([Release(0.0, 3, "poisson", 0.1)], DELTA) == math.inf
    assert epsilon_of([Release(1e6)], DELTA) == 0  # within delta
    assert noise_for(1.0, DELTA, lambda noise: []) == 0
    assert noise_for(1e6, DELTA, lambda noise: [Release(noise)]) == 0.01
    with pytest.raises(InputError, match="no noise is enough"):
        noise_for(1e-9, 1e-12, lambda noise: [Release(noise * 1e-9)])
    with pytest.raises(InputError, match="coins and sums of a fixed number"):
        epsilon_of([Release(1.0, 1, "poisson", 0.1), Release(1.0, 1, "fixed", 1, 9, 3)], DELTA)


def test_hopeless_noise_takes_no_memory() -> None:
    found = epsilon_of([Release(0.01, 1000, "poisson", 0.5)], DELTA)
    assert 1e6 < found < math.inf


def test_a_delta_below_what_is_cut_off_is_bounded_still() -> None:
    release = [Release(1.0, 20, "poisson", 0.1)]
    found = epsilon_of(release, 1e-17)
    assert epsilon_of(release, DELTA) < found == epsilon_of(release, 1e-17, "rdp") < math.inf


def test_more_rounds_cost_more() -> None:
    spent = [epsilon_of([Release(2.0, t, "poisson", 0.1)], DELTA) for t in (1, 5, 20)]
    assert spent == sorted(set(spent))


def test_the_library_keeps_quiet(caplog: pytest.LogCaptureFixture) -> None:
    epsilon_of([Release(1.01, 100, "poisson", 0.1)], DELTA, "rdp")
    assert not caplog.records
