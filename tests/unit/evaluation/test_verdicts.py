"""The verdict says what the figures say, also when that is not "federate"."""

from __future__ import annotations

import numpy as np
import pytest

from fedtl.evaluation.advice import Compared, counsel
from fedtl.evaluation.metrics import PerClient
from fedtl.evaluation.references import Judgement
from fedtl.evaluation.significance import Pairs
from fedtl.evaluation.verdicts import HEADLINES, HEADLINES_AT_HOME, Verdict, give_verdict
from fedtl.scenario.schema import Verdict as Rule
from fedtl.types import ClientMetrics

EXAMPLES = 200

PAIRS = {"gain": (60, 20), "none": (20, 21), "loss": (20, 60)}
"""Examples of 200 that only the federated head has right, and only the own one."""


def judgement(own: list[float], everyone: float | None) -> Judgement:
    count, none = np.full(len(own), EXAMPLES), np.full(len(own), np.nan)
    right = np.nan_to_num(np.array(own)) * EXAMPLES
    sums = ClientMetrics(np.arange(len(own)), none, right.astype(np.int64)[:, None], count[:, None])
    facts = {
        "accuracy": float(np.nanmean(own)),
        "accuracy_everyone": everyone,
        "examples": EXAMPLES * len(own),
    }
    home = PerClient(count, none, np.array(own), none)
    return Judgement(np.arange(len(own)), facts, home, home, sums)


def pairs(beats: list[int], loses: list[int]) -> Pairs:
    return Pairs(np.array(beats), np.array(loses), np.full(len(beats), EXAMPLES))


def verdict(home: Pairs, everyone: Pairs | None, rule: Rule | None = None) -> Verdict:
    size, rule = len(home.beats), rule or Rule()
    compared = Compared(home, everyone)
    told = counsel(np.arange(size), {"federated": compared}, rule, 0)
    federated = judgement([0.8] * size, 0.8)
    alone = judgement([0.7] * size, None if everyone is None else 0.6)
    names = [f"client-{i}" for i in range(size)]
    return give_verdict(federated, alone, None, names, rule, 0, compared, told)


@pytest.mark.parametrize("home", list(PAIRS))
@pytest.mark.parametrize("everyone", list(PAIRS))
def test_the_headline_follows_from_both_comparisons(home: str, everyone: str) -> None:
    here, there = (pairs(*([count] * 2 for count in PAIRS[way])) for way in (home, everyone))
    found = verdict(here, there)
    assert found.headline == HEADLINES[home, everyone]
    assert found.lines[0].endswith("within noise.") == (home == "none")
    assert found.lines[1].endswith("within noise.") == (everyone == "none")
    assert found.home is not None
    assert found.everyone is not None
    assert (found.home.outcome, found.everyone.outcome) == (home, everyone)
    for one in (found.home, found.everyone):
        assert one.interval is not None
        assert one.interval[0] <= one.difference <= one.interval[1]


@pytest.mark.parametrize("home", list(PAIRS))
def test_heads_that_never_left_their_clients_are_judged_at_home_only(home: str) -> None:
    found = verdict(pairs(*([count] * 2 for count in PAIRS[home])), None)
    assert found.headline == HEADLINES_AT_HOME[home]
    assert "80.0 %; the clients' own heads stayed with them" in found.lines[1]
    assert found.everyone is None


def test_pairs_tell_what_accuracies_alone_cannot() -> None:
    # the same four points: of answers that hardly differ they are certain, of others they are not
    assert verdict(pairs([8], [0]), None).home.outcome == "gain"
    assert verdict(pairs([58], [50]), None).home.outcome == "none"


def test_many_clients_answers_to_the_same_examples_are_no_more_examples() -> None:
    # four points on the 200 tests of all: the same for one client and for ten
    one = verdict(pairs([20], [20]), pairs([28], [20]))
    ten = verdict(pairs([20] * 10, [20] * 10), pairs([28] * 10, [20] * 10))
    assert ten.everyone == one.everyone
    assert one.everyone.outcome == "none"
    # at home each client has tests of its own
    assert verdict(pairs([28] * 10, [20] * 10), None).home.outcome == "gain"
    assert verdict(pairs([28], [20]), None).home.outcome == "none"


def test_what_is_certain_and_small_is_called_so() -> None:
    found = verdict(pairs([8], [0]), None, Rule(margin=0.05))
    assert found.lines[0].endswith("+4.0 points, too small to count.")
    assert found.home.p_value < 0.05
    assert (found.better, found.similar) == (0, 1)


def test_clients_are_counted_as_they_are_advised() -> None:
    found = verdict(pairs([60, 2, 9, 9], [9, 60, 9, 9]), pairs([90, 90, 90, 9], [9, 9, 9, 9]))
    assert (found.better, found.worse, found.similar) == (1, 1, 2)
    assert found.effects == {"gains": 1, "no evidence": 2, "harmed": 1}
    assert found.advice == {
        "join": 2, "personalise": 0, "stay alone": 1, "not enough evidence": 1,
    }  # fmt: skip
    assert "Advice to the clients: join 2, personalise 0, stay alone 1" in "\n".join(found.lines)
    facts = found.as_facts()
    assert (facts["level"], facts["margin"], facts["test"]) == (0.05, 0.01, "mcnemar")
    assert facts["home"]["outcome"] == found.home.outcome


def test_too_few_draws_for_so_many_clients_are_told() -> None:
    rule = Rule(test="bootstrap", draws=200)
    some = pairs([60] * 12, [2] * 12)
    assert any("verdict.draws = 239" in line for line in verdict(some, None, rule).lines)
    assert not any("draws" in line for line in verdict(some, None).lines)


def test_best_worst_and_pooling() -> None:
    federated = judgement([0.9, 0.5, 0.80, np.nan], 0.8)
    pooled = judgement([0.9] * 4, 0.9)
    found = give_verdict(federated, None, pooled, list("abcd"), Rule(), 0)
    assert (found.best, found.worst) == (0, 1)
    text = "\n".join(found.lines)
    assert "Best client a 90.0 %, worst b 50.0 %" in text
    assert "16.7 points more than federating" in text


def test_without_references_it_still_says_something() -> None:
    found = give_verdict(judgement([0.5], 0.5), None, None, ["a"], Rule(), 0)
    assert "50.0 %" in found.headline
    assert found.advice is None


def test_nothing_judged_is_undefined_not_zero() -> None:
    nothing = judgement([0.5], 0.5)
    nothing.own.accuracy[0] = np.nan
    nothing.facts["accuracy"] = nothing.facts["accuracy_everyone"] = None
    none = Pairs(*(np.zeros(1, np.int64) for _ in range(3)))
    compared = Compared(none, none)
    told = counsel(np.arange(1), {"federated": compared}, Rule(), 0)
    found = give_verdict(nothing, nothing, nothing, ["a"], Rule(), 0, compared, told)
    assert found.best is None
    assert (found.home.difference, found.home.interval, found.home.p_value) == (None, None, None)
    assert "undefined" in found.lines[0]
    assert found.advice == {
        "join": 0, "personalise": 0, "stay alone": 0, "not enough evidence": 1,
    }  # fmt: skip
