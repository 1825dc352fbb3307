"""Tests of a mean difference: over clients, over seeds, and of runs that cannot be paired.

Signs of the clients' differences are exchanged at random (permutation test, exact where there are
few); seeds, of which there are never many, are given to the paired t-test.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import stats

from fedtl import seeding

Float64 = npt.NDArray[np.float64]

DRAWS = 9999
"""Random exchanges, and resamples of an interval."""


def clients_test(differences: Float64, seed: int, level: float = 0.05) -> dict[str, Any]:
    """Mean of paired differences, with the clients as evidence.

    Args:
        differences: float [K], one per client.
        seed: of the exchanges of signs and of the bootstrap over clients.

    Returns:
        difference, interval (expanded percentiles of the bootstrap), p (two-sided, mean as the
        statistic); None where undefined: interval and p of fewer than two clients.
    """
    if len(differences) < 2:
        mean = float(differences[0]) if len(differences) else None
        return {"difference": mean, "interval": None, "p": None}
    stream = seeding.generator(seed, "compare")
    found = stats.permutation_test(
        (differences,),
        np.mean,
        permutation_type="samples",
        n_resamples=DRAWS,
        vectorized=True,
        rng=stream,
    )
    return {
        "difference": float(differences.mean()),
        "interval": _interval([differences], stream, level),
        "p": float(found.pvalue),
    }


def seeds_test(differences: Float64, level: float = 0.05) -> dict[str, Any]:
    """Mean of the seeds' differences, by the paired t-test; undefined where they do not vary."""
    mean = float(differences.mean())
    error = float(stats.sem(differences)) if len(differences) > 1 else 0.0
    if error == 0.0:
        return {"difference": mean, "interval": None, "p": 1.0 if mean == 0 else None}
    df = len(differences) - 1
    half = float(stats.t.isf(level / 2, df)) * error
    return {
        "difference": mean,
        "interval": [mean - half, mean + half],
        "p": float(2 * stats.t.sf(abs(mean) / error, df)),
    }


def unpaired_test(a: Float64, b: Float64, seed: int, level: float = 0.05) -> dict[str, Any]:
    """Difference of means of other clients or tests: clients are exchanged between the runs."""
    if min(len(a), len(b)) < 2:
        return {"difference": None, "interval": None, "p": None}
    stream = seeding.generator(seed, "compare_unpaired")

    def statistic(x: Any, y: Any, axis: int = -1) -> Any:
        return np.mean(x, axis=axis) - np.mean(y, axis=axis)

    found = stats.permutation_test(
        (b, a), statistic, n_resamples=DRAWS, vectorized=True, rng=stream
    )
    return {
        "difference": float(b.mean() - a.mean()),
        "interval": _interval([b, a], stream, level),
        "p": float(found.pvalue),
    }


def _interval(samples: Sequence[Float64], stream: Any, level: float) -> list[float]:
    """Percentiles of the mean of the first, minus that of the second if there is one.

    Expanded as few clients need it (Hesterberg 2015, Am. Stat. 69, section 4.1): the plain
    percentiles of five cover the mean 83 times in 100, not 95.
    """
    means = [one[stream.integers(0, len(one), (DRAWS, len(one)))].mean(axis=1) for one in samples]
    drawn = means[0] - means[1] if len(means) > 1 else means[0]
    n = min(map(len, samples))
    tail = stats.norm.sf(math.sqrt(n / (n - 1)) * stats.t.isf(level / 2, n - 1))
    return [float(value) for value in np.quantile(drawn, [tail, 1 - tail])]
