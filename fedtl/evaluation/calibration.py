"""Does a head know when it is right? Expected calibration error and AUROC, through torchmetrics.

Calibration error: mean over 15 equal bins of confidence of |accuracy - confidence|, weighted by
examples (Guo et al. 2017). AUROC: one class against the rest, the mean over the classes that occur;
undefined (NaN) where fewer than two do.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from fedtl import seeding
from fedtl.evaluation.metrics import defined
from fedtl.types import Float64, Head, Int64, Population

if TYPE_CHECKING:
    import torch

BINS = 15

LARGEST = 2**22
"""Scores (examples x classes) that are looked at together; of more examples a seeded sample is
taken: of 10 classes over 400,000 examples, of 1,000 classes 4,194, in 32 MiB."""

CHUNK, CHUNK_THROUGH = 4096, 64
"""Examples whose scores are computed at once, without and with a network before the head."""


@dataclass(frozen=True)
class Calibration:
    """Of one shared head.

    Attributes:
        clients: int64 [k].
        calibration_error, auroc: on each client's own tests, float64 [k]; NaN where undefined.
        facts: for ``summary.json``: the same on everybody's tests, and on how many of them.
    """

    clients: Int64
    calibration_error: Float64
    auroc: Float64
    facts: dict[str, Any]


def calibrate(
    population: Population,
    head: Head,
    clients: Int64,
    everyone: Int64,
    seed: int,
    check: Callable[[], None] = lambda: None,
) -> Calibration:
    """Calibration of a shared head at home and on everybody's tests.

    Args:
        clients: int64 [k].
        everyone: int64 [m], the rows that stand for everybody's.
        seed: of the samples, where there are more examples than LARGEST allows.
        check: called before each client; may raise to stop.
    """
    errors, areas = np.full(len(clients), np.nan), np.full(len(clients), np.nan)
    most = max(1, LARGEST // len(population.classes))
    for i, client in enumerate(clients.tolist()):
        check()
        rows = _some(population.test.of(client), most, seed, client)
        errors[i], areas[i] = judge(population, head, rows)
    rows = _some(everyone, most, seed, -1)
    error, area = judge(population, head, rows)
    facts = {
        "calibration_error": defined(error),
        "auroc": defined(area),
        "bins": BINS,
        "examples": len(rows),
    }
    return Calibration(clients, errors, areas, facts)


def judge(population: Population, head: Head, rows: Int64) -> tuple[float, float]:
    """Calibration error and macro AUROC of a head on some rows; NaN where undefined."""
    if not len(rows):
        return float("nan"), float("nan")
    import torch
    from torchmetrics.functional.classification import (
        multiclass_calibration_error,
        multilabel_auroc,
    )

    from fedtl.clients.batched import one_torch_thread

    num_classes = len(population.classes)
    labels = torch.from_numpy(population.labels[rows].astype(np.int64))
    with one_torch_thread():
        shares = _probabilities(population, head, rows)
        error = multiclass_calibration_error(
            shares, labels, num_classes, n_bins=BINS, norm="l1", validate_args=False
        )
        there = torch.unique(labels)
        if len(there) < 2:  # torchmetrics would call that 0
            return float(error), float("nan")
        # classes that nobody has would count as 0 in a multiclass mean: leave them out
        truth = (labels[:, None] == there).long()
        area = multilabel_auroc(
            shares[:, there], truth, len(there), average="macro", validate_args=False
        )
    return float(error), float(area)


def _probabilities(population: Population, head: Head, rows: Int64) -> torch.Tensor:
    """Softmax of the head's scores, float64 [n, C]: in float32 sure answers would be ties."""
    import torch

    from fedtl.clients.batched import forward
    from fedtl.clients.networks import head_of, network

    tensors = {name: torch.tensor(tensor) for name, tensor in head.items()}
    exact = {name: tensor.double() for name, tensor in head_of(tensors).items()}
    parts = []
    size = CHUNK if population.tail is None else CHUNK_THROUGH
    with network(population.tail) as through, torch.no_grad():
        for low in range(0, len(rows), size):
            x = torch.from_numpy(population.features[rows[low : low + size]].astype(np.float32))
            parts.append(torch.softmax(forward(exact, through(tensors, x).double()), dim=1))
    return torch.cat(parts)


def _some(rows: Int64, most: int, seed: int, client: int) -> Int64:
    if len(rows) <= most:
        return rows
    picked = seeding.generator(seed, "calibration", client).choice(len(rows), most, replace=False)
    return rows[np.sort(picked)]
