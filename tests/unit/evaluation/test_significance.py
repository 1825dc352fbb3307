"""Paired evidence: exact p-values, known false-positive rates, honest intervals."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import binom, binomtest

from fedtl.evaluation.significance import (
    Pairs,
    bootstrap,
    draws_needed,
    holm,
    intervals,
    mcnemar,
    weigh,
)
from fedtl.scenario.schema import Verdict as Rule


def pairs(beats, loses, examples) -> Pairs:
    return Pairs(*(np.atleast_1d(np.asarray(column)) for column in (beats, loses, examples)))


def test_mcnemar_is_the_exact_binomial_test() -> None:
    rng = np.random.default_rng(0)
    beats, loses = rng.integers(0, 40, (2, 50))
    wanted = [
        binomtest(one, one + two).pvalue if one + two else 1.0
        for one, two in zip(beats, loses, strict=True)
    ]
    found = mcnemar(pairs(beats, loses, np.full(50, 100)))
    np.testing.assert_allclose(found, wanted, rtol=1e-12)


def test_swapping_the_heads_turns_the_sign_and_keeps_the_p_value() -> None:
    for test in ("mcnemar", "bootstrap"):
        one = weigh(pairs([30, 4, 0], [9, 4, 0], [90, 50, 9]), Rule(test=test), 1)
        other = weigh(pairs([9, 4, 0], [30, 4, 0], [90, 50, 9]), Rule(test=test), 1)
        np.testing.assert_array_equal(one.p_value, other.p_value)
        np.testing.assert_array_equal(one.sign, -other.sign)
        np.testing.assert_array_equal(one.difference, -other.difference)
        assert one.sign.tolist() == [1, 0, 0]
        assert one.p_value[2] == 1  # heads that never differ


def slow_holm(p: list[float]) -> list[float]:
    """By the definition: the largest of (number left) times p so far, in the order of p."""
    order = sorted(range(len(p)), key=lambda i: p[i])
    corrected, so_far = [0.0] * len(p), 0.0
    for place, i in enumerate(order):
        so_far = max(so_far, min(1.0, (len(p) - place) * p[i]))
        corrected[i] = so_far
    return corrected


def test_holm_against_its_definition() -> None:
    rng = np.random.default_rng(1)
    for size in (1, 2, 7, 40):
        p = rng.random(size) ** 4
        p[rng.random(size) < 0.2] = 0.01  # ties
        np.testing.assert_allclose(holm(p), slow_holm(p.tolist()), rtol=1e-12)


def test_a_client_without_tests_is_undefined_and_costs_the_others_nothing() -> None:
    for test in ("mcnemar", "bootstrap"):
        found = weigh(pairs([8, 0], [0, 0], [20, 0]), Rule(test=test), 0)
        assert np.isnan([found.difference[1], found.p_value[1], found.p_holm[1]]).all()
        assert found.p_holm[0] == found.p_value[0]
        assert found.sign.tolist() == [1, 0]
    assert np.isnan(intervals(pairs([0], [0], [0]), Rule(), 0)).all()
    nobody = weigh(pairs([], [], []), Rule(), 0)
    assert len(nobody.p_holm) == 0


def test_a_certain_difference_below_the_margin_does_not_count() -> None:
    found = pairs([300], [150], [100_000])
    assert weigh(found, Rule(margin=0.01), 0).sign.tolist() == [0]
    assert weigh(found, Rule(margin=0.001), 0).sign.tolist() == [1]


@pytest.mark.parametrize("test", ["mcnemar", "bootstrap"])
def test_any_wrong_finding_is_as_rare_as_the_level_says(
    test: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Family-wise: 400 federations of ten clients, none of which has heads that differ."""
    # multipletests collects garbage at every call, which takes a tenth of a second
    monkeypatch.setattr("gc.collect", lambda *_: 0)
    rng, families, level = np.random.default_rng(2), 400, 0.1
    rule = Rule(test=test, level=level, margin=0, draws=300)
    examples = np.array([5, 12, 30, 30, 60, 100, 100, 200, 400, 0])
    wrong = 0
    for family in range(families):
        shares = rng.uniform(0.02, 0.3, len(examples))
        drawn = np.array(
            [rng.multinomial(n, [s, s, 1 - 2 * s]) for n, s in zip(examples, shares, strict=True)]
        )
        wrong += bool(weigh(pairs(drawn[:, 0], drawn[:, 1], examples), rule, family).sign.any())
    assert wrong <= binom.ppf(0.999, families, level)
    if test == "mcnemar":
        assert wrong > 0  # exact tests are cautious, not blind


def test_single_p_values_of_the_bootstrap_hold_their_level() -> None:
    rng, trials = np.random.default_rng(3), 1000
    drawn = rng.multinomial(80, [0.1, 0.1, 0.8], trials)
    p = bootstrap(pairs(drawn[:, 0], drawn[:, 1], np.full(trials, 80)), 300, 0)
    called = int((p <= 0.05).sum())
    assert binom.ppf(1e-3, trials, 0.02) <= called <= binom.ppf(0.999, trials, 0.05)


def test_a_real_difference_is_found() -> None:
    rng = np.random.default_rng(4)
    drawn = rng.multinomial(200, [0.15, 0.03, 0.82], 100)
    for test in ("mcnemar", "bootstrap"):
        some = pairs(drawn[:, 0], drawn[:, 1], np.full(100, 200))
        rule = Rule(test=test, draws=2000)
        assert (np.nan_to_num(weigh(some, rule, 0).p_value) <= 0.05).mean() > 0.9


def test_the_interval_covers_as_often_as_it_says() -> None:
    rng, trials = np.random.default_rng(5), 600
    drawn = rng.multinomial(200, [0.12, 0.07, 0.81], trials)
    found = intervals(
        pairs(drawn[:, 0], drawn[:, 1], np.full(trials, 200)), Rule(level=0.1, draws=400), 0
    )
    covered = int(((found[:, 0] <= 0.05) & (found[:, 1] >= 0.05)).sum())
    # nominal 90 %; percentiles of lattice differences may be off by two points at n = 200
    assert binom.ppf(0.001, trials, 0.88) <= covered <= binom.ppf(0.999, trials, 0.92)


def test_draws_are_seeded_by_the_row_alone() -> None:
    some = pairs([9, 9], [4, 4], [50, 50])
    alone = bootstrap(pairs([9], [4], [50]), 500, 7)
    assert bootstrap(some, 500, 7)[0] == alone[0]
    assert bootstrap(some, 500, 7).tolist() == bootstrap(some, 500, 7).tolist()


def test_too_few_draws_for_so_many_clients_are_noticed() -> None:
    rule = Rule(test="bootstrap", draws=2000)
    assert draws_needed(100, rule) is None
    assert draws_needed(101, rule) == 2019
    assert draws_needed(101, Rule()) is None
    p = np.full(101, 1 / 2020)
    assert holm(p)[0] <= 0.05 < holm(np.full(101, 1 / 2019))[0]


def test_the_average_client_is_as_certain_as_the_examples_allow() -> None:
    many = pairs([30] * 10, [10] * 10, [100] * 10)
    np.testing.assert_array_equal(many.average().beats, [30])
    np.testing.assert_array_equal(many.together().examples, [1000])
    assert mcnemar(many.average())[0] > mcnemar(many.together())[0]
