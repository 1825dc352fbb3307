"""Rules that give clients other labels, other amounts, or both: Dirichlet, log-normal, Zipf.

A rule takes labels [n], the number of clients, the options and a generator, and gives the client id
of every row, int64 [n]. Each ends: what is drawn again is drawn a bounded number of times.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from fedtl.errors import InputError
from fedtl.scenario.schema import Clients
from fedtl.types import Float64, Int32, Int64

Mask = npt.NDArray[np.bool_]

MAX_EXPONENT = 1e6
"""Beyond it one client holds all that is not given to everybody; larger numbers only overflow."""

MAX_ALPHA = 1e12
"""Beyond it, as for an infinite alpha, floats cannot tell a draw from the limit."""

MAX_DRAWS = 100
"""Partitions that ``dirichlet_capacity`` draws before it says that none will do."""


def deal_dirichlet(
    labels: Int32, num: int, clients: Clients, generator: np.random.Generator
) -> Int64:
    """Each class is shared out by p ~ Dirichlet(alpha, ..., alpha) over the clients.

    Hsu, Qi and Brown 2019 (arXiv:1909.06335) draw p per client over classes; like most code since
    (Yurochkin et al. 2019) this draws per class over clients, so client sizes are skewed, too.
    Rows are allotted systematically with a random start: a client's expected count is exactly
    p * n_c, and it is never off by more than one.
    """
    client = np.empty(len(labels), dtype=np.int64)
    for rows in rows_of_classes(labels, generator):
        upper = np.cumsum(dirichlet_shares(clients.alpha, num, generator))
        places = (np.arange(len(rows)) + generator.random()) / len(rows)
        client[rows] = np.minimum(np.searchsorted(upper, places, side="right"), num - 1)
    return client


def deal_dirichlet_capacity(
    labels: Int32, num: int, clients: Clients, generator: np.random.Generator
) -> Int64:
    """The same, but a client that holds N/K rows gets none of the classes that follow.

    As the code of PFLlib, AFL and many others has it: the shares of full clients are set to zero,
    the rest add up to one again, counts are cut off to whole numbers, and all is drawn again until
    every client has ``clients.min_examples``. Sizes are much more alike than without, so published
    results need the right one of the two. Unlike there, at most ``MAX_DRAWS`` are drawn.

    Raises:
        InputError: no draw gave every client enough.
    """
    least = clients.min_examples
    if num * least > len(labels):
        raise InputError(
            "fewer examples than every client must have",
            where="clients.min_examples",
            got=f"{num} clients x {least} for {len(labels)} examples",
            allowed=f"at most {len(labels) // num}, or at most {len(labels) // least} clients",
        )
    groups = list(rows_of_classes(labels, generator))
    sizes = np.array([len(rows) for rows in groups])
    best = 0
    for _ in range(MAX_DRAWS):
        table = capacity_table(sizes, num, clients.alpha, generator)
        best = max(best, int(table.sum(axis=0).min()))
        if best >= least:
            return spread(groups, table, np.arange(num))
    raise InputError(
        f"none of {MAX_DRAWS} draws gives every client enough examples",
        where="clients.partition",
        got=f"at least {best} for each of {num} clients at alpha = {clients.alpha:g}",
        allowed=f"clients.min_examples of {best} at most" if best else None,
        do="Raise clients.alpha, lower clients.num, or use partition = 'dirichlet', "
        "which leaves small clients out",
    )


def capacity_table(sizes: Int64, num: int, alpha: float, generator: np.random.Generator) -> Int64:
    """One draw: rows of each class for each client, int64 [C, K]; sizes of classes are [C]."""
    table = np.zeros((len(sizes), num), dtype=np.int64)
    held = np.zeros(num, dtype=np.int64)
    for row, size in zip(table, sizes.tolist(), strict=True):
        has_room = held * num < sizes.sum()  # somebody has, while rows are left
        upper = np.cumsum(dirichlet_shares(alpha, num, generator, has_room))
        last = np.flatnonzero(has_room)[-1]
        upper[last:] = 1.0  # what rounding leaves over is not for full ones
        row[:] = np.diff(np.floor(upper * size).astype(np.int64), prepend=0)
        held += row
    return table


def dirichlet_shares(
    alpha: float,
    num: int,
    generator: np.random.Generator,
    has_room: Mask | None = None,
) -> Float64:
    """One draw of a symmetric Dirichlet, [num], also for an alpha near zero.

    ``has_room``: the others' shares are zero.
    """
    return normalised(dirichlet_logs(np.full(num, alpha), generator), has_room)


def dirichlet_logs(alphas: Float64, generator: np.random.Generator) -> Float64:
    """Logarithms of gamma draws of the given shapes, any array: shares before normalisation.

    A gamma draw with shape 0.01 underflows to zero for all but a few clients, for all of them when
    they are few: 0 / 0. Its logarithm does not: log G(a) = log G(a + 1) + log(U) / a.
    """
    alphas = np.clip(alphas, 1 / MAX_ALPHA, MAX_ALPHA)
    logs = np.log(generator.standard_gamma(alphas + 1.0))
    logs += np.log1p(-generator.random(alphas.shape)) / alphas
    return np.asarray(logs)


def normalised(logs: Float64, has_room: Mask | None = None) -> Float64:
    """Shares [n] that add up to one; zero where there is no room (somewhere there is)."""
    if has_room is not None:
        logs = np.where(has_room, logs, -np.inf)
    shares = np.exp(logs - logs.max())
    shares /= shares.sum()
    return np.asarray(shares)


def deal_quantity(
    labels: Int32, num: int, clients: Clients, generator: np.random.Generator
) -> Int64:
    """Client sizes follow a log-normal or a Zipf law, labels are IID; nobody gets nothing."""
    sizes = client_sizes(len(labels), num, clients, generator)
    client = np.empty(len(labels), dtype=np.int64)
    client[generator.permutation(len(labels))] = np.repeat(np.arange(num), sizes)
    return client


def client_sizes(total: int, num: int, clients: Clients, generator: np.random.Generator) -> Int64:
    """How many rows each client holds, int64 [num], one at least; they add up to ``total``."""
    if clients.quantity == "lognormal":
        logs = min(clients.sigma, MAX_EXPONENT) * generator.standard_normal(num)
    else:
        logs = -min(clients.exponent, MAX_EXPONENT) * np.log(np.arange(1, num + 1))
    edges = np.rint(np.cumsum(normalised(logs)) * (total - num)).astype(np.int64)
    return np.asarray(1 + np.diff(edges, prepend=0))


def deal_label_quantity(
    labels: Int32, num: int, clients: Clients, generator: np.random.Generator
) -> Int64:
    """Sizes as in "quantity", and each client draws its own p ~ Dirichlet(alpha C prior).

    Hsu, Qi and Brown 2019 (arXiv:1909.06335), section 3.1: p is drawn per client over the C classes
    around their frequencies ("prior"), rows are drawn by p without putting back, and a class that
    is used up is taken out of p. Their alpha is C times this one, so that on balanced data p is the
    Dirichlet(alpha, ..., alpha) of the other rules. Clients come in random order, since the last
    ones take what is left; counts are drawn systematically and off by one at most.
    """
    sizes = client_sizes(len(labels), num, clients, generator)
    groups = list(rows_of_classes(labels, generator))
    left = np.array([len(rows) for rows in groups], dtype=np.int64)
    prior = left / left.sum()
    alpha = min(clients.alpha, MAX_ALPHA / len(groups))  # else the prior would be cut off
    logs = dirichlet_logs(np.tile(alpha * len(groups) * prior, (num, 1)), generator)
    starts = generator.random(num)
    order = generator.permutation(num)
    table = np.zeros((len(groups), num), dtype=np.int64)
    for client in order.tolist():
        table[:, client] = drawn = take(int(sizes[client]), left, logs[client], starts[client])
        left -= drawn
    return spread(groups, table, order)


def take(size: int, left: Int64, logs: Float64, start: float) -> Int64:
    """``size`` rows by the shares behind ``logs`` [C], of each class at most what is ``left`` [C].

    What a used-up class cannot give is drawn from the others; each turn uses one up or is the last.
    """
    taken = np.zeros_like(left)
    while size:
        room = left - taken
        upper = np.cumsum(normalised(logs, room > 0))
        upper[np.flatnonzero(room)[-1] :] = 1.0
        wanted = np.diff(np.floor(upper * size + start).astype(np.int64), prepend=0)
        drawn = np.minimum(wanted, room)
        taken += drawn
        size -= int(drawn.sum())
    return taken


def spread(groups: list[Int64], table: Int64, order: Int64) -> Int64:
    """Client id of every row, from how many of each class (``groups`` of rows) each client gets.

    ``table`` is int64 [C, K]; rows of a class go to the clients in the given order.
    """
    client = np.empty(int(table.sum()), dtype=np.int64)
    for rows, counts in zip(groups, table, strict=True):
        client[rows] = np.repeat(order, counts[order])
    return client


def rows_of_classes(
    labels: Int32, generator: np.random.Generator, shuffle_classes: bool = False
) -> Iterator[Int64]:
    """The rows of each class that occurs, in random order within the class."""
    rows = generator.permutation(len(labels))
    rows = rows[np.argsort(labels[rows], kind="stable")]
    cuts = np.flatnonzero(np.diff(labels[rows])) + 1
    groups = np.split(rows, cuts)
    order = generator.permutation(len(groups)) if shuffle_classes else np.arange(len(groups))
    for i in order:
        yield groups[i]
