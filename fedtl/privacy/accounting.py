"""What releases of noisy sums cost together: epsilon at a delta, through ``dp-accounting``.

Gaussians without sampling compose to one Gaussian, whose epsilon is known exactly (Balle and Wang,
ICML 2018, theorem 8). With Poisson sampling, privacy loss distributions are composed numerically
("pld"; Koskela et al. 2020, connect-the-dots of Doroshenko et al. 2022), or Renyi divergences
("rdp"; Mironov et al. 2019, conversion of Canonne et al. 2020). A fixed number without replacement
has only the Renyi bound (Wang, Balle and Kasiviswanathan 2019, theorem 27), for neighbours that
replace one member. Every figure is an upper bound; the Renyi one is the larger.

``dp-accounting`` takes over a second to import, so it is imported where it is used.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

from fedtl.errors import InputError

Sampling = Literal["none", "poisson", "fixed"]

BEYOND = 1000.0
"""No privacy loss distribution is computed where epsilon is about as large: that takes gigabytes,
and the Renyi bound, which takes nothing, says as well that nothing is protected."""

ROUGHNESS = 2e-4
"""About the share by which the grid of losses may make epsilon larger. Rounding them up to a grid
adds about its interval squared with every step."""

FIXED_ORDERS = (1.25, 1.5, 1.75, *range(2, 17), 18, 20, 22, 24, 28, 32, 40, 48, 64, 80)
"""Renyi orders for fixed numbers without replacement: few, as one takes its square of steps."""

LOOSE_ORDERS = (2, 3, 4, 6, 8, 12, 16, 24, 32, 63)
"""Renyi orders for a bound that takes no time."""

DIGITS = 4
"""Of a noise multiplier that was solved for; rounded up, so that all ends use the very same."""

LEAST_NOISE, MOST_NOISE = 1e-2, 1e7
"""Multipliers among which one is looked for."""


@dataclass(frozen=True)
class Release:
    """One noisy sum, or several alike.

    Attributes:
        noise_multiplier: deviation of the Gaussian noise over how far one neighbour more or less
            (for "fixed": another in its place) moves the sum; 0 is no noise.
        count: how many.
        sampling: how members come into the sum: all, each by its own coin, or ``sample`` of
            ``population`` without replacement.
        rate: of the coin, in (0, 1].
    """

    noise_multiplier: float
    count: int = 1
    sampling: Sampling = "none"
    rate: float = 1.0
    population: int = 0
    sample: int = 0

    @property
    def share(self) -> float:
        """Of the members that a sum has, on average."""
        if self.sampling == "none":
            return 1.0
        return self.rate if self.sampling == "poisson" else self.sample / self.population


def epsilon_of(releases: Sequence[Release], delta: float, accountant: str = "pld") -> float:
    """Epsilon of all releases together at ``delta``.

    Args:
        releases: all, of neighbours of one kind.
        delta: in (0, 1).
        accountant: "pld" or "rdp"; see ``accountant_for``.

    Returns:
        Not less than 0; infinity where one has no noise; 0 for none.

    Raises:
        InputError: coins and fixed numbers together, whose neighbours differ.
    """
    merged = _merged(releases)
    if any(release.noise_multiplier <= 0 for release in merged):
        return math.inf
    return _epsilon(merged, delta, accountant_for(merged, accountant)) if merged else 0.0


def loosely(releases: Sequence[Release], delta: float) -> float:
    """An epsilon not below ``epsilon_of``'s, by either accountant, in a tenth of the time."""
    merged = _merged(releases)
    return _renyi(merged, delta, LOOSE_ORDERS) if merged else 0.0


def accountant_for(releases: Sequence[Release], asked: str) -> str:
    """The accountant that can do it: only Renyi's knows fixed numbers without replacement.

    Raises:
        InputError: see ``epsilon_of``.
    """
    kinds = {release.sampling for release in releases if release.count and release.share < 1}
    if kinds == {"poisson", "fixed"}:
        raise InputError(
            "no accountant adds up sums sampled by coins and sums of a fixed number",
            where="privacy.sampling",
        )
    return "rdp" if "fixed" in kinds else asked


def noise_for(
    epsilon: float,
    delta: float,
    releases_of: Callable[[float], Sequence[Release]],
    accountant: str = "pld",
) -> float:
    """The least noise multiplier (to four digits, rounded up) that spends no more than ``epsilon``.

    Args:
        releases_of: the releases, by the multiplier; more noise must not cost more.

    Returns:
        0 where even without noise nothing is released.

    Raises:
        InputError: no noise is enough.
    """
    if not _merged(releases_of(1.0)):
        return 0.0
    from scipy.optimize import brentq

    def missed(log_noise: float) -> float:
        spent = epsilon_of(releases_of(math.exp(log_noise)), delta, accountant)
        return math.log(max(spent, 1e-12)) - math.log(epsilon)

    def roughly(log_noise: float) -> float:
        return _roughly(_merged(releases_of(math.exp(log_noise))), delta) - epsilon

    low, high = math.log(LEAST_NOISE), math.log(MOST_NOISE)
    if missed(high) > 0:
        raise InputError(
            "no noise is enough for it", where="privacy.epsilon", got=epsilon, do="Raise it"
        )
    start = low
    if roughly(low) > 0:
        start = high if roughly(high) > 0 else float(brentq(roughly, low, high, xtol=1e-3))
    step = 0.02
    below = above = start
    while missed(below) < 0:
        if below <= low:
            return LEAST_NOISE
        below, step = max(low, below - step), 2 * step
    step = 0.02
    while missed(above) > 0:
        above, step = min(high, above + step), 2 * step
    found = below if below == above else float(brentq(missed, below, above, xtol=2e-5))
    unit = 10.0 ** (math.floor(found / math.log(10)) - DIGITS + 1)
    times = math.ceil(math.exp(found) / unit - 1e-9)
    while True:  # the search may end on either side of it
        noise = float(f"{times * unit:.{DIGITS}g}")
        if epsilon_of(releases_of(noise), delta, accountant) <= epsilon:
            return noise
        times += 1


