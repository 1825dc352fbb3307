"""Each client's features brought to a common place and shape by a map of its own.

A row x of client k becomes (x - m_k) M_k (+ m_g), with statistics of the client's own training rows
only; its test rows go through the same map, also where everybody's tests are judged together.

- ``standardise``: m_k and each feature's deviation; FedBN's idea (Li et al. 2021, arXiv 2102.07623)
  on frozen features.
- ``whiten``: M_k = S_k^(-1/2).
- ``coral``: M_k = S_k^(-1/2) S_g^(1/2) and m_g, so that all clients have everybody's mean and
  covariance; CORAL, Sun, Feng and Saenko 2016 (1511.05547), algorithm 1, with means.

A client has fewer rows than features as a rule, and its covariance then has no inverse. S is
(n C + D mu I) / (n + D), with the covariance C, its mean variance mu = tr(C) / D and D features: as
if D more rows had varied alike in all directions, the mean under an inverse Wishart prior. With
many rows it is C. The weights of Chen et al. 2010 (OAS) and Ledoit and Wolf 2004 are meant for
estimating C and leave directions of little variance nearly as they are; their inverse roots blow
noise up (on four PACS domains OAS costs 25 points of accuracy, this 10). CORAL's own C + I depends
on the features' unit. One feature's variance gains RIDGE of the client's mean variance. Where
nothing varies (one row), only the mean is removed.

Everything is in float64, a client by itself, rows in blocks of fixed size: the bits depend on
neither threads nor who else there is (but for CORAL's target).
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from fedtl import machine
from fedtl.clients.blocks import one_blas_thread, run_blocks
from fedtl.errors import InputError
from fedtl.transfer import entries
from fedtl.transfer.extraction import digest_of
from fedtl.transfer.features import FeatureStore
from fedtl.types import Float64, Int64, Population

Kind = Literal["standardise", "whiten", "coral"]

FORMAT = 1
"""Of the maps, and part of the key of what they made."""

RIDGE = 0.01
"""Of the mean variance, added to each feature's own when it is standardised."""

RESOLUTION = float(np.finfo(np.float32).eps)
"""Deviations below this share of the mean are rounding of features that do not vary."""

ROWS = 1024
"""Rows in float64 at a time: 10 MB of 1,280 features."""


@dataclass(frozen=True)
class Moments:
    """What a map is made from.

    Attributes:
        count: n rows.
        mean: [D].
        values, vectors: eigenvalues [r] and eigenvectors [D, r] of the covariance (divided by n);
            the rest of its D eigenvalues is 0.
    """

    count: int
    mean: Float64
    values: Float64
    vectors: Float64

    @property
    def shrinkage(self) -> float:
        """Weight of the identity, D / (n + D)."""
        return len(self.mean) / (self.count + len(self.mean))

    def power(self, exponent: float, x: Float64) -> Float64:
        """x S^exponent for rows x [n, D], S the shrunk covariance; x where nothing varies.

        S is a multiple of the identity outside its eigenvectors, so no [D, D] matrix is needed.
        """
        scale = self.values.sum() / len(self.mean)
        if not scale > 0:
            return x
        outside = (self.shrinkage * scale) ** exponent if len(self.values) < len(self.mean) else 0.0
        inside = ((1 - self.shrinkage) * self.values + self.shrinkage * scale) ** exponent
        return np.asarray(outside * x + ((x @ self.vectors) * (inside - outside)) @ self.vectors.T)


def align(
    population: Population,
    kind: Kind,
    *,
    threads: int = 1,
    store: FeatureStore | None = None,
) -> tuple[Population, str | None]:
    """The population with every client's rows, training and test, through its own map.

    The aligned matrix is an entry of the feature store, keyed by the features, by who has which
    rows and by the kind: processes map it, nobody copies it, and a resumed run finds it.

    Args:
        population: features of every client, float32 or float16 [N, D], all finite.
        kind: the map.
        threads: CPU threads; the result does not depend on it.
        store: where the matrix is kept; default the user's.

    Returns:
        The population over a read-only memory map, float32 [N, D] (zeros in rows that nobody has),
        and a line for the user where a stored matrix was damaged or waited for.

    Raises:
        EnvironmentFault: no room for the matrix.
        InputError: a feature overflows float32 on its way.
    """
    store = store or FeatureStore()
    notes: list[str] = []
    fill = partial(_fill, population, kind, threads, store)
    (_, (matrix, _, _)), _ = store.entry(_key(population, kind), fill, threads, notes)
    return replace(population, features=matrix), "; ".join(notes) or None


def aligned_rows(population: Population, kind: Kind, client: int, rows: Int64) -> Float64:
    """Some of a client's rows as ``align`` has them, before they are stored; float64 [n, D]."""
    target = pooled_moments(population) if kind == "coral" else None
    return next(_mapped(population, kind, client, [rows], target))


