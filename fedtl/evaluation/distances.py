"""How far clients' features lie apart, from summed statistics alone: CORAL, Frechet, conditional.

All follow from counts, class sums and Gram matrices (``clients.statistics``): what a client sends
for Fed3R is enough, and no row is looked at. Sources: CORAL, Sun and Saenko 2016 (arXiv
1607.01719), eq. 1; Frechet distance of Gaussians, Dowson and Landau 1982; shrinkage OAS, Chen et
al. 2010 (arXiv 0907.4698), eq. 23.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from fedtl.types import Float64, Int64

DIRECTIONS = 128
"""Principal directions of everybody's features in which covariances are compared for Frechet.

A pair costs a singular value decomposition of that size, a millisecond. What is left out can only
make the distance smaller: on PACS it is 70 to 92 % of that in all 1,280 directions, in the same
order."""

NOISE = 1e-12
"""A variance below this share of the second moment is rounding: the feature is constant."""

LEAST_DEGREES = 10
"""Degrees of freedom from which on a client's own spread within classes is trusted."""


@dataclass(frozen=True)
class Moments:
    """First and second moments of somebody's features, by class.

    Attributes:
        counts: int64 [C].
        sums: float64 [C, D], class sums.
        second: float64 [D, D], sum of x x^T.
    """

    counts: Int64
    sums: Float64
    second: Float64

    @property
    def examples(self) -> int:
        """n."""
        return int(self.counts.sum())

    @cached_property
    def mean(self) -> Float64:
        """[D]; NaN without an example."""
        with np.errstate(invalid="ignore"):
            return np.asarray(self.sums.sum(axis=0) / np.float64(self.examples))

    def covariance(self) -> Float64:
        """Over n, [D, D]: the same rows twice have the same; NaN below two examples.

        A constant feature has exactly none.
        """
        n = self.examples
        if n < 2:
            return np.full_like(self.second, np.nan)
        found = self.second - np.multiply.outer(n * self.mean, self.mean)
        constant = found.diagonal() <= NOISE * self.second.diagonal()
        found[constant] = 0
        found[:, constant] = 0
        found /= n
        return found

    def without(self, own: Moments) -> Moments:
        """Everybody but one of them."""
        return Moments(self.counts - own.counts, self.sums - own.sums, self.second - own.second)

    def projected(self, directions: Float64) -> Moments:
        """The moments of x P for orthonormal ``directions`` P [D, R]."""
        inner = directions.T @ (self.second @ directions)
        return Moments(self.counts, self.sums @ directions, (inner + inner.T) / 2)


def principal_directions(covariance: Float64, num: int = DIRECTIONS) -> tuple[Float64, float]:
    """The leading eigenvectors [D, min(D, num)] and the share of the variance they hold."""
    values, vectors = np.linalg.eigh(covariance)
    total = float(values.sum())
    share = float(values[-num:].sum()) / total if total > 0 else 1.0
    return np.ascontiguousarray(vectors[:, : -num - 1 : -1]), min(1.0, share)


def coral(s: Float64, t: Float64) -> float:
    """||S_s - S_t||_F^2 / (4 D^2) of two covariances [D, D]."""
    apart = s - t
    return float(np.einsum("ij,ij->", apart, apart)) / (4 * len(s) ** 2)


def coral_pairs(
    grams: Sequence[Float64], means: Float64, examples: Int64, centre: Float64
) -> Float64:
    """``coral`` of every two clients, [K, K], a row of all matrices at a time: exact, no copies.

    Args:
        grams: each client's sum of x x^T as packed upper triangle, with or without a bias.
        means: [K, D].
        examples: [K].
        centre: a covariance [D, D] near all of them: taken off first, so that digits stay.

    Returns:
        NaN for a client of fewer than two examples, except to itself: 0.
    """
    num, width = means.shape
    packed_width = int(np.sqrt(2 * len(grams[0])))
    counts = np.maximum(examples, 1)[:, None].astype(np.float64)
    products, place = np.zeros((num, num)), 0
    for i in range(width):
        rows = np.stack([gram[place : place + width - i] for gram in grams])
        rows /= counts
        rows -= means[:, i, None] * means[:, i:]
        rows -= centre[i, i:]
        rows[:, 1:] *= np.sqrt(2)  # stands for its mirror image too
        products += rows @ rows.T
        place += packed_width - i
    found = np.asarray(_squared(products) / (4 * width**2))
    few = examples < 2
    found[few], found[:, few] = np.nan, np.nan
    np.fill_diagonal(found, 0)
    return found