def _merged(releases: Sequence[Release]) -> tuple[Release, ...]:
    """The same with like ones counted together, in a fixed order; nothing that nobody is in."""
    counts: dict[tuple[Any, ...], int] = {}
    for one in releases:
        whole = one.share >= 1
        key = (
            (one.noise_multiplier, "none", 1.0, 0, 0)
            if whole
            else (one.noise_multiplier, one.sampling, one.rate, one.population, one.sample)
        )
        if one.share > 0:
            counts[key] = counts.get(key, 0) + one.count
    return tuple(
        Release(noise, count, sampling, rate, population, sample)
        for (noise, sampling, rate, population, sample), count in sorted(counts.items())
        if count
    )


@lru_cache(maxsize=4096)
def _epsilon(merged: tuple[Release, ...], delta: float, accountant: str) -> float:
    sampled = [release for release in merged if release.sampling != "none"]
    if accountant == "pld" and not sampled:
        return _gaussian(_precision(merged), delta)
    size = _size(merged, delta)
    if accountant == "rdp" or size > BEYOND:
        return _renyi(merged, delta)
    steps = sum(release.count for release in sampled)
    interval = min(max(math.sqrt(ROUGHNESS * size / steps), 5e-5), 1e-3)
    found = _distributed(merged, delta, interval)
    return found if math.isfinite(found) else _renyi(merged, delta)  # below what is cut off


def _precision(releases: Sequence[Release]) -> float:
    """1 / z^2 of the one Gaussian that unsampled Gaussians compose to."""
    return math.fsum(r.count / r.noise_multiplier**2 for r in releases)


def _gaussian(precision: float, delta: float) -> float:
    from dp_accounting import get_epsilon_gaussian

    return float(get_epsilon_gaussian(1 / math.sqrt(precision), delta))


@lru_cache(maxsize=4096)
def _renyi(
    merged: tuple[Release, ...], delta: float, orders: tuple[float, ...] | None = None
) -> float:
    import dp_accounting as dp
    from dp_accounting.rdp import RdpAccountant

    fixed = any(release.sampling == "fixed" for release in merged)
    neighbours = dp.NeighboringRelation
    relation = neighbours.REPLACE_ONE if fixed else neighbours.ADD_OR_REMOVE_ONE
    spent = RdpAccountant(orders or (FIXED_ORDERS if fixed else None), relation)
    with _quiet():
        for release in merged:
            event: Any = dp.GaussianDpEvent(release.noise_multiplier)
            if release.sampling == "poisson":
                event = dp.PoissonSampledDpEvent(release.rate, event)
            elif release.sampling == "fixed":
                event = dp.SampledWithoutReplacementDpEvent(
                    release.population, release.sample, event
                )
            spent.compose(event, release.count)
        return float(spent.get_epsilon(delta))


def _distributed(merged: tuple[Release, ...], delta: float, interval: float) -> float:
    """By privacy loss distributions on a grid of losses that far apart, rounded up."""
    sampled = [release for release in merged if release.sampling != "none"]
    least = min(release.noise_multiplier for release in sampled)
    interval = max(interval, (10 / least + 0.5 / least**2) / 2e6)  # one step's losses fit
    total: Any = None
    for release in sampled:
        one = _loss(release.noise_multiplier, release.rate, interval).self_compose(release.count)
        total = one if total is None else total.compose(one)
    whole = _precision([release for release in merged if release.sampling == "none"])
    if whole:
        total = total.compose(_loss(1 / math.sqrt(whole), 1.0, interval))
    return max(0.0, float(total.get_epsilon_for_delta(delta)))


@lru_cache(maxsize=16)
def _loss(noise: float, rate: float, interval: float) -> Any:
    """The privacy loss distribution of one Gaussian with Poisson sampling."""
    from dp_accounting.pld import privacy_loss_distribution

    with _quiet():
        return privacy_loss_distribution.from_gaussian_mechanism(
            standard_deviation=noise, value_discretization_interval=interval, sampling_prob=rate
        )


def _size(merged: tuple[Release, ...], delta: float) -> float:
    """About how large epsilon is: the smaller of two guesses, both of closed form."""
    tail = math.sqrt(2 * math.log(1 / delta))
    guesses = (_precision(merged), _limit(merged))
    return min(mean / 2 + tail * math.sqrt(mean) for mean in guesses)


def _limit(merged: tuple[Release, ...]) -> float:
    """mu^2 of the Gaussian that many sampled ones come near to (Bu et al. 2020, theorem 5)."""
    parts = []
    for release in merged:
        inverse = 1 / release.noise_multiplier**2
        if release.sampling == "none":
            parts.append(release.count * inverse)
        elif inverse > 300:
            return math.inf
        else:
            parts.append(release.count * release.share**2 * math.expm1(inverse))
    return math.fsum(parts)


def _roughly(merged: tuple[Release, ...], delta: float) -> float:
    """Epsilon by that limit: where the search for a multiplier begins."""
    if not merged:
        return 0.0
    limit = min(_precision(merged), _limit(merged))
    return _gaussian(limit, delta)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the library's warnings: an order it leaves out makes the bound no smaller."""
    log = logging.getLogger("absl")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(level)
