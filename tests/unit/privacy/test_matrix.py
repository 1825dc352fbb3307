"""Banded noise: its matrix, how far one client moves it, and its inverse row by row."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from fedtl.privacy.matrix import coefficients, correlated, sensitivity


def banded(bands: int, rounds: int) -> np.ndarray:
    matrix = np.zeros((rounds, rounds))
    for i, value in enumerate(coefficients(bands)[:rounds]):
        matrix += value * np.eye(rounds, k=-i)
    return matrix


def patterns(rounds: int, separation: int):
    """All sets of rounds in which one client may take part."""
    for size in range(1, rounds + 1):
        for chosen in itertools.combinations(range(rounds), size):
            if all(b - a >= separation for a, b in itertools.pairwise(chosen)):
                yield list(chosen)


def test_whole_matrix_is_the_square_root_of_prefix_sums() -> None:
    matrix = banded(12, 12)
    np.testing.assert_allclose(matrix @ matrix, np.tril(np.ones((12, 12))), atol=1e-12)
    np.testing.assert_array_equal(coefficients(1), [1.0])
    np.testing.assert_allclose(coefficients(4), [1, 1 / 2, 3 / 8, 5 / 16])


@pytest.mark.parametrize(
    ("rounds", "separation", "bands"),
    [(9, 3, 3), (9, 3, 2), (10, 3, 1), (8, 1, 4), (8, 2, 8), (9, 4, 6), (5, 7, 5), (1, 1, 1)],
)
def test_sensitivity_by_trying_everything(rounds: int, separation: int, bands: int) -> None:
    matrix = banded(bands, rounds)
    worst = 0.0
    for chosen in patterns(rounds, separation):
        worst = max(worst, float(np.linalg.norm(matrix[:, chosen].sum(axis=1))))
    found = sensitivity(coefficients(bands), rounds, separation)
    assert found == pytest.approx(worst, rel=1e-12)


@pytest.mark.parametrize("directions", [2, 5])
def test_no_updates_move_it_farther(directions: int) -> None:
    stream = np.random.default_rng(directions)
    bound, matrix = sensitivity(coefficients(3), 9, 3), banded(3, 9)
    for chosen in patterns(9, 3):
        units = stream.normal(size=(len(chosen), directions))
        units /= np.linalg.norm(units, axis=1, keepdims=True)
        assert np.linalg.norm(matrix[:, chosen] @ units) <= bound + 1e-12


def test_turns_apart_by_the_bands_share_no_round() -> None:
    column = float(coefficients(4) @ coefficients(4)) ** 0.5
    assert sensitivity(coefficients(4), 20, 4) == pytest.approx(column * 5**0.5)
    assert sensitivity(coefficients(1), 20, 4) == pytest.approx(5**0.5)  # no correlation


@pytest.mark.parametrize("bands", [1, 2, 5])
def test_rows_of_the_inverse(bands: int) -> None:
    rounds, width = 11, 3
    fresh = np.random.default_rng(bands).normal(size=(rounds, width))
    column = coefficients(bands)
    past = np.zeros((0, width))
    rows = []
    for noise in fresh:
        rows.append(correlated(noise, past, column))
        past = np.concatenate([rows[-1][None], past])[: bands - 1]
    np.testing.assert_allclose(rows, np.linalg.solve(banded(bands, rounds), fresh), atol=1e-12)


def test_correlated_noise_cancels_in_the_sum() -> None:
    """The sum over all rounds has less noise than independent noise of the same promise."""
    rounds, separation = 64, 16
    bands = coefficients(separation)
    inverse = np.linalg.inv(banded(separation, rounds))
    sums = np.tril(np.ones((rounds, rounds)))
    own = sensitivity(bands, rounds, separation) * np.linalg.norm(sums @ inverse)
    plain = sensitivity(coefficients(1), rounds, separation) * np.linalg.norm(sums)
    assert own < 0.6 * plain
