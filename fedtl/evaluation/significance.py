"""Is one head better than another on the same test examples? Paired evidence, client by client.

Of two heads that answer the same examples only two counts matter: how often the first alone is
right (``beats``) and how often the second alone (``loses``). From them follow McNemar's exact test
(McNemar 1947; the binomial form, two-sided) and the paired bootstrap, where (beats, loses, ties) is
multinomial. No single answer has to leave a client. Over several clients the p-values are Holm's
(1979): the chance of any wrong finding among them stays below the level.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from scipy.special import bdtr

from fedtl import seeding
from fedtl.scenario.schema import Verdict as Rule
from fedtl.types import Float64, Int64


@dataclass(frozen=True)
class Pairs:
    """Discordant answers of one head against another, a row per client.

    Attributes:
        beats, loses: examples that only the first, and only the second, has right; int64 [k].
        examples: that both judged, int64 [k]; where it is 0 everything is undefined.
    """

    beats: Int64
    loses: Int64
    examples: Int64

    def together(self) -> Pairs:
        """All clients' examples as one row."""
        return Pairs(*(column.sum(keepdims=True) for column in vars(self).values()))

    def average(self) -> Pairs:
        """The average client, where all judged the same examples: one row.

        Its certainty is that of the examples, however many clients answered them: as if the
        clients' own heads erred on the same ones, which is cautious.
        """
        if not len(self.examples):
            return self.together()
        return Pairs(*(np.rint([column.mean()]).astype(np.int64) for column in vars(self).values()))


@dataclass(frozen=True)
class Evidence:
    """What pairs of answers say, a row per client; NaN where there are no examples.

    Attributes:
        difference: accuracy of the first head minus that of the second, float64 [k].
        p_value: that heads which are equally good differ at least so much, float64 [k].
        p_holm: the same, corrected for the number of clients.
        sign: 1 where the first head is clearly better, -1 where clearly worse, else 0; int64 [k].
    """

    difference: Float64
    p_value: Float64
    p_holm: Float64
    sign: Int64


def weigh(pairs: Pairs, rule: Rule, seed: int) -> Evidence:
    """Which clients' differences count, by the scenario's ``[verdict]``.

    Clear is what is certain (``p_holm`` at most ``level``) and large enough to matter (at least
    ``margin``).

    Args:
        seed: of the bootstrap's draws.
    """
    known = pairs.examples > 0
    whole = np.where(known, pairs.examples, 1)
    difference = np.where(known, (pairs.beats - pairs.loses) / whole, np.nan)
    p_value = mcnemar(pairs) if rule.test == "mcnemar" else bootstrap(pairs, rule.draws, seed)
    p_holm = holm(p_value)
    with np.errstate(invalid="ignore"):
        clear = (p_holm <= rule.level) & (np.abs(difference) >= rule.margin)
    return Evidence(
        difference, p_value, p_holm, np.where(clear, np.sign(difference), 0).astype(int)
    )


def mcnemar(pairs: Pairs) -> Float64:
    """Exact two-sided p-values, float64 [k]: of the discordant answers each is a fair coin."""
    fewer = np.minimum(pairs.beats, pairs.loses).astype(np.float64)
    p_value = np.minimum(1.0, 2 * bdtr(fewer, pairs.beats + pairs.loses, 0.5))
    return np.where(pairs.examples > 0, p_value, np.nan)


def bootstrap(pairs: Pairs, draws: int, seed: int) -> Float64:
    """Two-sided p-values of the accuracy difference by resampling under no difference, float64 [k].

    Discordant answers are drawn as often as they were seen, for either head alike (Efron and
    Tibshirani 1993, chapter 16); the smallest p-value there is, is 1 / (draws + 1).

    Args:
        draws: resamples.
        seed: row i draws from stream (seed, "bootstrap", i).
    """
    half = (pairs.beats + pairs.loses) / 2
    p_value = np.full(len(half), np.nan)
    for i, drawn in _resampled(half, half, pairs.examples, draws, seed):
        extreme = int((np.abs(drawn) >= abs(int(pairs.beats[i] - pairs.loses[i]))).sum())
        p_value[i] = (extreme + 1) / (draws + 1)
    return p_value


def intervals(pairs: Pairs, rule: Rule, seed: int) -> Float64:
    """Percentile bootstrap intervals of the accuracy differences, float64 [k, 2].

    They cover with probability 1 - ``level`` each, where discordant answers are not too few: of
    none the interval is a point.
    """
    found = np.full((len(pairs.examples), 2), np.nan)
    ends = [rule.level / 2, 1 - rule.level / 2]
    for i, drawn in _resampled(pairs.beats, pairs.loses, pairs.examples, rule.draws, seed):
        found[i] = np.quantile(drawn, ends) / pairs.examples[i]
    return found


def holm(p_value: Float64) -> Float64:
    """Holm's step-down correction over the defined p-values (Holm 1979); NaN stays NaN."""
    from statsmodels.stats.multitest import multipletests  # type: ignore[import-untyped]

    corrected = p_value.copy()
    known = np.isfinite(p_value)
    if known.sum() > 1:  # one alone stays as it is
        corrected[known] = multipletests(p_value[known], method="holm")[1]
    return corrected


def draws_needed(num_clients: int, rule: Rule) -> int | None:
    """Draws below which Holm's correction lets the bootstrap find nothing, or None if it can."""
    needed = int(np.ceil(num_clients / rule.level)) - 1
    return needed if rule.test == "bootstrap" and rule.draws < needed else None


def _resampled(
    beats: Float64 | Int64, loses: Float64 | Int64, examples: Int64, draws: int, seed: int
) -> Iterator[tuple[int, Int64]]:
    """Row by row, where there are examples: ``draws`` differences beats* - loses*."""
    for i in np.flatnonzero(examples > 0).tolist():
        n = int(examples[i])
        first, second = beats[i] / n, loses[i] / n
        shares = [first, second, max(0.0, 1 - first - second)]
        drawn = seeding.generator(seed, "bootstrap", i).multinomial(n, shares, draws)
        yield i, drawn[:, 0] - drawn[:, 1]