def shrinkage(values: Float64, examples: int) -> float:
    """OAS: how much of a covariance gives way to its mean variance times I, in [0, 1].

    Needs nothing but the covariance's own eigenvalues [P] (Ledoit and Wolf's needs fourth
    moments). One example is taken off for the mean, which is estimated too.
    """
    size = len(values)
    trace, squares = float(values.sum()), float(np.square(values).sum())
    spread = squares - trace**2 / size
    if spread <= NOISE * squares:
        return 1.0
    rho = ((1 - 2 / size) * squares + trace**2) / ((examples - 2 / size) * spread)
    return min(1.0, rho)


@dataclass(frozen=True)
class Gaussian:
    """What Frechet compares.

    Attributes:
        mean: [D], in full.
        values, vectors: eigenvalues [R] and eigenvectors [R, R] of the covariance in the shared
            directions.
        beside: the mean variance in each of the other D - R directions.
        examples: n.
    """

    mean: Float64
    values: Float64
    vectors: Float64
    beside: float
    examples: int


def gaussian(mean: Float64, variance: float, inner: Float64, examples: int) -> Gaussian:
    """The Gaussian of a client: as it is in the shared directions, isotropic beside them.

    To forget all else of two covariances alike brings them nearer, never further apart.

    Args:
        mean: [D].
        variance: trace of the covariance [D, D].
        inner: the covariance [R, R] in the shared directions.
        examples: n, at least 2.
    """
    values, vectors = np.linalg.eigh(inner)
    others = len(mean) - len(inner)
    beside = max(0.0, variance - float(np.trace(inner))) / others if others else 0.0
    return Gaussian(mean, np.maximum(values, 0), vectors, beside, examples)


def frechet(s: Gaussian, t: Gaussian) -> float:
    """||m_s - m_t||^2 + tr(S_s + S_t - 2 (S_s S_t)^1/2), at least 0.

    Both covariances are shrunk (``shrinkage``) as if both had the examples of the smaller one:
    what is equal stays equal. The trace of the root is the sum of the singular values of
    S_s^1/2 S_t^1/2, which loses half as many digits as eigenvalues of the product.
    """
    examples, apart = min(s.examples, t.examples), s.mean - t.mean
    deviations = []
    for values in (s.values, t.values):
        rho = shrinkage(values, examples)
        deviations.append(np.sqrt((1 - rho) * values + rho * values.mean()))
    one, other = deviations
    both = one[:, None] * (s.vectors.T @ t.vectors) * other
    cross = float(np.linalg.svd(both, compute_uv=False).sum())
    beside = (len(apart) - len(one)) * (np.sqrt(s.beside) - np.sqrt(t.beside)) ** 2
    inner = float(s.values.sum() + t.values.sum()) - 2 * cross
    return max(0.0, float(apart @ apart) + inner + float(beside))


@dataclass(frozen=True)
class Within:
    """The spread inside a class of a client: the yardstick of ``conditional``, and its noise.

    Attributes:
        variance: mean squared distance of an example to the mean of its class at its client, over
            everybody; NaN where no client has two examples of a class.
        own: the same at each client alone, [K]; everybody's where ``LEAST_DEGREES`` are not there.
    """

    variance: float
    own: Float64

    @classmethod
    def of(cls, scatters: Float64, degrees: Float64, second: float) -> Within:
        """From each client's ``class_scatter``, [K] twice, and the summed squares of all rows."""
        if not degrees.sum() > 0:
            return cls(np.nan, np.full(len(degrees), np.nan))
        scatters = np.where(scatters <= NOISE * second, 0.0, scatters)
        variance = float(scatters.sum() / degrees.sum())
        enough = degrees >= LEAST_DEGREES
        return cls(variance, np.where(enough, scatters / np.maximum(degrees, 1), variance))

    def judged(self, between: Float64, chance: Float64, weight: Float64) -> Float64:
        """Weighted squared distances less what chance adds, in units of the variance."""
        with np.errstate(divide="ignore", invalid="ignore"):
            if self.variance > 0:
                found = np.maximum(0, (between - chance) / (self.variance * weight))
            else:  # without a spread there is no unit; what is equal is equal
                found = np.where(between <= 0, 0.0, np.nan) + 0 * self.variance
        return np.where(weight > 0, found, np.nan)


