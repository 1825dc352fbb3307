"""What the gaps let one expect of training, before any."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from fedtl.evaluation.domain_tests import LEAST_ROWS
from fedtl.types import Float64

MARKED = {"conditional": 0.2, "js": 0.1}
"""From here on a gap to the rest is called marked. Clients of one domain lie up to 0.16 from each
other within classes (quickstart), the four picture domains of PACS 0.35 and more from the rest."""


def expectation(facts: Mapping[str, Any]) -> str:
    """What the gaps let one expect of training, in one careful sentence."""
    features, mix = (_array(facts["rest"][name]) for name in ("conditional", "js"))
    num = len(features)
    if num < 2:
        return "With one client there is nothing to share; nothing can be said."
    enough = np.array(facts["examples"]) >= LEAST_ROWS  # a handful may lie anywhere
    far = np.flatnonzero(enough & (np.nan_to_num(features) >= MARKED["conditional"]))
    skewed = np.flatnonzero(enough & (np.nan_to_num(mix) >= MARKED["js"]))
    at_home = "a shared head may do worse at home than {}, though better on others' examples"
    inside, between = _feature_gap(facts)
    if len(far) and inside < MARKED["conditional"] <= between:
        what = (
            f"the same classes look different from domain to domain ({between:.2f}) and much alike "
            f"within one ({inside:.2f}): " + at_home.format("one for each domain")
        )
    elif len(far):
        worst = facts["clients"][int(far[np.argmax(features[far])])]
        what = (
            f"the same classes look different at {len(far)} of {num} clients, most at {worst}: "
            "there " + at_home.format("the client's own")
        )
    elif len(skewed):
        what = "the same classes look much alike everywhere: one shared head can serve all clients"
    else:
        what = "clients look much alike: one shared head should do about as well as pooled data"
    if len(skewed):
        what += (
            f"; classes are mixed differently at {len(skewed)} of {num} clients, which slows "
            "averaging down and favours heads of their own at home"
        )
    return f"{what[0].upper()}{what[1:]}. Distances hint at this; only a run shows it."


def _feature_gap(facts: Mapping[str, Any]) -> tuple[float, float]:
    """Mean feature gap within and between domains; NaN without domains of several clients."""
    if facts["pairs"] is None:
        return np.nan, np.nan
    return domain_means(facts["domains"], _array(facts["pairs"]["conditional"]))


def domain_means(names: Sequence[str], matrix: Float64) -> tuple[float, float]:
    """Means over two clients of one domain, and of two; NaN without domains of several clients.

    Args:
        names: the K clients' domains.
        matrix: a distance, [K, K], NaN where undefined.
    """
    domains = np.array(names)
    rows, columns = np.triu_indices(len(matrix), 1)
    same, values = domains[rows] == domains[columns], matrix[rows, columns]
    if same.all() or not same.any():
        return np.nan, np.nan
    return _mean(values[same]), _mean(values[~same])


def _array(values: Sequence[Any]) -> Float64:
    return np.array(values, dtype=np.float64)  # None becomes NaN


def _mean(values: Float64) -> float:
    known = values[np.isfinite(values)]
    return float(known.mean()) if len(known) else np.nan
