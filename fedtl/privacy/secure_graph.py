"""Who shares masks with whom: all with all (SecAgg), or each with few (SecAgg+).

Source: Bell, Bonawitz, Gascon, Lepoint and Raykova, "Secure Single-Server Aggregation with
(Poly)Logarithmic Overhead", CCS 2020, section 3: clients in a random order on a ring, each a
neighbour of the k/2 next to it on either side (a Harary graph). They bound the failure by a
Chernoff inequality; here the tail of the binomial distribution itself is summed.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from functools import cache
from math import comb

from fedtl.scenario.privacy import Privacy

Graph = Mapping[int, frozenset[int]]
"""The neighbours of each client, without itself."""

DROPOUTS = 0.1
FAILURE = 1e-6


@cache
def neighbours_for(num_clients: int, dropouts: float = DROPOUTS, failure: float = FAILURE) -> int:
    """The fewest neighbours k, even, with which a round is lost with at most this probability.

    It is lost where some client has fewer than t = ``shares_needed(k + 1)`` neighbours left. Where
    each drops out with probability ``dropouts`` by itself, the lost neighbours X of one client are
    binomial, and n P[X > k - t] bounds the probability for any of n clients. The same number
    bounds the chance that, of that share of clients colluding with the server at random, enough
    hold shares of the same client.

    Returns:
        n - 1 where only all with all is safe enough.
    """
    for degree in range(2, num_clients - 1, 2):
        spare = degree - shares_needed(degree + 1)
        lost = sum(
            comb(degree, count) * dropouts**count * (1.0 - dropouts) ** (degree - count)
            for count in range(spare + 1, degree + 1)
        )
        if num_clients * lost <= failure:
            return degree
    return max(0, num_clients - 1)


def asked_neighbours(section: Privacy, asked: int) -> int | None:
    """With how many others each of a round's clients shares masks; None: with all of them."""
    if section.secure_aggregation != "secagg_plus":
        return None
    return section.neighbours or neighbours_for(asked)


def shares_needed(holders: int) -> int:
    """More than half of the holders: no two sets of them can give away two different secrets."""
    return holders // 2 + 1


def ring_graph(order: Sequence[int], neighbours: int | None) -> Graph:
    """The graph of clients in a random order.

    Args:
        neighbours: of each; an odd number is raised by one. None, or as many as there are others:
            all with all.
    """
    count = len(order)
    half = count if neighbours is None else (neighbours + 1) // 2
    if 2 * half >= count - 1:
        everybody = frozenset(order)
        return {client: everybody - {client} for client in order}
    return {
        client: frozenset(order[(place + step) % count] for step in range(-half, half + 1) if step)
        for place, client in enumerate(order)
    }


def connected(graph: Graph, among: Collection[int]) -> bool:
    """Whether these clients hang together; else the sum of each part could be told apart."""
    left = set(among)
    front = {left.pop()} if left else set()
    while front:
        front = set().union(*(graph[client] for client in front)) & left
        left -= front
    return not left
