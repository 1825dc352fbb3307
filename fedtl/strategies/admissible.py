"""Statistics that no data could have given are refused (F5).

For honest sums over rows z with one-hot labels y the matrix [[A, B], [B^T, diag(n_c)]] is a Gram
matrix of (z, y), hence positive semidefinite; with a bias the last row of A is the sum of all class
sums and the bias entry of a class sum its count; sum of |z|^2 is at most n R^2. What is refused is
what breaks one of these: scaled, invented or swapped statistics. Flipped labels give admissible
statistics and pass.

Rows that were shortened (``Protection.row_clip``) have a length of at most 1 and a bias entry of at
most ``BIAS``, each its own. Classes that are kept back are missing from the counts. Of statistics
with noise, or in a ring, nothing can be said.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.linalg import blas, lapack

from fedtl.clients.blocks import one_blas_thread
from fedtl.clients.statistics import unpack_symmetric
from fedtl.plans import Protection, Statistics
from fedtl.privacy.statistics import BIAS
from fedtl.types import Float64

ROUNDING = 1e-9
"""Relative slack of every test: float64 sums over millions of rows err by 1e-12 at most."""


def inadmissible(
    sums: Mapping[str, npt.NDArray[Any]],
    asked: Statistics,
    num_examples: int,
    safe: Protection | None = None,
) -> str | None:
    """Why one client's statistics cannot be sums over its rows, or None.

    Args:
        sums: one client's finite tensors, as ``RoundPlan.reply`` names them.
        asked: what it was asked to sum.
        num_examples: rows it says it has.
        safe: what it was to do to them before; nothing to the sums themselves.
    """
    counts, by_class = sums["counts"], sums["sums"]
    safe = safe or Protection()
    shortened = safe.row_clip > 0
    if (counts < 0).any():
        return "a class count is negative"
    if ((counts > 0) & (counts < safe.least_per_class)).any():
        return f"a class has fewer than {safe.least_per_class} examples"
    gated = safe.least_per_class > 1 and int(counts.sum()) <= num_examples
    if int(counts.sum()) != num_examples and not gated:
        return f"its class counts add up to {int(counts.sum())}, not {num_examples}"
    if by_class[counts == 0].any():
        return "a class without examples has a sum"
    if asked.bias and shortened:
        most = (1 + ROUNDING) * BIAS * counts
        if (by_class[:, -1] < 0).any() or (by_class[:, -1] > most).any():
            return "the bias entries of its class sums are not of so many rows"
    elif asked.bias and not _near(by_class[:, -1], counts):
        return "the bias entries of its class sums are not the class counts"
    grams = [("its Gram matrix", sums["gram"], slice(None))] if asked.gram else []
    if asked.class_grams:
        each = sums["class_grams"]
        if asked.gram and not _near(each.sum(axis=0), sums["gram"]):
            return "its class Gram matrices do not add up to its Gram matrix"
        grams = [
            (f"the Gram matrix of class {c}", each[c], slice(c, c + 1)) for c in range(len(each))
        ]
    # A random feature is at most sqrt(2/R) in size; of a trunk's features no bound is known.
    bound = 2.0 + asked.bias if asked.random_features else np.inf
    bound = 1.0 if shortened else bound
    biased = asked.bias and not shortened
    with one_blas_thread():
        for name, packed, classes in grams:
            reason = _no_gram(packed, by_class[classes], counts[classes], biased, bound)
            if reason is not None:
                return f"{name} {reason}"
    return None


def _near(a: npt.NDArray[Any], b: npt.NDArray[Any]) -> bool:
    return bool((np.abs(a - b) <= ROUNDING * max(1.0, float(np.abs(b).max(initial=0)))).all())


def _no_gram(
    packed: Float64, sums: Float64, counts: npt.NDArray[np.int64], bias: bool, bound: float
) -> str | None:
    """Why this A cannot go with these class sums; ``bound`` is the largest |z|^2."""
    if not counts.any():
        return "is of no examples, but not zero" if packed.any() else None
    matrix = unpack_symmetric(packed)
    if bias and not _near(matrix[-1], sums.sum(axis=0)):
        return "has a bias row that is not the sum of its class sums"
    trace = float(np.trace(matrix))
    if trace > (1 + ROUNDING) * bound * int(counts.sum()):
        return f"has trace {trace:.6g}, more than {int(counts.sum())} rows can have"
    # By Schur's complement the whole matrix is positive semidefinite if this is.
    held = counts > 0
    roots = sums[held] / np.sqrt(counts[held])[:, None]
    matrix.flat[:: len(matrix) + 1] += max(ROUNDING * trace, np.finfo(np.float64).tiny)
    left = blas.dsyrk(-1.0, roots.T, beta=1.0, c=matrix.T, lower=1, overwrite_c=1)  # in place
    _, failed = lapack.dpotrf(left, lower=1, clean=0, overwrite_a=1)
    return "is impossible with its class sums (not positive semidefinite)" if failed else None
