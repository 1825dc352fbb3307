"""A head's scores and logit-scaled confidences on rows, whatever its form."""

from __future__ import annotations

import numpy as np

from fedtl.privacy.membership import confidences
from fedtl.types import Float32, Float64, Head, Int64, Population

ROWS = 4096
"""Rows scored at a time: 20 MB of 1,280 features."""


def scores(head: Head, features: Float32) -> Float64:
    """Scores [n, C] of a linear head, an MLP, or one on random features, for float32 [n, D]."""
    if set(head) == {"weight", "bias"}:
        return (features @ head["weight"].T + head["bias"]).astype(np.float64)
    import torch

    from fedtl.clients.batched import forward

    tensors = {name: torch.from_numpy(np.ascontiguousarray(t)) for name, t in head.items()}
    return forward(tensors, torch.from_numpy(features)).numpy().astype(np.float64)


def confidences_of(head: Head, population: Population, rows: Int64) -> Float64:
    """log p_y / (1 - p_y) under the head, float64 [n], of rows of the feature matrix."""
    found = np.empty(len(rows))
    for low in range(0, len(rows), ROWS):
        part = rows[low : low + ROWS]
        features = np.ascontiguousarray(population.features[part], np.float32)
        found[low : low + ROWS] = confidences(scores(head, features), population.labels[part])
    return found
