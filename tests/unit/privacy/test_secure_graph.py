from __future__ import annotations

from math import comb

import numpy as np
import pytest

from fedtl.privacy.secure_graph import connected, neighbours_for, ring_graph, shares_needed


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 9, 10, 31])
@pytest.mark.parametrize("neighbours", [None, 1, 2, 3, 4, 7, 8, 30])
def test_everybody_has_as_many_neighbours(count: int, neighbours: int | None) -> None:
    order = np.random.default_rng(count).permutation(count * 3)[:count].tolist()
    graph = ring_graph(order, neighbours)
    even = count - 1 if neighbours is None else min(count - 1, neighbours + neighbours % 2)
    assert set(graph) == set(order)
    for client, others in graph.items():
        assert client not in others
        assert len(others) == even
        assert all(client in graph[other] for other in others)
    assert connected(graph, order)


def test_neighbours_stand_next_to_each_other() -> None:
    graph = ring_graph([7, 3, 9, 1, 5, 8], 2)
    assert graph[7] == {3, 8}
    assert graph[1] == {9, 5}


def test_what_hangs_together() -> None:
    graph = ring_graph(range(8), 2)
    assert connected(graph, {0, 1, 2})
    assert connected(graph, {7, 0, 1})
    assert not connected(graph, {0, 1, 3, 4})
    assert connected(ring_graph(range(8), 4), {0, 1, 3, 4})
    assert connected(graph, {4})
    assert connected(graph, set())


def test_no_two_majorities_of_holders_are_apart() -> None:
    for holders in range(1, 100):
        assert 2 * shares_needed(holders) > holders >= shares_needed(holders)
        assert 2 * (shares_needed(holders) - 1) <= holders


@pytest.mark.parametrize("count", [2, 10, 28, 50, 100, 1000, 10_000])
def test_the_fewest_neighbours_that_a_tenth_of_dropouts_leaves_enough(count: int) -> None:
    def lost(degree: int) -> float:
        """Summed from the other end: at most k/2 of k stay."""
        stay = range(degree // 2 + 1)
        return count * sum(comb(degree, s) * 0.9**s * 0.1 ** (degree - s) for s in stay)

    found = neighbours_for(count)
    if found < count - 1:
        assert found % 2 == 0
        assert lost(found) <= 1e-6 < lost(found - 2)
    else:
        assert all(lost(degree) > 1e-6 for degree in range(2, count - 1, 2))


def test_drawn_dropouts_are_within_the_bound() -> None:
    """A looser failure, so that some are seen: their share is below it, and not far below."""
    count, failure, rounds = 60, 0.05, 2000
    degree = neighbours_for(count, failure=failure)
    graph = ring_graph(range(count), degree)
    random, lost = np.random.default_rng(3), 0
    adjacent = np.zeros((count, count), int)
    for client, others in graph.items():
        adjacent[client, list(others)] = 1
    for _ in range(rounds):
        alive = random.random(count) >= 0.1
        lost += bool((adjacent @ alive < shares_needed(degree + 1)).any())
    # The bound holds in expectation; 4.5 deviations of the count are allowed above it.
    assert 0 < lost <= failure * rounds + 4.5 * (failure * rounds) ** 0.5
