"""Sums over a client's rows from which closed-form heads follow: counts, class sums, Gram matrix.

Sources: Fed3R, Fanì et al. 2024 (arXiv 2406.01116); its random features are those of
Rahimi and Recht 2007, z = sqrt(2/R) cos(x Omega + b). What a protection does to rows and answers:
``privacy.statistics``. Deviation: everything is multiplied and added
in float64, so that heads from any split agree to 1e-14 (in float32 only to 1e-6).

Rows are read in blocks of fixed size and the Gram matrix is made in tiles of fixed size, so the
bits depend on neither threads nor how clients are put together. Memory is one Gram matrix and one
block of rows for each client worked on at the same time.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from fedtl import seeding
from fedtl.clients.blocks import labels_of, one_blas_thread, run_blocks
from fedtl.clients.training import check_clients
from fedtl.plans import Protection, RoundPlan, Statistics
from fedtl.privacy.noise import Noise, from_system, seeded
from fedtl.privacy.statistics import protect_answer, protect_rows
from fedtl.types import ClientUpdates, Float64, Head, Int64, Population

BLOCK_ROWS = 512
"""Rows converted to float64 at a time: long enough for a fast product, 5 MB at 1,280 features."""

SLICE_ROWS = 64
"""Rows of a block that one thread converts."""

TILE = 256
"""Side of a Gram tile: its product stays in a core's own cache while it is added."""

LARGE_BYTES = 4 * 2**20
"""Arrays that go back to the system as soon as they are freed."""

Spread = Callable[[Callable[[Any], None], Any], Any]
"""``map``, or a thread pool's."""


def statistics(
    population: Population,
    head: Head,
    plan: RoundPlan,
    *,
    threads: int = 1,
    secure: bool = False,
) -> ClientUpdates:
    """Sum the plan's statistics over each client's training rows.

    Args:
        population: ``features`` float32 or float16 [N, D], may be memory-mapped.
        head: its ``weight`` has a row per class.
        plan: who is asked, for which ``Statistics``, under which protection.
        threads: CPU threads; the result does not depend on it.
        secure: noise is the operating system's, as these are real data; else of the plan's keys.

    Returns:
        The tensors that ``plan.plain_reply(head)`` names; zeros for a client without rows; no loss
        (NaN). A feature that is not finite survives to the sums, unless rows are shortened.
        Examples of a class that has fewer than ``Protection.least_per_class`` at a client are in
        none of its sums, and still among its ``num_examples``, which everybody knows.

    Raises:
        InputError: an unknown client, or labels outside the classes.
    """
    _give_back_large_memory()
    check_clients(population, plan.clients)
    asked = plan.statistics
    assert asked is not None
    safe = plan.protection or Protection()
    count, shapes = len(plan.clients), plan.plain_reply(head)
    tensors: dict[str, npt.NDArray[Any]] = {
        name: np.zeros((count, *shape), dtype) for name, (shape, dtype) in shapes.items()
    }
    shielded = safe.clip > 0 or safe.noise > 0
    if shielded:  # no class count stays whole
        tensors["counts"] = tensors["counts"].astype(np.float64)

    def work(i: int, spread: Spread) -> None:
        own = {name: tensor[i] for name, tensor in tensors.items()}
        _sum_client(population, int(plan.clients[i]), asked, safe, own, spread)
        if shielded:
            noise = _noise(plan, i, secure) if safe.noise else None
            for name, tensor in protect_answer(own, asked, safe, noise).items():
                own[name][...] = tensor

    def block(first: int, stop: int) -> None:
        for i in range(first, stop):
            work(i, map)

    with one_blas_thread(), np.errstate(over="ignore", invalid="ignore"):
        if threads > 1 and count < 2 * threads:  # few and perhaps large: share each one's tiles
            with ThreadPoolExecutor(threads, thread_name_prefix="statistics") as pool:
                for i in range(count):
                    work(i, pool.map)
        else:
            run_blocks(block, count, threads=threads)
    examples = population.train.counts[plan.clients]
    return ClientUpdates(plan.round, plan.clients, tensors, examples, np.full(count, np.nan))


def _noise(plan: RoundPlan, place: int, secure: bool) -> Noise:
    """The stream of the client at this place of the plan."""
    if secure:
        return from_system()
    assert plan.noise_keys is not None, "noise that is not the system's has a key"
    return seeded(int(plan.noise_keys[place]))


def _sum_client(
    population: Population,
    client: int,
    asked: Statistics,
    safe: Protection,
    out: dict[str, npt.NDArray[Any]],
    spread: Spread,
) -> None:
    """One client's sums, added to the zeros in ``out``."""
    rows = population.train.of(client)
    num_classes, width = out["sums"].shape
    labels = labels_of(population, client, rows, num_classes)
    counts = np.bincount(labels, minlength=num_classes)
    if safe.least_per_class > 1:
        counts[counts < safe.least_per_class] = 0
        held = counts[labels] > 0
        rows, labels = rows[held], labels[held]
    out["counts"][:] = counts
    block = np.empty((min(BLOCK_ROWS, max(1, len(rows))), width))
    gram = np.zeros((width, width)) if asked.gram or asked.class_grams else None
    if not asked.class_grams:
        _sum_rows(population, rows, labels, asked, safe, block, gram, out["sums"], spread)
        if gram is not None:
            pack_symmetric(gram, out["gram"])
        return
    assert gram is not None
    for c in np.flatnonzero(counts).tolist():
        gram[:] = 0
        own = labels == c
        _sum_rows(population, rows[own], labels[own], asked, safe, block, gram, out["sums"], spread)
        pack_symmetric(gram, out["class_grams"][c])
        if asked.gram:
            out["gram"] += out["class_grams"][c]


