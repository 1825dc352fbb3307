"""The same content twice: in training and test, or at two clients."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fedtl.data.clients import ClientSplit
from fedtl.data.examples import Examples
from fedtl.errors import InputError
from fedtl.types import Int64

HASH_BYTES = 16
SHOWN = 5

Hashes = npt.NDArray[np.uint8]
"""BLAKE2b-128 of every example's content, uint8 [N, 16]."""


@dataclass(frozen=True)
class LeakReport:
    """Groups of identical content: how many cross the split, how many cross clients.

    ``examples`` has up to five lines that say where such content lies and whose it is.
    """

    train_test: int
    between_clients: int
    examples: tuple[str, ...] = ()


def content_hashes(rows: npt.NDArray[np.generic]) -> Hashes:
    """BLAKE2b-128 of every row of an array [N, ...], uint8 [N, 16]."""
    rows = np.ascontiguousarray(rows)
    hashes = b"".join(hashlib.blake2b(row.data, digest_size=HASH_BYTES).digest() for row in rows)
    return np.frombuffer(hashes, dtype=np.uint8).reshape(len(rows), HASH_BYTES)


def row_hashes(examples: Examples) -> Hashes:
    """Of every row as it came: a table's before anybody scales it, or ready features."""
    table = examples.table
    if table is None:
        return content_hashes(np.asarray(examples.features))
    # a missing value has many bit patterns as a number
    numbers = np.where(np.isnan(table.numeric), np.nan, table.numeric + 0.0)
    return content_hashes(np.concatenate([numbers, table.codes], axis=1))


def find_leaks(content: Hashes, split: ClientSplit, examples: Examples) -> LeakReport:
    """Look for identical content among the rows that are in use.

    Args:
        content: hash of every example, uint8 [N, 16].
        split: who trains and is judged on which rows.
        examples: for the places named in the report.
    """
    rows = np.concatenate([split.train.index, split.test.index])
    client = np.concatenate(
        [np.repeat(np.arange(len(part.counts)), part.counts) for part in (split.train, split.test)]
    )
    is_test = np.arange(len(rows)) >= len(split.train.index)
    halves = np.ascontiguousarray(content[rows]).view("<u8")
    order = np.lexsort((rows, halves[:, 1], halves[:, 0]))
    new = np.ones(len(order), dtype=np.bool_)
    new[1:] = (np.diff(halves[order], axis=0) != 0).any(axis=1)
    starts = np.flatnonzero(new)
    if len(starts) == len(rows):
        return LeakReport(0, 0)
    client, is_test = client[order], is_test[order]
    crosses_split = np.maximum.reduceat(is_test, starts) & ~np.minimum.reduceat(is_test, starts)
    crosses_clients = np.maximum.reduceat(client, starts) > np.minimum.reduceat(client, starts)
    leaks = np.flatnonzero(crosses_split | crosses_clients)
    ends = np.append(starts[1:], len(rows))
    groups = (order[starts[g] : ends[g]] for g in leaks[:SHOWN].tolist())
    return LeakReport(
        int(crosses_split.sum()),
        int(crosses_clients.sum()),
        tuple(_describe(groups, rows, split, examples)),
    )


def _describe(
    groups: Iterator[Int64], rows: Int64, split: ClientSplit, examples: Examples
) -> Iterator[str]:
    """One line a group of positions in ``rows`` (training rows first): the first three places."""
    offsets = split.train.offsets, split.test.offsets + len(split.train.index)
    for group in groups:
        places = []
        for position in group[:3].tolist():
            part = int(position >= len(split.train.index))
            client = int(np.searchsorted(offsets[part], position, side="right")) - 1
            kind = ("train", "test")[part]
            places.append(f"{examples.where(int(rows[position]))} ({split.names[client]}, {kind})")
        more = f" and {len(group) - 3} more" if len(group) > 3 else ""
        yield " = ".join(places) + more


def check_leaks(report: LeakReport, policy: str) -> None:
    """Stop when something leaks, unless ``data.leakage`` is ``"allow"``.

    Raises:
        InputError: with the counts and the examples of the report.
    """
    if policy == "allow" or not (report.train_test or report.between_clients):
        return
    table = "".join(f"\n  {line}" for line in report.examples)
    raise InputError(
        "the same content is in more than one place",
        where="data",
        got=f"{report.train_test} in both train and test, "
        f"{report.between_clients} at more than one client:{table}\n",
        do="Remove the copies, or accept optimistic figures with --set data.leakage=allow",
    )