def moments(
    features: npt.NDArray[np.floating[Any]], rows: Int64, *, covariance: bool = True
) -> Moments:
    """Mean and shrunk covariance of some rows, at least one.

    With more rows than features the eigenvectors are those of the covariance, else they follow from
    the rows' inner products, which is quicker the fewer rows there are.

    Args:
        covariance: False leaves it out (no eigenvalues).
    """
    width, count = features.shape[1], len(rows)
    mean = np.zeros(width)
    for part in _parts(rows):
        mean += features[part].astype(np.float64).sum(axis=0)
    mean /= count
    if not covariance:
        return Moments(count, mean, np.empty(0), np.empty((width, 0)))
    if count > width:
        gram = np.zeros((width, width))
        for part in _parts(rows):
            x = features[part].astype(np.float64) - mean
            gram += x.T @ x
        values, vectors = np.linalg.eigh(gram / count)
        values = np.maximum(values, 0)
    else:
        x = features[rows].astype(np.float64) - mean
        values, left = np.linalg.eigh(x @ x.T / count)
        kept = values > max(values[-1], 0) * count * np.finfo(np.float64).eps
        values, vectors = values[kept], x.T @ left[:, kept]
        vectors /= np.sqrt(values * count)
    if values.sum() <= RESOLUTION**2 * np.square(mean).sum():
        values = np.zeros_like(values)
    return Moments(count, mean, values, vectors)


def pooled_moments(population: Population) -> Moments:
    """Of everybody's training rows together, in the order of the matrix."""
    return moments(population.features, np.sort(population.train.index))


def _fill(
    population: Population, kind: Kind, threads: int, store: FeatureStore, folder: Path
) -> None:
    """Write the aligned matrix as a store's entry."""
    began = time.perf_counter()
    count, width = population.features.shape
    store.check_disk(count, width, "float32")
    file = entries.FeatureFile(folder / entries.ARRAYS[0], count, width, "float32")

    def work(first: int, stop: int) -> None:
        for client in range(first, stop):
            rows = np.concatenate([population.train.of(client), population.test.of(client)])
            parts = list(_parts(rows))
            blocks = _mapped(population, kind, client, parts, target)
            for part, block in zip(parts, blocks, strict=True):
                _write(file, population, client, part, block)

    try:
        with one_blas_thread():
            target = pooled_moments(population) if kind == "coral" else None
            run_blocks(work, population.num_clients, threads=threads)
        file.keep(np.arange(count))
    finally:
        file.close()
    np.save(folder / entries.ARRAYS[1], np.zeros((count, 16), np.uint8))
    np.save(folder / entries.ARRAYS[2], np.arange(count))
    manifest = {
        "format": FORMAT,
        "backbone": {"model": f"aligned features ({kind})"},
        "rows": count,
        "dim": width,
        "created": time.time(),
        "created_utc": datetime.now(UTC).isoformat(timespec="seconds"),
        "build_seconds": time.perf_counter() - began,
        "versions": machine.versions(),
    }
    entries.seal(folder, manifest, threads)


def _mapped(
    population: Population,
    kind: Kind,
    client: int,
    parts: Sequence[Int64],
    target: Moments | None,
) -> Iterator[Float64]:
    """A client's map of each of some groups of its rows."""
    features, own = population.features, population.train.of(client)
    if not len(own):  # nothing is known of it
        yield from (features[part].astype(np.float64) for part in parts)
        return
    found = moments(features, own, covariance=kind != "standardise")
    deviation = _deviation(features, own, found.mean) if kind == "standardise" else None
    for part in parts:
        x = features[part].astype(np.float64) - found.mean
        if deviation is not None:
            yield x / deviation
        elif target is None:
            yield found.power(-0.5, x)
        else:
            yield target.power(0.5, found.power(-0.5, x)) + target.mean


def _deviation(features: npt.NDArray[np.floating[Any]], rows: Int64, mean: Float64) -> Float64:
    """Each feature's deviation over some rows, shrunk; ones where nothing varies."""
    variance = np.zeros(len(mean))
    for part in _parts(rows):
        variance += np.square(features[part].astype(np.float64) - mean).sum(axis=0)
    variance /= len(rows)
    common = variance.mean()
    varies = common > RESOLUTION**2 * np.square(mean).mean()
    return np.sqrt(variance + RIDGE * common) if varies else np.ones(len(mean))


def _write(
    file: entries.FeatureFile, population: Population, client: int, rows: Int64, block: Float64
) -> None:
    with np.errstate(over="ignore"):  # looked for in the next line
        stored = block.astype(np.float32)
    if not np.isfinite(stored).all():
        raise InputError(
            "features leave what float32 can hold when they are aligned",
            where=f"client {client} ({population.names[client]})",
            do='Set adaptation.features = "none", or scale the features down',
        )
    start = 0
    for stop in [*(np.flatnonzero(np.diff(rows) != 1) + 1).tolist(), len(rows)]:
        if stop > start:
            file.write(int(rows[start]), stored[start:stop])
        start = stop


def _parts(rows: Int64) -> Iterator[Int64]:
    for low in range(0, len(rows), ROWS):
        yield rows[low : low + ROWS]


def _key(population: Population, kind: Kind) -> str:
    """What decides the aligned matrix: the features, who has which rows, and the kind."""
    digest = hashlib.blake2b(digest_size=32, person=b"fedtl-aligned")
    features = population.features
    for low in range(0, len(features), ROWS):
        digest.update(np.ascontiguousarray(features[low : low + ROWS]).data)
    for rows in (population.train, population.test):
        for array in (rows.offsets, rows.index):
            digest.update(np.ascontiguousarray(array, np.int64).data)
    return digest_of(
        {
            "aligned": FORMAT,
            "kind": kind,
            "shape": list(features.shape),
            "dtype": str(features.dtype),
            "content": digest.hexdigest(),
            "ridge": RIDGE,
        }
    )
