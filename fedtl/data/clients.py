"""Each client's training and test rows."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from fedtl import seeding
from fedtl.data.examples import Examples
from fedtl.data.partitions import Assignment
from fedtl.errors import InputError
from fedtl.scenario.schema import Clients
from fedtl.types import Int32, Int64, Rows, UInt64

Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class ClientSplit:
    """What every client trains and is judged on; rows ascend within a client.

    Attributes:
        train, test: rows of each of the K clients that stay; disjoint.
        names, domains: one each per client.
        excluded: (name, examples) of the clients that were left out.
    """

    train: Rows
    test: Rows
    names: tuple[str, ...]
    domains: tuple[str, ...]
    excluded: tuple[tuple[str, int], ...] = ()


def split_clients(
    assignment: Assignment, examples: Examples, clients: Clients, test_fraction: float, seed: int
) -> ClientSplit:
    """Split every client's rows into training and test, and leave out clients too small to use.

    Args:
        assignment: who holds what.
        examples: their own split, if they have one, is used as it is.
        clients: ``min_examples`` is the fewest a client may hold.
        test_fraction: of each client's rows, in (0, 1), stratified by class.
        seed: the scenario's.

    Returns:
        The clients that stay, renumbered from 0 in the old order.

    Raises:
        InputError: no client stays.
    """
    num = len(assignment.names)
    held = np.bincount(assignment.client, minlength=num)
    is_test = test_rows(assignment, examples, test_fraction, seed)
    trains = np.bincount(assignment.client[~is_test], minlength=num)
    stays = (held >= clients.min_examples) & (trains > 0)
    if not stays.any():
        raise InputError(
            "no client has enough examples to train on",
            where="clients",
            got=f"{num} clients, the largest with {held.max()} examples",
            allowed=f"at least {clients.min_examples} examples (clients.min_examples)"
            + (", one of them for training" if examples.is_test is not None else ""),
            do="Use fewer clients, or a smaller clients.min_examples",
        )
    if not (is_test & stays[assignment.client]).any():
        raise InputError(
            "no client has an example to be judged on",
            where="data",
            do="Mark some rows of training clients as test, or leave `split` out"
            if examples.is_test is not None
            else "Use fewer clients, or a larger data.test_fraction",
        )
    excluded = np.flatnonzero(~stays).tolist()
    kept = np.flatnonzero(stays).tolist()
    return ClientSplit(
        train=rows_by_client(assignment.client, stays, ~is_test),
        test=rows_by_client(assignment.client, stays, is_test),
        names=tuple(assignment.names[k] for k in kept),
        domains=tuple(assignment.domains[k] for k in kept),
        excluded=tuple((assignment.names[k], int(held[k])) for k in excluded),
    )


def test_rows(assignment: Assignment, examples: Examples, test_fraction: float, seed: int) -> Mask:
    """Which rows are for testing, bool [N]: as the data say, else drawn for each client."""
    if examples.is_test is not None:
        return examples.is_test
    keys = seeding.named_keys(seed, "split", assignment.names)
    return stratified_test(assignment.client, keys, examples.labels, test_fraction)


def stratified_test(client: Int32, keys: UInt64, labels: Int32, test_fraction: float) -> Mask:
    """Which rows are test rows, bool [N], without a loop over rows or clients.

    Rows are sorted by client and class, in random order within both, and sampled systematically:
    at every 1/f-th place, from a random start for each client. A run of m rows then gets
    floor(f m) or ceil(f m) test rows, and every client and every class of a client is a run.
    A client of two rows or more has one of each kind at least; a single row is for training.

    Args:
        client: who holds each row, int32 [N].
        keys: each client's own stream, uint64 [K]. The split of a client follows from its key, its
            labels and the order of its rows: a real client that sees nobody else's draws the same.
        labels: int32 [N].
        test_fraction: in (0, 1).
    """
    num = len(keys)
    held = np.bincount(client, minlength=num)
    first = np.cumsum(held) - held
    order = np.argsort(client, kind="stable")
    owner = client[order]
    place = np.arange(len(order)) - first[owner]
    shuffled = np.lexsort((seeding.counted(keys[owner], place + _DRAWS), labels[order], owner))
    order = order[shuffled]
    start, luck = (seeding.fractions(seeding.counted(keys, np.full(num, i))) for i in range(_DRAWS))
    # The product is rounded the same way for the end of one row and the start of the next, so
    # each step is 0 or 1 and the steps add up.
    chosen = np.floor((place + 1) * test_fraction + start[owner]) > np.floor(
        place * test_fraction + start[owner]
    )
    tests = np.bincount(owner[chosen], minlength=num)
    lucky = first + (luck * held).astype(np.int64)
    chosen[lucky[(tests == 0) & (held >= 2)]] = True
    chosen[lucky[(tests == held) & (held >= 1)]] = False
    is_test = np.empty(len(client), dtype=np.bool_)
    is_test[order] = chosen
    return is_test


def few_shot(split: ClientSplit, labels: Int32, shots: int, seed: int) -> ClientSplit:
    """Each client's training rows cut down to ``shots`` of a class at most; test rows all stay.

    Which ones follows from the seed, the client's name, its labels and the order of its rows, so a
    real client draws those of its simulated self; and five shots are among ten.

    Args:
        labels: int32 [N].
        shots: at least 1.
    """
    rows, counts = split.train.index, split.train.counts
    client = np.repeat(np.arange(len(counts)), counts)
    keys = seeding.named_keys(seed, "shots", split.names)
    place = np.arange(len(rows)) - split.train.offsets[client]
    order = np.lexsort((seeding.counted(keys[client], place), labels[rows], client))
    group = np.stack([client[order], labels[rows][order]])
    begins = np.ones(len(order), np.bool_)
    begins[1:] = (np.diff(group) != 0).any(axis=0)
    first = np.maximum.accumulate(np.where(begins, np.arange(len(order)), 0))
    chosen = np.zeros(len(rows), np.bool_)
    chosen[order] = np.arange(len(order)) - first < shots
    kept = np.bincount(client[chosen], minlength=len(counts))
    offsets = np.concatenate([[0], np.cumsum(kept)]).astype(np.int64)
    return replace(split, train=Rows(rows[chosen], offsets))


def used_rows(split: ClientSplit) -> Int64:
    """Rows that anybody trains or is judged on, int64 [n], ascending."""
    return np.sort(np.concatenate([split.train.index, split.test.index]))


def on_rows(split: ClientSplit, keep: Int64) -> ClientSplit:
    """The same split once only the rows ``keep`` (ascending) are left, and numbered anew.

    A client that has nothing left to train on is among the excluded.
    """
    parts = []
    for rows in (split.train, split.test):
        client = np.repeat(np.arange(len(rows.counts)), rows.counts)
        left = np.isin(rows.index, keep)
        parts.append((np.searchsorted(keep, rows.index[left]), client[left]))
    (train, trainer), (test, tester) = parts
    num = len(split.names)
    stays = np.bincount(trainer, minlength=num) > 0

    def of(rows: Int64, client: Int64) -> Rows:
        counts = np.bincount(client, minlength=num)[stays]
        offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        return Rows(rows[stays[client]], offsets)

    names, domains = np.array(split.names, object), np.array(split.domains, object)
    gone = tuple((name, 0) for name in names[~stays])
    return ClientSplit(
        of(train, trainer),
        of(test, tester),
        tuple(names[stays]),
        tuple(domains[stays]),
        (*split.excluded, *gone),
    )


_DRAWS = 2
"""Numbers of a client's stream that are taken before those of its rows."""


def rows_by_client(client: Int32, stays: Mask, wanted: Mask) -> Rows:
    """The wanted rows of the clients that stay, ascending within each client."""
    rows: Int64 = np.flatnonzero(wanted & stays[client])
    rows = rows[np.argsort(client[rows], kind="stable")]
    counts = np.bincount(client[rows], minlength=len(stays))[stays]
    return Rows(rows, np.concatenate([[0], np.cumsum(counts)]).astype(np.int64))
