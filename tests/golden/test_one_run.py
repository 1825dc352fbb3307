"""Published values of the one-run audit, Steinke, Nasr and Jagielski 2023."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import binom

from fedtl.privacy.one_run import lower_bound, p_value

PUBLISHED = [
    ({"canaries": 1_000, "guesses": 100, "correct": 75, "delta": 1e-4}, 0.67298),
    ({"canaries": 100_000, "guesses": 1_510, "correct": 1_439, "delta": 1e-5}, 2.67585),
]


@pytest.mark.parametrize(("counts", "epsilon"), PUBLISHED)
def test_bounds_of_the_paper(counts: dict[str, float], epsilon: float) -> None:
    assert lower_bound(**counts, error=0.05) == pytest.approx(epsilon, abs=1e-5)


@pytest.mark.parametrize(("counts", "epsilon"), PUBLISHED)
def test_copies_without_the_term_of_delta_promise_too_much(
    counts: dict[str, float], epsilon: float
) -> None:
    mutant = lower_bound(**{**counts, "delta": 0.0}, error=0.05)
    assert mutant > epsilon + 0.02


@pytest.mark.parametrize("epsilon", [0.0, 0.3, 1.7])
@pytest.mark.parametrize(("guesses", "correct"), [(12, 0), (12, 7), (12, 12)])
def test_p_value_is_the_theorem_written_out(epsilon: float, guesses: int, correct: int) -> None:
    canaries, delta = 20, 1e-3
    law = binom(guesses, 1 / (1 + np.exp(-epsilon)))
    chances = [law.pmf(k) for k in range(guesses + 1)]
    tail = sum(chances[correct:])
    steepest = max(
        [sum(chances[k] for k in range(correct - i, correct)) / i for i in range(1, correct + 1)],
        default=0.0,
    )
    expected = min(1.0, tail + 2 * canaries * delta * steepest)
    found = p_value(epsilon, canaries=canaries, guesses=guesses, correct=correct, delta=delta)
    assert found == pytest.approx(expected, rel=1e-12)
