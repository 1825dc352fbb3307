"""Metrics from per-client sums. Undefined is NaN here, null in tables and JSON, never 0."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from fedtl.results.evenness import WORST_FRACTION
from fedtl.results.records import CLIENTS
from fedtl.types import ClientMetrics, Float64, Int64


@dataclass(frozen=True)
class PerClient:
    """Each client's own metrics, float64 [k]; NaN where a client has no example."""

    examples: np.ndarray[tuple[int], np.dtype[np.int64]]
    loss: Float64
    accuracy: Float64
    balanced_accuracy: Float64


@dataclass(frozen=True)
class Overall:
    """One head over all judged clients.

    Attributes:
        accuracy, loss: over all examples (clients count by their examples).
        balanced_accuracy: mean recall over the classes that occur.
        accuracy_client_mean: mean over clients (each counts once).
        worst_decile_accuracy: mean over the worst tenth of clients.
        spread: standard deviation of accuracy over clients.
    """

    examples: int
    accuracy: float
    balanced_accuracy: float
    loss: float
    accuracy_client_mean: float
    worst_decile_accuracy: float
    spread: float

    def as_facts(self) -> dict[str, float | int | None]:
        """Plain JSON values; undefined as None."""
        return {name: defined(value) for name, value in self.__dict__.items()}


def per_client(metrics: ClientMetrics) -> PerClient:
    """Metrics of each client on its own examples."""
    examples = metrics.count.sum(axis=1)
    return PerClient(
        examples,
        _ratio(metrics.loss_sum, examples),
        _ratio(metrics.correct.sum(axis=1), examples),
        _mean_recall(metrics.correct, metrics.count),
    )


def overall(metrics: ClientMetrics) -> Overall:
    """Metrics over all clients together and how they spread."""
    each = per_client(metrics)
    total = int(each.examples.sum())
    judged = np.sort(each.accuracy[each.examples > 0])
    worst = judged[: max(1, math.ceil(WORST_FRACTION * len(judged)))]
    correct, count = metrics.correct.sum(axis=0), metrics.count.sum(axis=0)
    return Overall(
        total,
        float(_ratio(correct.sum(), np.asarray(total))),
        float(_mean_recall(correct[None], count[None])[0]),
        float(_ratio(metrics.loss_sum.sum(), np.asarray(total))),
        float(judged.mean()) if len(judged) else math.nan,
        float(worst.mean()) if len(judged) else math.nan,
        float(judged.std()) if len(judged) else math.nan,
    )


def defined(value: Any) -> Any:
    """None for a float that is NaN or infinite, the plain Python value otherwise."""
    if isinstance(value, float | np.floating):
        return float(value) if math.isfinite(value) else None
    return value.item() if isinstance(value, np.generic) else value


def nullable(values: Float64) -> list[float | None]:
    """A column for a table: NaN becomes null."""
    return [value if math.isfinite(value) else None for value in values.tolist()]


def client_rows(
    round: int, clients: Int64, each: PerClient, columns: Mapping[str, list[str]], split: str
) -> dict[str, Any]:
    """Columns of ``results.records.CLIENTS`` for the federated head on one split.

    Args:
        clients: int64 [k], whose rows these are.
        columns: their "name" and "domain".
    """
    size = len(clients)
    return {
        **dict.fromkeys(CLIENTS.names, [None] * size),
        "round": np.full(size, round, np.int32),
        "client": clients,
        **columns,
        "split": [split] * size,
        "examples": each.examples,
        "loss": nullable(each.loss),
        "accuracy": nullable(each.accuracy),
        "balanced_accuracy": nullable(each.balanced_accuracy),
        "status": ["ok"] * size,
    }


def _ratio(part: Any, whole: Any) -> Any:
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(whole > 0, np.divide(part, whole), np.nan)


def _mean_recall(correct: Any, count: Any) -> Any:
    """Mean over the classes that occur, per row; NaN where none does."""
    recall = np.where(count > 0, correct / np.maximum(count, 1), 0.0).sum(axis=1)
    return _ratio(recall, (count > 0).sum(axis=1))