def class_scatter(moments: Moments) -> tuple[float, int]:
    """Summed squared distances of examples to their class mean, and degrees of freedom."""
    held = moments.counts > 0
    sums, counts = moments.sums[held], moments.counts[held]
    between = float((np.einsum("cd,cd->c", sums, sums) / counts).sum())
    return float(np.trace(moments.second)) - between, int(counts.sum()) - len(counts)


def conditional(
    s: Moments, t: Moments, within: Within, own: float, other: float | None = None
) -> float:
    """How far the means of one and the same class lie apart, in units of a class's own variance.

    Over the common classes c, with w_c = n_sc n_tc / (n_sc + n_tc):
    sum w_c (||m_sc - m_tc||^2 - v_s / n_sc - v_t / n_tc) / (v sum w_c), at least 0, v the variance
    within classes; what is taken off is what chance alone adds. Label skew does not enter.

    Args:
        own, other: v_s and v_t, the spreads at s and t; everybody's where ``other`` is None.

    Returns:
        NaN without a common class.
    """
    other = within.variance if other is None else other
    common = (s.counts > 0) & (t.counts > 0)
    n_s, n_t = s.counts[common], t.counts[common]
    apart = s.sums[common] / n_s[:, None] - t.sums[common] / n_t[:, None]
    weights = n_s * n_t / (n_s + n_t)
    squares = _without_rounding(
        np.einsum("cd,cd->c", apart, apart),
        np.square(s.sums[common]).sum(axis=1) / n_s**2,
    )
    chance = weights * (own / n_s + other / n_t)
    sums = (np.array(values.sum()) for values in (weights * squares, chance, weights))
    return float(within.judged(*sums))


def conditional_pairs(counts: Int64, sums: Sequence[Float64], within: Within) -> Float64:
    """``conditional`` of every two clients, [K, K]; ``counts`` [K, C], ``sums`` K times [C, D]."""
    num, classes = counts.shape
    between, weight, chance = np.zeros((3, num, num))
    for c in range(classes):
        holders = np.flatnonzero(counts[:, c])
        n = counts[holders, c].astype(np.float64)
        if not len(holders):
            continue
        means = np.stack([sums[k][c] for k in holders.tolist()]) / n[:, None]
        size = np.square(means).sum(axis=1).max()
        means -= np.average(means, axis=0, weights=n)
        squares = _without_rounding(_squared(means @ means.T), size)
        places = np.ix_(holders, holders)
        weights = np.multiply.outer(n, n) / np.add.outer(n, n)
        noise = within.own[holders] / n
        between[places] += weights * squares
        weight[places] += weights
        chance[places] += weights * np.add.outer(noise, noise)
    found = within.judged(between, chance, weight)
    np.fill_diagonal(found, np.where(counts.sum(axis=1) > 0, 0.0, np.nan))
    return found


def _without_rounding(squares: Float64, size: Float64) -> Float64:
    """Squared distances of means, 0 where they are rounding beside the means' own squares."""
    return np.where(squares <= 1e-24 * np.asarray(size), 0.0, squares)


def _squared(products: Float64) -> Float64:
    """Squared distances [K, K] from inner products, never negative, 0 on the diagonal."""
    squares = products.diagonal()
    found = np.maximum(0, squares[:, None] + squares - 2 * products)
    np.fill_diagonal(found, 0)
    return found
