"""One-run bounds: right for mechanisms of known epsilon, none where nothing is leaked."""

from __future__ import annotations

import math

import numpy as np
import pytest

from fedtl.errors import InputError
from fedtl.privacy.one_run import audited, lower_bound, p_value

TIMES = 200


def randomised_response(inside: np.ndarray, epsilon: float, rng: np.random.Generator) -> np.ndarray:
    """Each coin told truly with the probability that (epsilon, 0) allows; scores in [-1, 1]."""
    true = rng.random(len(inside)) < 1 / (1 + math.exp(-epsilon))
    return np.where(inside == true, 1.0, -1.0) * rng.uniform(0.5, 1, len(inside))


@pytest.mark.parametrize("pairs", [False, True])
def test_the_bound_holds_for_randomised_response(pairs: bool) -> None:
    epsilon, rng = 0.6, np.random.default_rng(5)
    bounds, doubled = [], []
    for _ in range(TIMES):
        inside = rng.random(400) < 0.5
        scores = randomised_response(inside, epsilon * (2 if pairs else 1), rng)
        bounds.append(audited(scores, inside, delta=0.0, pairs=pairs).epsilon)
        doubled.append(audited(scores, inside, delta=0.0).epsilon)
    assert np.mean(np.array(bounds) <= epsilon) >= 0.95
    assert np.median(bounds) > epsilon / 2  # not for want of power
    if pairs:  # whoever takes a pair for a single canary claims too much
        assert np.mean(np.array(doubled) <= epsilon) < 0.5


@pytest.mark.parametrize("pairs", [False, True])
def test_nothing_is_shown_where_nothing_is_leaked(pairs: bool) -> None:
    rng = np.random.default_rng(6)
    bounds = [
        audited(rng.normal(size=300), rng.random(300) < 0.5, delta=1e-5, pairs=pairs).epsilon
        for _ in range(TIMES)
    ]
    assert np.mean(np.array(bounds) == 0) >= 0.95


def test_perfect_guesses_show_the_most_there_is() -> None:
    inside = np.arange(100) % 2 == 0
    found = audited(np.where(inside, 1.0, -1.0), inside, delta=0.0)
    assert found.correct == found.guesses == found.canaries == 100
    assert found.epsilon == found.most > 2
    assert found.confidence == 0.95


def test_an_offset_of_the_scores_costs_nothing() -> None:
    inside = np.arange(200) % 2 == 0
    shifted = audited(np.where(inside, 1.0, -1.0) + 10, inside, delta=0.0)
    assert shifted.guesses == shifted.correct == 200


def test_guesses_about_all_are_cut_where_the_scores_part() -> None:
    inside = np.arange(100) < 37
    scores = np.where(inside, 0.0, -0.5) + np.random.default_rng(1).normal(0, 0.01, 100)
    found = audited(scores, inside, delta=0.0)
    assert found.guesses == found.correct == 100


def test_equal_scores_and_single_coins_show_nothing() -> None:
    rng = np.random.default_rng(0)
    assert audited(np.zeros(50), rng.random(50) < 0.5, delta=0.0).epsilon == 0
    one = audited(np.ones(1), np.ones(1, bool), delta=0.0)
    assert (one.epsilon, one.guesses, one.correct) == (0.0, 1, 1)
    assert audited(np.empty(0), np.empty(0, bool), delta=0.0).canaries == 0


def test_a_pair_is_two_steps_apart() -> None:
    counts = {"canaries": 300, "guesses": 100, "correct": 80}
    single = lower_bound(**counts, delta=0.0)
    assert lower_bound(**counts, delta=0.0, pairs=True) == pytest.approx(single / 2, abs=1e-9)
    wide = p_value(0.4, **counts, delta=1e-4 * (1 + math.exp(0.2)))
    assert p_value(0.2, **counts, delta=1e-4, pairs=True) == pytest.approx(wide, rel=1e-12)


def test_delta_lowers_the_bound_to_nothing() -> None:
    counts = {"canaries": 1000, "guesses": 100, "correct": 90}
    bounds = [lower_bound(**counts, delta=delta) for delta in (0.0, 1e-5, 1e-4, 1e-3, 0.1)]
    assert bounds == sorted(bounds, reverse=True)
    assert bounds[0] > 1
    assert bounds[-1] == 0


@pytest.mark.parametrize(("guesses", "correct"), [(10, 11), (11, 5), (5, -1)])
def test_counts_that_do_not_fit_are_refused(guesses: int, correct: int) -> None:
    with pytest.raises(InputError, match="right guesses"):
        p_value(1.0, canaries=10, guesses=guesses, correct=correct, delta=0.0)
