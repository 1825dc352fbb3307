"""Blocks of clients: which rows they need and which thread works on them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from fedtl.errors import InputError
from fedtl.types import Float32, Int32, Int64, Population

# A kernel call cannot be interrupted, and rows that must be converted are copied per call: at most
# this many clients a call keeps Ctrl-C and memory in hand; a call costs some 20 microseconds.
LARGEST_BLOCK = 16


@dataclass(frozen=True)
class BlockRows:
    """Rows of some clients, as the kernels take them.

    Attributes:
        features: float32 [M, D], contiguous: the whole matrix, uncopied, where it has that form.
        halves: the bits of a float16 matrix, uint16 [M, D]; [0, D] where ``features`` are given.
        labels: int32 [M].
        index: int64 [n], rows of all the clients of the block.
        starts, stops: int64 [b]; client i has ``index[starts[i]:stops[i]]``.
    """

    features: Float32
    halves: npt.NDArray[np.uint16]
    labels: Int32
    index: Int64
    starts: Int64
    stops: Int64


def frozen(array: npt.ArrayLike, dtype: npt.DTypeLike) -> npt.NDArray[Any]:
    """A read-only contiguous view, so that each kernel is compiled for one kind of array only."""
    view = np.ascontiguousarray(np.asarray(array), dtype=dtype).view()
    view.flags.writeable = False
    return view


def readable(features: npt.NDArray[np.floating[Any]]) -> bool:
    """Whether the kernels can read rows of this matrix where they lie."""
    flags = features.flags
    return features.dtype in (np.float32, np.float16) and flags.c_contiguous and flags.aligned


def block_rows(
    features: npt.NDArray[np.floating[Any]], labels: Int32, rows: list[Int64]
) -> BlockRows:
    """Say where the rows of a block of clients are.

    A contiguous float32 or float16 matrix is passed on as it is (memory-mapped or not). Of any
    other (strided, misaligned) this block's rows are copied as float32.

    Args:
        features: [N, D] floating.
        labels: [N].
        rows: each client's rows, int64 [n_i] in [0, N); one and the same array may stand for all.

    Raises:
        InputError: a row that the matrix does not have.
    """
    shared = all(own is rows[0] for own in rows)
    index = rows[0] if shared else np.concatenate(rows)
    stops = np.cumsum([0 if shared and i else len(own) for i, own in enumerate(rows)])
    starts = np.zeros_like(stops) if shared else stops - [len(own) for own in rows]
    check_rows(index, features)
    if not readable(features):
        features, labels = features[index].astype(np.float32), labels[index]
        index = np.arange(len(index))
    empty = np.empty((0, features.shape[1]), np.float32)
    halves = features.view(np.uint16) if features.dtype == np.float16 else empty
    return BlockRows(
        frozen(empty if features.dtype == np.float16 else features, np.float32),
        frozen(halves, np.uint16),
        frozen(labels, np.int32),
        np.ascontiguousarray(index, dtype=np.int64).copy(),
        starts.astype(np.int64),
        stops.astype(np.int64),
    )


def run_blocks(
    work: Callable[[int, int], None], count: int, *, threads: int = 1, block_size: int | None = None
) -> None:
    """Call ``work(first, stop)`` for consecutive blocks that cover ``range(count)``.

    Args:
        work: must write its results to places of their own; called from several threads at once.
        count: how many clients there are.
        threads: how many blocks at once, at least 1.
        block_size: clients in a block; None divides evenly, up to LARGEST_BLOCK.

    Raises:
        InputError: ``threads`` or ``block_size`` below 1. What ``work`` raises is raised here.
    """
    for name, value in (("threads", threads), ("block_size", block_size)):
        if value is not None and value < 1:
            raise InputError(f"{name} must be at least 1", got=value)
    # Four blocks a thread even out clients of unequal size.
    size = block_size or max(1, min(LARGEST_BLOCK, count // (4 * threads)))
    blocks = [(first, min(first + size, count)) for first in range(0, count, size)]
    if threads == 1 or len(blocks) < 2:
        for block in blocks:
            work(*block)
        return
    with ThreadPoolExecutor(min(threads, len(blocks)), thread_name_prefix="clients") as pool:
        futures = [pool.submit(work, *block) for block in blocks]
        try:
            for future in futures:
                future.result()
        finally:
            for future in futures:
                future.cancel()


@contextmanager
def one_blas_thread() -> Iterator[None]:
    """One thread for each matrix product, which several could split in another way."""
    with _controller().limit(limits=1, user_api="blas"):
        yield


@lru_cache(maxsize=1)
def _controller() -> Any:
    """Looks once for the process's BLAS libraries, scipy's among them."""
    import scipy.linalg  # noqa: F401  loads its own
    from threadpoolctl import ThreadpoolController

    return ThreadpoolController()


def labels_of(population: Population, client: int, rows: Int64, num_classes: int) -> Int32:
    """The labels of some of a client's rows. Raises InputError for one outside the classes."""
    labels = population.labels[rows]
    if len(labels) and (labels.min() < 0 or labels.max() >= num_classes):
        raise label_error(population, client, num_classes)
    return labels


def check_rows(rows: Int64, features: npt.NDArray[np.floating[Any]]) -> None:
    """Raise InputError for rows that the features do not have."""
    if len(rows) and (rows.min() < 0 or rows.max() >= len(features)):
        raise InputError(
            "a client refers to rows that the features do not have",
            got=f"rows {rows.min()} to {rows.max()}",
            allowed=f"0 to {len(features) - 1}",
        )


def label_error(population: Population, client: int, num_classes: int) -> InputError:
    """The error for a client whose labels the head has no output for."""
    return InputError(
        "labels outside the head's classes",
        where=f"client {client} ({population.names[client]})",
        allowed=f"0 to {num_classes - 1}",
    )
