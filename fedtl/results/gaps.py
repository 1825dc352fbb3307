"""Does the gap between clients' data predict what federating gains them?"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from scipy.stats import norm, permutation_test, rankdata

from fedtl import seeding
from fedtl.results.report import client_frame, level_of
from fedtl.results.tables import RunTables

FEWEST = 5
"""Clients without which a rank correlation is not told: four have 24 orders, one in 24 is 4 %."""

DRAWS = 9999
"""Permutations of the test; where there are fewer, all of them are gone through."""


def rank_correlation(
    x: np.ndarray[Any, Any], y: np.ndarray[Any, Any], seed: int, level: float = 0.05
) -> dict[str, Any]:
    """Spearman's rank correlation of two columns.

    Args:
        x, y: float [n]; pairs with NaN are left out.
        seed: of the permutations; all are gone through where there are fewer than ``DRAWS``.
        level: of the interval.

    Returns:
        n, r, low, high (Bonett and Wright 2000, Psychometrika 65, eq. 7) and p, two-sided, by
        permutation; NaN where undefined: fewer than ``FEWEST`` pairs, or a constant column.
    """
    there = np.isfinite(x) & np.isfinite(y)
    n = int(there.sum())
    a, b = rankdata(x[there]), rankdata(y[there])
    if n < FEWEST or np.ptp(a) == 0 or np.ptp(b) == 0:
        return {"n": n, **dict.fromkeys(("r", "low", "high", "p"), math.nan)}
    centred = (b - b.mean()) / np.linalg.norm(b - b.mean())

    def correlation(one: np.ndarray[Any, Any], axis: int = -1) -> Any:
        left = one - one.mean(axis=axis, keepdims=True)
        return (left * centred).sum(axis=axis) / np.linalg.norm(left, axis=axis)

    r = float(np.clip(correlation(a), -1, 1))
    found = permutation_test(
        (a,),
        correlation,
        permutation_type="pairings",
        n_resamples=DRAWS,
        vectorized=True,
        rng=seeding.generator(seed, "rank_correlation"),
    )
    low = high = math.nan
    if abs(r) < 1:
        half = norm.isf(level / 2) * math.sqrt((1 + r**2 / 2) / (n - 3))
        low, high = (math.tanh(math.atanh(r) + side * half) for side in (-1, 1))
    return {"n": n, "r": r, "low": low, "high": high, "p": float(found.pvalue)}


def to_the_rest(gap: Mapping[str, Any], kind: str) -> np.ndarray[Any, Any]:
    """Each client's distance to the others together, float [K]; NaN where undefined.

    Where that was not measured, the mean of its distances to each of the others.
    """
    count = len(gap["clients"])
    rest = (gap.get("rest") or {}).get(kind)
    if rest is not None:
        return np.array([math.nan if v is None else v for v in rest], float)
    pairs = (gap.get("pairs") or {}).get(kind)
    if pairs is None:
        return np.full(count, math.nan)
    matrix = np.array([[math.nan if v is None else v for v in row] for row in pairs], float)
    np.fill_diagonal(matrix, math.nan)
    known = np.isfinite(matrix).sum(axis=1)
    return np.where(known > 0, np.nansum(matrix, axis=1) / np.maximum(known, 1), math.nan)


def gap_and_gain(run: RunTables) -> dict[str, Any] | None:
    """Each measure of the gap beside the accuracy that federating gains at home.

    Returns:
        None where no gap was measured. ``clients``: name, gain and a distance per kind; ``kinds``:
        name, title and the rank correlation with p corrected by Holm; ``sentence``: what that says.
    """
    if run.gap is None:
        return None
    gap, frame = run.gap, client_frame(run)
    gains = dict(zip(frame["name"], frame["difference"], strict=True))
    gain = np.array([gains.get(name, math.nan) for name in gap["clients"]], float)
    titles = gap.get("kinds") or {}
    kinds = []
    distances = {}
    for kind in [
        k for k in titles if k in (gap.get("rest") or {}) or k in (gap.get("pairs") or {})
    ]:
        if kind == "mmd_p":  # a p-value is no distance
            continue
        distances[kind] = to_the_rest(gap, kind)
        found = rank_correlation(
            distances[kind], gain, int(run.scenario.get("seed", 0)), level_of(run)
        )
        kinds.append({"kind": kind, **titles[kind], **found, "p_holm": math.nan})
    tested = [one for one in kinds if not math.isnan(one["p"])]
    if tested:
        from statsmodels.stats.multitest import multipletests  # type: ignore[import-untyped]

        corrected = multipletests([one["p"] for one in tested], method="holm")[1]
        for one, p in zip(tested, corrected, strict=True):
            one["p_holm"] = float(p)
    return {
        "clients": [
            {"name": name, "gain": gain[i], **{kind: v[i] for kind, v in distances.items()}}
            for i, name in enumerate(gap["clients"])
        ],
        "kinds": kinds,
        "sentence": _sentence(kinds, int(np.isfinite(gain).sum()), level_of(run)),
    }


def _sentence(kinds: list[dict[str, Any]], judged: int, level: float) -> str:
    found = [one for one in kinds if one["p_holm"] <= level]
    if not judged:
        return (
            "What federating gains each client was not measured, so the gap has nothing to predict."
        )
    if judged < FEWEST:
        return (
            f"Not enough evidence: {judged} clients are too few to tell whether the gap predicts "
            "what federating gains."
        )
    if not found:
        return (
            f"Not enough evidence that the gap predicts what federating gains ({judged} clients)."
        )
    parts = [
        f"{one['title']}: clients further from the others gain {'more' if one['r'] > 0 else 'less'}"
        f" (rank correlation {one['r']:+.2f})".replace("-0.", "−0.")
        for one in found
    ]
    return "The gap goes together with what federating gains. " + "; ".join(parts) + "."
