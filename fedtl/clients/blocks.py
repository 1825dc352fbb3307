"""Blocks of clients: which rows they need and which thread works on them."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from fedtl.errors import InputError
from fedtl.types import Float32, Int32, Int64, Rows

# A kernel call cannot be interrupted, and rows that must be converted are copied per call: at most
# this many clients a call keeps Ctrl-C and memory in hand; a call costs some 20 microseconds.
LARGEST_BLOCK = 16


@dataclass(frozen=True)
class BlockRows:
    """Rows of some clients, as the kernels take them.

    Attributes:
        features: float32 [M, D], contiguous: the whole matrix, uncopied, where it has that form.
        labels: int32 [M].
        index: int64 [n], rows of all the clients of the block.
        starts, stops: int64 [b]; client i has ``index[starts[i]:stops[i]]``.
    """

    features: Float32
    labels: Int32
    index: Int64
    starts: Int64
    stops: Int64


def frozen(array: npt.ArrayLike, dtype: npt.DTypeLike) -> npt.NDArray[Any]:
    """A read-only contiguous view, so that each kernel is compiled for one kind of array only."""
    view = np.ascontiguousarray(np.asarray(array), dtype=dtype).view()
    view.flags.writeable = False
    return view


def block_rows(
    features: npt.NDArray[np.floating[Any]], labels: Int32, rows: list[Int64]
) -> BlockRows:
    """Gather the rows of a block of clients.

    A contiguous float32 matrix is passed on as it is (memory-mapped or not). Of any other (float16,
    strided, misaligned) this block's rows are copied as float32.

    Args:
        features: [N, D] floating.
        labels: [N].
        rows: each client's rows, int64 [n_i] in [0, N).

    Raises:
        InputError: a row that the matrix does not have.
    """
    index = np.ascontiguousarray(np.concatenate(rows) if rows else [], dtype=np.int64)
    if len(index) and (index.min() < 0 or index.max() >= min(len(features), len(labels))):
        raise InputError(
            "a client refers to rows that the features do not have",
            got=f"rows {index.min()} to {index.max()}",
            allowed=f"0 to {min(len(features), len(labels)) - 1}",
        )
    stops = np.cumsum([len(own) for own in rows], dtype=np.int64)
    starts = stops - np.array([len(own) for own in rows], dtype=np.int64)
    flags = features.flags
    if not (features.dtype == np.float32 and flags.c_contiguous and flags.aligned):
        features, labels = features[index].astype(np.float32), labels[index]
        index = np.arange(len(index), dtype=np.int64)
    return BlockRows(frozen(features, np.float32), frozen(labels, np.int32), index, starts, stops)


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
