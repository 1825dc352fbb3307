"""The verdict says what the figures say, also when that is not "federate"."""

import numpy as np
import pytest

from fedtl.evaluation.references import Judgement
from fedtl.evaluation.verdicts import give_verdict

EXAMPLES = 200


def judgement(own: list[float], everyone: float) -> Judgement:
    facts = {
        "accuracy": float(np.nanmean(own)),
        "accuracy_everyone": everyone,
        "examples": EXAMPLES * len(own),
    }
    size = len(own)
    return Judgement(
        np.arange(size), facts, np.array(own), np.full(size, EXAMPLES), np.full(size, everyone)
    )


@pytest.mark.parametrize(
    ("federated", "alone", "says"),
    [
        (([0.9, 0.9], 0.9), ([0.7, 0.7], 0.5), "Federating pays"),
        (([0.8, 0.8], 0.8), ([0.95, 0.95], 0.4), "It depends"),
        (([0.8, 0.8], 0.8), ([0.95, 0.95], 0.9), "Stay alone"),
        (([0.9, 0.9], 0.9), ([0.9, 0.905], 0.5), "No clear difference at home"),
        (([0.9, 0.9], 0.9), ([0.9, 0.905], 0.9), "Not enough evidence"),
    ],
)
def test_headlines(federated, alone, says: str) -> None:
    verdict = give_verdict(judgement(*federated), judgement(*alone), None, ["a", "b"])
    assert says in verdict.headline


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
    nothing.own[0] = np.nan
    nothing.facts["accuracy"] = None
    verdict = give_verdict(nothing, nothing, nothing, ["a"])
    assert verdict.best is None
    assert "undefined" in "\n".join(verdict.lines)
