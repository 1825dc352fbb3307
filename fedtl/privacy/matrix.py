"""Noise that is correlated over rounds, so that part of it cancels in the sum of all rounds.

A client takes part in every b-th round at most. The server adds C^-1 N to the rounds' sums, N fresh
and independent; that tells as much as C times the sums with the noise N alone, one Gaussian whose
sensitivity is C's. C is the square root of the matrix of prefix sums, cut off after some bands:
Kalinin and Lampert, NeurIPS 2024 (arXiv 2405.13763), which for b = 1 band is DP-FedAvg without
sampling, and in between DP-FTRL with a banded matrix (Choquette-Choo et al. 2023).
"""

from __future__ import annotations

import math

import numpy as np

from fedtl.types import Float64


def coefficients(bands: int) -> Float64:
    """First column of C from the diagonal down, float64 [bands]: those of (1 - x)^(-1/2).

    Source: Fichtenberger et al. 2023; c_0 = 1, c_i = c_(i-1) (2 i - 1) / (2 i).
    """
    index = np.arange(1, bands)
    return np.cumprod(np.concatenate([[1.0], (2 * index - 1) / (2 * index)]))


def sensitivity(coefficients: Float64, rounds: int, separation: int) -> float:
    """How far C's image moves at most where one client's updates, each of length 1, come or go.

    The worst client takes part in the first round and as often as it may: the norm of the sum of
    columns 0, b, 2 b, ... Kalinin and Lampert, theorem 2; it needs coefficients that are not
    negative and do not grow, as these are.

    Args:
        coefficients: of the first column, float64 [bands].
        rounds: T, at least 1.
        separation: b; a client that takes part in round t does not again before t + b.
    """
    column = np.zeros(rounds)
    kept = coefficients[:rounds]
    column[: len(kept)] = kept
    total = np.zeros(rounds)
    for first in range(0, rounds, separation):
        total[first:] += column[: rounds - first]
    return math.sqrt(float(total @ total))


def correlated(fresh: Float64, past: Float64, coefficients: Float64) -> Float64:
    """A round's row of C^-1 N: what is added to its sum.

    x_t = n_t - sum_i c_i x_(t-i), i from 1 to bands - 1: C x = n, solved from the top.

    Args:
        fresh: n_t, float64 [P].
        past: x_(t-1), x_(t-2), ..., float64 [m, P], newest first; those before the first round
            are left out or zero, more than bands - 1 are not looked at.
        coefficients: c_0 = 1, c_1, ..., float64 [bands].

    Returns:
        x_t, float64 [P]; it belongs in front of ``past`` in the next round.
    """
    noise = fresh.copy()
    for weight, before in zip(coefficients[1:].tolist(), past, strict=False):
        noise -= weight * before
    return noise
