"""How evenly a head serves its clients."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from fedtl.results.tables import number

WORST_FRACTION = 0.1
"""The "worst decile" is the mean over the worst tenth of clients, at least one."""


def evenness(
    accuracy: npt.NDArray[np.float64], weights: npt.NDArray[np.int64]
) -> dict[str, float | None]:
    """How evenly accuracies are spread over clients that count with whole weights.

    Args:
        accuracy: in [0, 1], float64 [k].
        weights: at least 1, int64 [k]; a client counts as so many equal ones, N in all.

    Returns:
        ``mean``; ``worst_decile``, the mean over the worst tenth (at least one client, of which a
        part may count); ``spread``, the standard deviation; ``jain`` (Jain, Chiu and Hawe 1984),
        (sum a)^2 / (N sum a^2), from 1 / N to 1; ``entropy`` of the shares a / sum a, divided by
        log N: 1 where all accuracies are equal, undefined for N = 1. Undefined is None.
    """
    total = int(weights.sum())
    if not total:
        return dict.fromkeys(("mean", "worst_decile", "spread", "jain", "entropy"))
    mean = float(accuracy @ weights / total)
    order = np.argsort(accuracy, kind="stable")
    tail = max(1, math.ceil(WORST_FRACTION * total))
    before = np.concatenate([[0], np.cumsum(weights[order])[:-1]])
    counted = np.clip(tail - before, 0, weights[order])
    squares = float(np.square(accuracy) @ weights)
    shares: Any = accuracy[accuracy > 0] / (mean * total) if mean > 0 else np.empty(0)
    surprise = -float(weights[accuracy > 0] @ (shares * np.log(shares))) if mean > 0 else math.nan
    return {
        "mean": mean,
        "worst_decile": float(accuracy[order] @ counted / tail),
        "spread": math.sqrt(max(0.0, float(np.square(accuracy - mean) @ weights) / total)),
        "jain": number((mean * total) ** 2 / (total * squares) if squares else math.nan),
        "entropy": number(surprise / math.log(total) if total > 1 else math.nan),
    }
