"""The verdict says what the figures say, also when that is not "federate"."""

import numpy as np
import pytest

from fedtl.evaluation.metrics import PerClient
from fedtl.evaluation.references import Judgement
from fedtl.evaluation.verdicts import HEADLINES, HEADLINES_AT_HOME, compare, give_verdict

EXAMPLES = 200


def judgement(own: list[float], everyone: float) -> Judgement:
    facts = {
        "accuracy": float(np.nanmean(own)),
        "accuracy_everyone": everyone,
        "examples": EXAMPLES * len(own),
        "examples_everyone": EXAMPLES * len(own),
    }
    count, none = np.full(len(own), EXAMPLES), np.full(len(own), np.nan)
    home = PerClient(count, none, np.array(own), none)
    abroad = PerClient(count, none, np.full(len(own), everyone), none)
    return Judgement(np.arange(len(own)), facts, home, abroad)


LEVEL = {"gain": (0.9, 0.7), "none": (0.9, 0.905), "loss": (0.7, 0.9)}


@pytest.mark.parametrize("home", list(LEVEL))
@pytest.mark.parametrize("everyone", list(LEVEL))
def test_the_headline_follows_from_both_comparisons(home: str, everyone: str) -> None:
    federated = judgement([LEVEL[home][0]] * 2, LEVEL[everyone][0])
    alone = judgement([LEVEL[home][1]] * 2, LEVEL[everyone][1])
    verdict = give_verdict(federated, alone, None, ["a", "b"])
    assert verdict.headline == HEADLINES[home, everyone]
    assert verdict.lines[0].endswith("within noise.") == (home == "none")
    assert verdict.lines[1].endswith("within noise.") == (everyone == "none")


@pytest.mark.parametrize("home", list(LEVEL))
def test_heads_that_never_left_their_clients_are_judged_at_home_only(home: str) -> None:
    federated, alone = judgement([LEVEL[home][0]] * 2, 0.8), judgement([LEVEL[home][1]] * 2, 0.0)
    alone.facts["accuracy_everyone"] = None
    verdict = give_verdict(federated, alone, None, ["a", "b"])
    assert verdict.headline == HEADLINES_AT_HOME[home]
    assert "80.0 %; the clients' own heads stayed with them" in verdict.lines[1]


def test_small_samples_are_not_clear() -> None:
    # two right against two wrong happens to equal heads one time in eight
    assert compare(np.array([1.0]), np.array([0.0]), np.array([2])).tolist() == [0]
    assert compare(np.array([1.0]), np.array([0.0]), np.array([5])).tolist() == [1]


def test_equal_heads_are_seldom_called_different() -> None:
    rng = np.random.default_rng(0)
    for examples in (5, 20, 100):
        for p in (0.5, 0.9, 0.99):
            a, b = rng.binomial(examples, p, (2, 20_000)) / examples
            called = compare(a, b, np.full(20_000, examples)) != 0
            assert called.mean() < 0.065  # nominal 4.55 %


def test_everybodys_sample_has_its_own_size() -> None:
    federated, alone = judgement([0.9] * 2, 0.80), judgement([0.9] * 2, 0.77)
    assert "within noise" in give_verdict(federated, alone, None, ["a", "b"]).lines[1]
    for one in (federated, alone):
        one.facts["examples_everyone"] = 100_000
    assert "within noise" not in give_verdict(federated, alone, None, ["a", "b"]).lines[1]


def test_clients_are_counted_with_their_noise() -> None:
    federated, alone = [0.9, 0.5, 0.80, np.nan], [0.7, 0.7, 0.805, 0.9]
    verdict = give_verdict(
        judgement(federated, 0.8), judgement(alone, 0.6), judgement([0.9] * 4, 0.9), list("abcd")
    )
    assert (verdict.better, verdict.worse, verdict.similar) == (1, 1, 1)
    assert (verdict.best, verdict.worst) == (0, 1)
    text = "\n".join(verdict.lines)
    assert "Best client a 90.0 %, worst b 50.0 %" in text
    assert "16.7 points more than federating" in text


def test_without_references_it_still_says_something() -> None:
    verdict = give_verdict(judgement([0.5], 0.5), None, None, ["a"])
    assert "50.0 %" in verdict.headline


def test_nothing_judged_is_undefined_not_zero() -> None:
    nothing = judgement([0.5], 0.5)
    nothing.own.accuracy[0] = np.nan
    nothing.facts["accuracy"] = None
    verdict = give_verdict(nothing, nothing, nothing, ["a"])
    assert verdict.best is None
    assert "undefined" in "\n".join(verdict.lines)
