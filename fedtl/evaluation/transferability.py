"""How well frozen features suit a task, without training: H-score, LogME, NCE, LEEP.

H-score and LogME follow from counts, class sums and the Gram matrix alone, so they can be had of
real clients without a row leaving them. NCE and LEEP need what the backbone's own classifier says
about every row.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from fedtl.evaluation.distances import Moments, shrinkage
from fedtl.types import Float32, Float64, Int32

ITERATIONS = 100
CLOSE = 1e-8
"""LogME's fixed point: at most so many steps, and when it stands still."""


def defined(moments: Moments) -> bool:
    """Whether there is anything to score: two classes, and more examples than classes."""
    held = int((moments.counts > 0).sum())
    return held >= 2 and moments.examples > held


def h_score(moments: Moments) -> float:
    """tr(S_rho^-1 (1 - rho) S_between), in [0, C - 1]; NaN where undefined.

    Bao et al. 2019 (arXiv 2212.10082), shrunk as in Ibrahim et al. 2021 (arXiv 2110.06893). S is
    the covariance, S_between that of the class means. Deviation: rho is OAS, which the covariance
    gives, not Ledoit and Wolf's, which needs fourth moments.
    """
    if not defined(moments):
        return np.nan
    covariance = moments.covariance()
    if not np.trace(covariance) > 0:
        return np.nan
    values, vectors = np.linalg.eigh(covariance)
    rho = shrinkage(values, moments.examples)
    if rho == 1:  # too few examples to tell any direction from another
        return np.nan
    values = (1 - rho) * np.maximum(values, 0) + rho * values.mean()
    held = moments.counts > 0
    counts = moments.counts[held].astype(np.float64)
    apart = moments.sums[held] / counts[:, None] - moments.mean
    roots = (apart * np.sqrt(counts / moments.examples)[:, None]) @ vectors
    return float((1 - rho) * (roots**2 / values).sum())


def logme(moments: Moments) -> float:
    """Log evidence of a linear model with the best priors, per example, mean over classes held.

    You et al. 2021 (arXiv 2102.11005), algorithm 1: for each one-hot column y the evidence of
    y ~ N(F w, 1 / beta), w ~ N(0, 1 / alpha). With F^T F = V diag(s) V^T and z = V^T F^T y (F^T y
    is the class sum, y^T y the class count) nothing else of F is needed. Deviation: the fixed
    point is run until it stands still to 1e-8, not 1e-3.

    Returns:
        NaN where undefined.
    """
    if not defined(moments):
        return np.nan
    values, vectors = np.linalg.eigh(moments.second)
    if not values[-1] > 0:
        return np.nan
    used = values > len(values) * np.finfo(np.float64).eps * values[-1]
    values, held = values[used], moments.counts > 0
    z = moments.sums[held] @ vectors[:, used]
    return float(_evidence(values, z, moments.counts[held], moments.examples, used.size).mean())


def _evidence(values: Float64, z: Float64, ones: npt.ArrayLike, n: int, width: int) -> Float64:
    """Per class and example; ``values`` [R] > 0, ``z`` [C, R], ``ones`` [C] = y^T y."""
    tiny = np.finfo(np.float64).tiny
    squares = z**2 / values
    outside = np.maximum(np.asarray(ones) - squares.sum(axis=1), 1e-12 * n)  # no R explains it
    alpha, beta = np.ones((2, len(z)))

    def fitted() -> tuple[Float64, Float64, Float64]:
        """gamma, |m|^2 and |F m - y|^2 at these priors."""
        share = 1 / (1 + (alpha / beta)[:, None] / values)  # beta s / (alpha + beta s)
        length = (share**2 * squares / values).sum(axis=1)
        residual = outside + ((1 - share) ** 2 * squares).sum(axis=1)
        return share.sum(axis=1), np.maximum(length, tiny), residual

    for _ in range(ITERATIONS):
        before = alpha / beta
        gamma, length, residual = fitted()
        alpha = np.clip(gamma / length, 1e-12, 1e12)
        beta = np.clip((n - gamma) / residual, 1e-12, 1e12)
        if (np.abs(alpha / beta - before) <= CLOSE * before).all():
            break
    _, length, residual = fitted()
    spread = np.log(alpha[:, None] + beta[:, None] * values).sum(axis=1)
    spread += (width - len(values)) * np.log(alpha)
    evidence = width * np.log(alpha) + n * np.log(beta) - spread
    evidence += -beta * residual - alpha * length - n * np.log(2 * np.pi)
    return np.asarray(evidence / (2 * n))


def nce_leep(labels: Int32, probabilities: Float32, num_classes: int) -> tuple[float, float]:
    """NCE and LEEP, both at most 0, higher is better; NaN with fewer than two classes.

    NCE, Tran et al. 2019 (arXiv 1908.08142): -H(Y | Z), Z the likeliest source class of a row.
    LEEP, Nguyen et al. 2020 (arXiv 2002.12462), eq. 2: the mean log of sum_z P(y | z) theta(x)_z,
    with P(y, z) the mean of theta(x)_z over rows of class y.

    Args:
        labels: int32 [n].
        probabilities: theta(x), of the source classes, [n, Z].
        num_classes: C.
    """
    if len(np.unique(labels)) < 2:
        return np.nan, np.nan
    n, sources = probabilities.shape
    table = np.zeros((num_classes, sources))
    np.add.at(table, (labels, probabilities.argmax(axis=1)), 1.0)
    seen = table > 0
    given = table / np.maximum(table.sum(axis=0), 1)
    nce = float((table[seen] * np.log(given[seen])).sum() / n)
    joint = np.stack(
        [probabilities[labels == c].sum(axis=0, dtype=np.float64) for c in range(num_classes)]
    )
    total = joint.sum(axis=0)
    conditional = np.divide(joint, total, out=np.zeros_like(joint), where=total > 0)
    likelihood = np.empty(n)
    for c in range(num_classes):
        likelihood[labels == c] = probabilities[labels == c] @ conditional[c]
    return nce, float(np.log(likelihood).mean())
