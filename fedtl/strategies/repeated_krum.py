"""Bulyan's first stage: Krum's choice, removed, and again; El Mhamdi et al. 2018, section 4.

Compiled, as it looks at all pairs of updates for each of n - 2f choices.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from fedtl.types import Float64, Int64


@njit(cache=True)
def choose(distances: Float64, nearest: Int64, malicious: int, chosen: Int64) -> None:
    """Fill ``chosen`` with places, each with the lowest Krum score among the updates left by then.

    Args:
        distances: float64 [n, n], squared.
        nearest: int64 [n, n - 1], each update's others, the nearest first.
        malicious: f; a score sums the n' - f - 2 nearest of n' that are left, at least one.
        chosen: int64, result; at most n places.
    """
    count = len(distances)
    left = np.ones(count, np.bool_)
    for choice in range(len(chosen)):
        neighbours = max(1, count - choice - malicious - 2)
        lowest = np.inf
        for own in range(count):
            if not left[own]:
                continue
            score, taken = 0.0, 0
            for other in nearest[own]:
                if left[other]:
                    score += distances[own, other]
                    taken += 1
                    if taken == neighbours or score >= lowest:
                        break
            if score < lowest:
                lowest = score
                chosen[choice] = own
        left[chosen[choice]] = False
