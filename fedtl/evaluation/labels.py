"""How differently clients' labels are distributed: distances between class counts.

Every distance takes class counts or class probabilities [..., C] and broadcasts over what is in
front, as NumPy does. It is 0 on equal distributions, exactly, symmetric, and in [0, 1]; against a
client without examples it is undefined: NaN.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import numpy.typing as npt

from fedtl.types import Float64, Int64

Weights = npt.NDArray[np.integer] | npt.NDArray[np.floating]
Distance = Callable[[Weights, Weights], Float64]

BLOCK = 1 << 21
"""Numbers that are held for one block of pairs: 16 MiB each for p, q and what lies between."""


def distribution(weights: Weights) -> Float64:
    """Weights [..., C] >= 0 as shares that sum to 1; NaN where all are zero."""
    weights = np.asarray(weights, dtype=np.float64)
    total = weights.sum(axis=-1, keepdims=True)
    undefined = np.full_like(weights, np.nan)
    return np.asarray(np.divide(weights, total, out=undefined, where=total > 0))


def js(p: Weights, q: Weights) -> Float64:
    """Jensen-Shannon divergence in bits (base 2), [...]; its square root is a metric.

    H(m) - (H(p) + H(q)) / 2 with m = (p + q) / 2. Lin 1991, IEEE Trans. Inf. Theory 37(1).
    """
    p, q = distribution(p), distribution(q)
    apart = entropy((p + q) / 2) - (entropy(p) + entropy(q)) / 2
    return np.asarray(np.clip(apart, 0.0, 1.0))


def entropy(p: Float64) -> Float64:
    """Shannon entropy in bits of distributions [..., C], [...]."""
    logs = np.log2(p, out=np.zeros_like(p), where=p > 0)
    return np.asarray(-(p * logs).sum(axis=-1))


def hellinger(p: Weights, q: Weights) -> Float64:
    """Hellinger distance sqrt(1 - sum sqrt(p q)), [...].

    Computed as sqrt(sum (sqrt p - sqrt q)^2 / 2), which is the same and loses no digits near 0.
    """
    apart = np.sqrt(distribution(p)) - np.sqrt(distribution(q))
    return np.asarray(np.clip(np.sqrt(np.square(apart).sum(axis=-1) / 2), 0.0, 1.0))


def emd(p: Weights, q: Weights) -> Float64:
    """Earth mover's distance where any class is 1 from any other: half of L1, [...]."""
    apart = np.abs(distribution(p) - distribution(q))
    return np.asarray(np.clip(apart.sum(axis=-1) / 2, 0.0, 1.0))


DISTANCES: Mapping[str, Distance] = {"js": js, "hellinger": hellinger, "emd": emd}


def pairs(distance: Distance, weights: Weights) -> Float64:
    """The distance between every two clients, [K, K], a block of rows at a time.

    Args:
        distance: ``js``, ``hellinger`` or ``emd``.
        weights: class counts or shares of K clients, [K, C].
    """
    shares = distribution(weights)
    num = len(shares)
    rows = max(1, BLOCK // max(1, shares.size))
    blocks = [distance(shares[start : start + rows, None], shares) for start in range(0, num, rows)]
    return np.concatenate(blocks) if blocks else np.empty((0, 0))


def to_all(distance: Distance, counts: Int64) -> Float64:
    """From each client to everybody together, itself included, [K]; ``counts`` is [K, C]."""
    return distance(counts, counts.sum(axis=0))
