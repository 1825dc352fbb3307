"""Who was in the training, judged by the trained head alone.

``loss``: a row with a small loss is taken for a member (Yeom et al. 2018, arXiv 1709.01604).
``lira``: likelihood ratio of the row's logit-scaled confidence, log p_y / (1 - p_y), under normal
distributions fitted to heads that were and were not trained on it (Carlini et al. 2022, 2112.03570,
the online attack). Deviation, hence "lite": shadow heads are few and features come from the one
frozen backbone, so each row has means of its own and one variance inside and one outside is shared
by all rows (the paper's advice for few shadows).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.special import logsumexp

from fedtl.types import Float64, Int32

Mask = npt.NDArray[np.bool_]

RATES = {"tpr_at_0.1%": 0.001, "tpr_at_1%": 0.01}
"""False positive rates at which the true positive rate is told."""

FLOOR = 1e-6
"""Smallest standard deviation of a confidence: heads without any randomness have none."""


def confidences(scores: npt.NDArray[np.floating[Any]], labels: Int32) -> Float64:
    """log p_y / (1 - p_y) of each row, float64 [n], from scores [n, C], without cancellation."""
    scores = np.asarray(scores, np.float64)
    rows = np.arange(len(labels))
    others = scores.copy()
    others[rows, labels] = -np.inf
    return np.asarray(scores[rows, labels] - logsumexp(others, axis=1))


def losses(confidence: Float64) -> Float64:
    """Cross-entropy -log p_y in nats of logit-scaled confidences."""
    return np.asarray(np.logaddexp(0.0, -confidence))


def lira(target: Float64, shadows: Float64, trained: Mask) -> Float64:
    """Log likelihood ratio of each row, inside over outside, float64 [n].

    Args:
        target: the attacked head's confidence in each row, [n].
        shadows: the shadow heads', [s, n].
        trained: which shadow head was trained on which row, bool [s, n]; each row should be inside
            and outside at least once; of one that is not, nothing is said (0).
    """
    count = trained.sum(axis=0), (~trained).sum(axis=0)
    known = (count[0] > 0) & (count[1] > 0)
    ratio = np.zeros(len(target))
    for sign, mask, times in ((1, trained, count[0]), (-1, ~trained, count[1])):
        mean = np.where(mask, shadows, 0).sum(axis=0) / np.maximum(times, 1)
        freedom = np.maximum(times - 1, 0)[known].sum()
        squares = np.where(mask, (shadows - mean) ** 2, 0).sum(axis=0)[known].sum()
        spread = max(FLOOR, float(np.sqrt(squares / max(1, int(freedom)))))
        ratio += sign * (-0.5 * ((target - mean) / spread) ** 2 - np.log(spread))
    return np.where(known, ratio, 0.0)


def attack_facts(attack: str, members: Float64, others: Float64) -> dict[str, Any]:
    """How well scores tell members (larger) from others: AUC and true positive rates.

    Args:
        attack: its name.
        members, others: scores, float64 [n] each.

    Returns:
        ``attack``, ``auc``, those of ``RATES`` (None where there are too few others for the rate),
        ``members``, ``nonmembers`` and ``chance``, how far from 0.5 an AUC is within 95 of 100
        times where nothing is leaked (Mann-Whitney's variance); all None without both kinds.
    """
    facts: dict[str, Any] = {"attack": attack, "auc": None, **dict.fromkeys(RATES)}
    facts |= {"members": len(members), "nonmembers": len(others), "chance": None}
    if not len(members) or not len(others):
        return facts
    from sklearn.metrics import roc_auc_score, roc_curve

    truth = np.repeat([1, 0], [len(members), len(others)])
    scores = np.concatenate([members, others])
    facts["auc"] = float(roc_auc_score(truth, scores))
    false, true, _ = roc_curve(truth, scores)
    for name, rate in RATES.items():
        if len(others) * rate >= 1:
            facts[name] = float(true[false <= rate].max())
    variance = (len(truth) + 1) / (12 * len(members) * len(others))
    facts["chance"] = float(1.96 * np.sqrt(variance))
    return facts


def found_something(facts: Mapping[str, Any]) -> bool:
    """Whether an attack tells members from others better than chance."""
    return facts["auc"] is not None and facts["auc"] - 0.5 > facts["chance"]
