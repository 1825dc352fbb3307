"""What coins tell about epsilon: a lower bound from guesses about one run's head.

Steinke, Nasr and Jagielski 2023 (arXiv 2305.08846). Of m canaries each was in the training or not
by its own fair coin; whoever sees the head makes r guesses, v of them right. Under (epsilon, delta)
differential privacy with regard to one canary more or less, theorem 5.2 bounds the chance of v or
more by

    P[X >= v] + 2 m delta max_{1<=i<=v} P[v > X >= v - i] / i,   X ~ Bin(r, 1 / (1 + e^-epsilon)).

Every epsilon for which this is below 1 - confidence is refuted; the largest of them is the bound.

Pairs. The proof asks for no more than that turning one coin over changes the data to a neighbour's.
Where a coin chose which of two examples was trained on, turning it over takes one example out and
puts one in: two steps. A mechanism of (epsilon, delta) for one step is (2 epsilon,
(1 + e^epsilon) delta) for two (group privacy), so the chance above is taken at these, and the bound
is half as large.

What is guessed, and how often, must not depend on how the coins fell. ``audited`` is told the order
in which guesses are made and tries a few numbers of guesses fixed in advance; each gets its part of
the error (Bonferroni).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.special import bdtrc, gammaln

from fedtl.errors import InputError
from fedtl.types import Float64, Int64

Mask = npt.NDArray[np.bool_]

SHARES = (0.1, 0.3, 1.0)
"""Of the coins: numbers of guesses that are tried."""

FEWEST = 5
"""Guesses below which a share is left out, unless it is all there are: they could show little."""

HIGHEST = 64.0
"""No larger epsilon is told apart from infinity."""

STEPS = 40
"""Halvings of the interval in which the bound lies: 64 / 2^40 is left."""


@dataclass(frozen=True)
class LowerBound:
    """What guesses showed.

    Attributes:
        epsilon: refuted up to here, with ``confidence``; 0 where nothing is.
        guesses, correct: of the number of guesses that showed most.
        canaries: coins there were.
        most: what would have been shown, had every guess been right.
    """

    epsilon: float
    confidence: float
    canaries: int
    guesses: int
    correct: int
    most: float


def p_value(
    epsilon: float, *, canaries: int, guesses: int, correct: int, delta: float, pairs: bool = False
) -> float:
    """Greatest chance of so many right guesses under (epsilon, delta), in [0, 1].

    Args:
        epsilon: at least 0.
        canaries: m, coins there were.
        guesses: r, of them guessed at.
        correct: v, guessed right.
        delta: in [0, 1).
        pairs: a coin chose between two examples.

    Raises:
        InputError: counts that do not fit together.
    """
    if not 0 <= correct <= guesses <= canaries:
        raise InputError(
            "right guesses are some of the guesses, and these some of the canaries",
            got=f"{correct}, {guesses} and {canaries}",
        )
    if pairs:
        delta *= 1 + math.exp(epsilon)
        epsilon *= 2
    right = 1 / (1 + math.exp(-epsilon))
    chance = float(bdtrc(correct - 1, guesses, right))
    if delta > 0 and correct > 0:
        below = _binomial(np.arange(correct - 1, -1, -1), guesses, epsilon)
        steepest = (np.cumsum(below) / np.arange(1, correct + 1)).max()
        chance += 2 * canaries * delta * float(steepest)
    return min(1.0, chance)


def _binomial(successes: Int64, trials: int, logit: float) -> Float64:
    """P[X = k] for each k, X ~ Bin(trials, 1 / (1 + e^-logit)); quicker than scipy.stats."""
    ways = gammaln(trials + 1) - gammaln(successes + 1) - gammaln(trials - successes + 1)
    sure, wrong = np.logaddexp(0, -logit), np.logaddexp(0, logit)
    return np.asarray(np.exp(ways - successes * sure - (trials - successes) * wrong))


def lower_bound(
    *,
    canaries: int,
    guesses: int,
    correct: int,
    delta: float,
    error: float = 0.05,
    pairs: bool = False,
) -> float:
    """The largest epsilon that the guesses refute, at least 0.

    Args:
        error: chance that the bound is too high, in (0, 1).
        canaries, guesses, correct, delta, pairs: see ``p_value``.
    """

    def refuted(epsilon: float) -> bool:
        return (
            p_value(
                epsilon,
                canaries=canaries,
                guesses=guesses,
                correct=correct,
                delta=delta,
                pairs=pairs,
            )
            < error
        )

    low, high = 0.0, HIGHEST
    if not refuted(low):
        return 0.0
    for _ in range(STEPS):
        middle = (low + high) / 2
        low, high = (middle, high) if refuted(middle) else (low, middle)
    return low


def audited(
    scores: Float64,
    inside: Mask,
    *,
    delta: float,
    error: float = 0.05,
    pairs: bool = False,
    shares: Sequence[float] = SHARES,
) -> LowerBound:
    """The bound that scores give: the largest are guessed inside, the smallest outside.

    Args:
        scores: of each canary, float64 [m]; larger where the head looks more as if it was trained
            on; of a pair, above 0 where it looks as if the first was. Made without ``inside``.
        inside: how the coins fell, bool [m].
        delta, pairs: see ``p_value``.
        error: chance that the bound is too high, over all numbers of guesses together.
        shares: of the canaries guessed at; fixed before anything is looked at.

    Returns:
        The best over the numbers of guesses. A pair is guessed by the sign of its score, surest
        first. Scores of canaries may have an offset: of the guesses about some of them half are
        "inside", and all of them are cut in two where that divides the scores best.
    """
    count = len(scores)
    confidence = 1 - error
    if not count:
        return LowerBound(0.0, confidence, 0, 0, 0, 0.0)
    numbers = sorted({round(share * count) for share in shares})
    numbers = [number for number in numbers if number >= FEWEST] or [count]
    found = []
    for number in numbers:
        chosen, guess = _guessed(scores, number, pairs)
        correct = int((guess == inside[chosen]).sum())
        bounds = [
            lower_bound(
                canaries=count,
                guesses=number,
                correct=right,
                delta=delta,
                error=error / len(numbers),
                pairs=pairs,
            )
            for right in (correct, number)
        ]
        found.append(LowerBound(bounds[0], confidence, count, number, correct, bounds[1]))
    best = max(found, key=lambda bound: (bound.epsilon, bound.guesses))
    most = max(bound.most for bound in found)
    return LowerBound(best.epsilon, confidence, count, best.guesses, best.correct, most)


def _guessed(scores: Float64, number: int, pairs: bool) -> tuple[npt.NDArray[np.intp], Mask]:
    """Which coins are guessed at, and the guesses; equal scores in the order of the canaries."""
    if pairs:
        chosen = np.argsort(-np.abs(scores), kind="stable")[:number]
        return chosen, scores[chosen] > 0
    order = np.argsort(-scores, kind="stable")
    upper = (number + 1) // 2
    if number == len(scores):
        upper = _best_cut(scores[order])
    chosen = np.concatenate([order[:upper], order[len(order) - (number - upper) :]])
    return chosen, np.arange(number) < upper


def _best_cut(falling: Float64) -> int:
    """After how many of sorted scores the two parts' means differ most (Otsu 1979).

    Coins are fair: each part has a quarter of the scores at least.
    """
    count = len(falling)
    sizes = np.arange(1, count)
    above = np.cumsum(falling)[:-1]
    below = falling.sum() - above
    between = sizes * (count - sizes) * (above / sizes - below / (count - sizes)) ** 2
    least = count // 4
    allowed = between[max(0, least - 1) : count - max(1, least)]
    return max(1, least) + int(np.argmax(allowed)) if len(allowed) else (count + 1) // 2
