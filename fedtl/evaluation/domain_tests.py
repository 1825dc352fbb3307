"""Can rows of two clients be told apart? Proxy A-distance and MMD, on sampled rows.

Both look at single rows side by side, so they exist in simulation only. Sources: proxy A-distance,
Ben-David et al. 2007; MMD, Gretton et al. 2012 (JMLR 13), eq. 3, with its permutation test.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from fedtl import seeding
from fedtl.types import Float64

LEAST_ROWS = 10
"""Below this many rows on a side nothing is said."""

PERMUTATIONS = 199

RIDGE = 1.0
"""Of the domain classifier, in units of the mean eigenvalue of its Gram matrix: of 0.001 to 100 it
told clients of the quickstart and of PACS apart best."""


def compare(products: Float64, seed: int) -> tuple[float, float, float]:
    """A-distance, MMD^2 and its p-value of two samples of m rows each.

    Args:
        products: inner products of the 2 m rows, float64 [2 m, 2 m]: first one sample, then the
            other, each in random order.
        seed: of the permutations.

    Returns:
        NaN three times below ``LEAST_ROWS``.
    """
    if len(products) < 2 * LEAST_ROWS:
        return np.nan, np.nan, np.nan
    return a_distance(products), *mmd(products, seed)


def a_distance(products: Float64) -> float:
    """2 (1 - 2 err) in [0, 2], err that of a linear classifier on rows it was not trained on.

    Ridge regression onto -1 and +1 with a bias, trained on every other row of each sample and
    judged on those between, then the other way round. Worse than chance is clipped to 0. A score of
    exactly 0 is half an error.
    """
    num = len(products) // 2
    target = np.repeat([-1.0, 1.0], num)
    even = np.tile(np.arange(num) % 2 == 0, 2)
    wrong = 0.0
    for train in (even, ~even):
        inner, outer = products[np.ix_(train, train)], products[np.ix_(~train, train)]
        mean = inner.mean(axis=0)
        inner = inner - mean - mean[:, None] + mean.mean()
        outer = outer - mean - (outer.mean(axis=1) - mean.mean())[:, None]
        middle, level = target[train].mean(), RIDGE * np.trace(inner) / len(inner)
        inner.flat[:: len(inner) + 1] += level if level > 0 else 1.0  # rows all alike
        scores = outer @ np.linalg.solve(inner, target[train] - middle) + middle
        wrong += float((0.5 - 0.5 * np.sign(scores) * target[~train]).sum())
    return max(0.0, 2 * (1 - 2 * wrong / len(products)))


def mmd(products: Float64, seed: int) -> tuple[float, float]:
    """Unbiased MMD^2 under an RBF kernel, and P(as much or more by chance).

    The kernel is exp(-d^2 / (2 h^2)), h the median distance of all different rows; p is
    (1 + #{permuted >= observed}) / (1 + 199), over permutations of the rows among the samples.
    MMD^2 may be negative: its mean is 0 for equal distributions.
    """
    num = len(products) // 2
    squares = products.diagonal()
    distances = squares[:, None] + squares - 2 * products
    distances[distances <= 1e-12 * squares.max(initial=0)] = 0
    apart = distances[distances > 0]  # every two rows twice, which does not move the median
    width = float(np.median(apart)) if len(apart) else 1.0
    kernel = np.exp(distances / (-2 * width))
    np.fill_diagonal(kernel, 0)
    signs = _signs(seed, num)
    # For signs z of the two samples z^T K z is what lies within less what lies between.
    differences = np.einsum("ib,ib->b", signs, kernel @ signs)
    total = float(kernel.sum())
    within, between = (total + differences) / 2, (total - differences) / 4
    found = within / (num * (num - 1)) - 2 * between / num**2
    reached = int((found[1:] >= found[0] - 1e-12).sum())  # equal but for rounding is reached
    return float(found[0]), (1 + reached) / (1 + PERMUTATIONS)


@lru_cache(maxsize=4)
def _signs(seed: int, num: int) -> Float64:
    """Signs of the two samples as they are, then permuted, [2 num, 1 + PERMUTATIONS]."""
    own = np.repeat([1.0, -1.0], num)
    permuted = np.tile(own[:, None], (1, PERMUTATIONS))
    seeding.generator(seed, "gap permutations", num).permuted(permuted, axis=0, out=permuted)
    signs = np.concatenate([own[:, None], permuted], axis=1)
    signs.flags.writeable = False
    return signs
