"""What in ready features makes a linear head's life hard: nothing is known of the pictures."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from fedtl.evaluation.quick_head import sample_rows
from fedtl.input_checks.findings import Finding, Mask
from fedtl.input_checks.trials import LOOKED_AT, LOOKED_AT_EACH, Matrix, Trial
from fedtl.ready_features import ReadyFeatures
from fedtl.types import Float64

UNEVEN = 1e3
"""Deviations of features that differ by more are of different units."""

AWAY = 3.0
"""Clients whose features are this many times longer, or shorter, than the median client's."""


@dataclass(frozen=True)
class Columns:
    """What the sampled rows are like.

    Attributes:
        names: of the K clients.
        std: each feature's deviation over all rows, float64 [D].
        length: median Euclidean length of a client's rows, float64 [K]; NaN without rows.
        broken: clients with a value that is not finite, bool [K].
    """

    names: tuple[str, ...]
    std: Float64
    length: Float64
    broken: Mask


def look(features: ReadyFeatures, seed: int) -> Columns:
    """Sums up a seeded sample of training rows."""
    split = features.split
    rows = sample_rows(split.train, LOOKED_AT, seed, "look", LOOKED_AT_EACH)
    x = features.matrix[rows.index].astype(np.float64)
    own = [x[a:b] for a, b in zip(rows.offsets[:-1], rows.offsets[1:], strict=True)]
    length = [
        float(np.median(np.linalg.norm(part, axis=1))) if len(part) else np.nan for part in own
    ]
    broken = np.array([not np.isfinite(part).all() for part in own])
    with np.errstate(invalid="ignore"):
        return Columns(split.names, x.std(axis=0), np.array(length), broken)


def _finite(seen: Columns) -> Iterator[Finding]:
    if seen.broken.any():
        yield Finding(
            "features hold NaN or infinity", seen.broken, "mend the features where they are made"
        )


def _constant(seen: Columns) -> Iterator[Finding]:
    """Features that tell nothing."""
    still = int((seen.std == 0).sum())
    if still:
        yield Finding(
            f"{still} of {len(seen.std)} features are the same in every row that was looked at",
            np.isfinite(seen.length),
            "leave these columns out: they cost traffic and tell nothing",
            why_not="a linear head loses nothing without them",
            mild=True,
        )


def _units(seen: Columns) -> Iterator[Finding]:
    """Features of different units: one learning rate cannot suit them all."""
    varied = seen.std[seen.std > 0]
    if len(varied) and varied.max() > UNEVEN * varied.min():
        yield Finding(
            f"features differ in scale: deviations from {varied.min():.2g} to {varied.max():.2g}",
            np.isfinite(seen.length),
            "divide each column by one deviation that all clients agree on",
            Trial("scaled", columns=_scaled(seen.std)),
        )


def _lengths(seen: Columns) -> Iterator[Finding]:
    """Clients whose features come in another unit, or from another trunk."""
    middle = np.nanmedian(seen.length)
    odd = (seen.length > AWAY * middle) | (seen.length * AWAY < middle)
    if odd.any():
        worst = seen.length[
            np.flatnonzero(odd)[np.argmax(np.abs(np.log(seen.length[odd] + 1e-300)))]
        ]
        yield Finding(
            f"features are of length {worst:.3g} here (median), of {middle:.3g} at most clients",
            odd,
            'set adaptation.features = "standardise", where classes are mixed alike',
            Trial("standardised", standardises=True),
        )


def _scaled(std: Float64) -> Callable[[Matrix], Matrix]:
    scale = np.where(std > 0, std, 1.0)
    return lambda matrix: (matrix / scale).astype(np.float32)


CHECKS: tuple[Callable[[Columns], Iterator[Finding]], ...] = (_finite, _constant, _units, _lengths)