def _sum_rows(
    population: Population,
    rows: Int64,
    labels: npt.NDArray[np.integer],
    asked: Statistics,
    safe: Protection,
    block: Float64,
    gram: Float64 | None,
    sums: Float64,
    spread: Spread,
) -> None:
    """Add some rows to ``gram`` (its upper tiles) and, by class, to ``sums``."""
    width = block.shape[1]
    edges = [(low, min(low + TILE, width)) for low in range(0, width, TILE)]
    tiles = [(a, b) for i, a in enumerate(edges) for b in (edges[i:] if gram is not None else [a])]
    own_memory = threading.local()
    for first in range(0, len(rows), BLOCK_ROWS):
        # Within the block rows are sorted by class, so that a class is one run of rows.
        own = labels[first : first + BLOCK_ROWS]
        order = np.argsort(own, kind="stable")
        present, starts = np.unique(own[order], return_index=True)
        chosen = rows[first : first + BLOCK_ROWS][order]
        z = block[: len(chosen)]

        def convert(low: int, chosen: Int64 = chosen, z: Float64 = z) -> None:
            some = slice(low, low + SLICE_ROWS)
            _map_rows(population.features[chosen[some]], asked, z[some])
            if safe.row_clip:
                protect_rows(z[some], asked, safe.row_clip)

        def add(
            tile: tuple[tuple[int, int], tuple[int, int]],
            z: Float64 = z,
            present: npt.NDArray[Any] = present,
            starts: npt.NDArray[np.intp] = starts,
        ) -> None:
            (a, b), (c, d) = tile
            if gram is not None:
                if not hasattr(own_memory, "product"):  # fresh memory for each costs a third
                    own_memory.product = np.empty(TILE * TILE)
                product = own_memory.product[: (b - a) * (d - c)].reshape(b - a, d - c)
                gram[a:b, c:d] += np.matmul(z[:, a:b].T, z[:, c:d], out=product)
            if a == c:
                sums[present, a:b] += np.add.reduceat(z[:, a:b], starts, axis=0)

        for _ in spread(convert, range(0, len(chosen), SLICE_ROWS)):
            pass
        for _ in spread(add, tiles):
            pass


def _map_rows(features: npt.NDArray[np.floating[Any]], asked: Statistics, out: Float64) -> None:
    """z of some rows [m, W]: their features or random ones, and a 1 where there is a bias."""
    if asked.bias:
        out[:, -1] = 1
    z = out[:, : out.shape[1] - asked.bias]
    if not asked.random_features:
        z[:] = features
        return
    omega, shift = fourier_map(features.shape[1], asked.random_features, asked.scale, asked.key)
    np.matmul(features.astype(np.float64), omega, out=z)
    z += shift
    np.cos(z, out=z)
    z *= np.sqrt(2 / asked.random_features)


@lru_cache(maxsize=1)
def fourier_map(
    num_features: int, random_features: int, scale: float, key: int
) -> tuple[Float64, Float64]:
    """Omega [D, R] ~ N(0, scale^2) and b [R] ~ U[0, 2 pi) of a random Fourier map.

    Both are float32 numbers, as a head file can hold them, given as float64.
    """
    stream = seeding.generator(key, "fourier")
    omega = (scale * stream.standard_normal((num_features, random_features))).astype(np.float32)
    shift = stream.uniform(0, 2 * np.pi, random_features).astype(np.float32)
    pair = omega.astype(np.float64), shift.astype(np.float64)
    for array in pair:
        array.flags.writeable = False
    return pair


def pack_symmetric(matrix: Float64, out: Float64 | None = None) -> Float64:
    """The upper triangle by rows, float64 [W (W + 1) / 2]; what is below it is not looked at."""
    width = len(matrix)
    packed = np.empty(width * (width + 1) // 2) if out is None else out
    place = 0
    for i in range(width):
        packed[place : place + width - i] = matrix[i, i:]
        place += width - i
    return packed


def unpack_symmetric(packed: Float64) -> Float64:
    """The whole symmetric matrix [W, W] of a packed upper triangle."""
    width = int(np.sqrt(2 * len(packed)))
    matrix = np.empty((width, width))
    place = 0
    for i in range(width):
        row = packed[place : place + width - i]
        matrix[i, i:] = row
        matrix[i:, i] = row
        place += width - i
    return matrix


@lru_cache(maxsize=1)
def _give_back_large_memory() -> None:
    """Keep glibc from raising its threshold for mappings of their own (M_MMAP_THRESHOLD).

    It would otherwise hold on to freed matrices, in holes between what is still in use: half as
    much again as is ever used at once. Elsewhere nothing happens.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(-3, LARGE_BYTES)
