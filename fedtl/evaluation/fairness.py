"""How evenly a head serves the clients, the classes and the domains.

Each figure comes twice: by clients, each counting once, and by examples, as if each test example
were a client with its own client's accuracy. Undefined is None.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from fedtl.results.evenness import evenness
from fedtl.types import ClientMetrics, Float64, Int64


def fairness(
    metrics: ClientMetrics, domains: Sequence[str], classes: Sequence[str]
) -> dict[str, Any]:
    """For ``summary.json``: one head, or each client's own, on the clients' own test examples.

    Args:
        metrics: of k clients; those without examples count nowhere.
        domains: of each of them; "" for none.
        classes: C names.

    Returns:
        ``by_clients``, ``by_examples``: see ``evenness``; ``domains`` and ``classes``: see below.
    """
    examples = metrics.count.sum(axis=1)
    judged = examples > 0
    accuracy = metrics.correct.sum(axis=1)[judged] / examples[judged]
    weights = examples[judged]
    own = np.array(domains, dtype=object)[judged]
    return {
        "by_clients": evenness(accuracy, np.ones_like(weights)),
        "by_examples": evenness(accuracy, weights),
        "domains": {
            name: _domain(accuracy[own == name], weights[own == name])
            for name in dict.fromkeys(own.tolist())
        },
        "classes": {
            name: _class(metrics.correct[:, c], metrics.count[:, c])
            for c, name in enumerate(classes)
        },
    }


def _domain(accuracy: Float64, weights: Int64) -> dict[str, float | int]:
    return {
        "accuracy": float(accuracy @ weights / weights.sum()),
        "accuracy_client_mean": float(accuracy.mean()),
        "examples": int(weights.sum()),
        "clients": len(accuracy),
    }


def _class(correct: Int64, count: Int64) -> dict[str, float | int | None]:
    """Recall over all test examples of the class, and its mean over the clients that have some."""
    holders = count > 0
    examples = int(count.sum())
    recalls = correct[holders] / count[holders]
    return {
        "recall": float(correct.sum() / examples) if examples else None,
        "recall_client_mean": float(recalls.mean()) if examples else None,
        "examples": examples,
        "clients": int(holders.sum()),
    }
