"""Every cell of the rule table, and who is told what in federations whose truth is known."""

from __future__ import annotations

import numpy as np
import pytest

from fedtl.evaluation.advice import ADVICE, Compared, Standing, advise, counsel
from fedtl.evaluation.significance import Pairs
from fedtl.scenario.schema import Verdict as Rule

TABLE = [
    # at home, everywhere, holds at home; tuned heads likewise; advice
    ((1, 1, True), [], "join"),
    ((1, 0, True), [(1, 1, True)], "join"),
    ((1, -1, True), [(-1, -1, False)], "join"),
    ((0, 1, True), [(1, 0, True)], "personalise"),
    ((0, -1, True), [(0, 0, True), (1, 0, True)], "personalise"),
    ((0, 1, True), [], "join"),
    ((0, 1, True), [(0, 1, True)], "join"),
    ((0, 1, True), [(-1, 1, False)], "join"),
    ((0, 1, False), [], "not enough evidence"),
    ((0, 1, False), [(0, 1, False)], "not enough evidence"),
    ((0, 1, False), [(0, 1, True)], "personalise"),
    ((0, 0, True), [(0, 1, True)], "personalise"),
    ((0, 0, True), [(0, 0, True)], "not enough evidence"),
    ((0, 0, True), [], "not enough evidence"),
    ((0, -1, True), [(0, 1, False)], "stay alone"),
    ((0, -1, True), [(0, 1, True)], "personalise"),
    ((-1, 1, False), [(1, -1, True)], "personalise"),
    ((-1, 1, False), [(0, 1, True)], "personalise"),
    ((-1, -1, False), [(0, 1, True)], "personalise"),
    ((-1, 1, False), [(0, 1, False)], "stay alone"),
    ((-1, 1, False), [(0, 0, True)], "stay alone"),
    ((-1, 1, False), [(-1, 1, False)], "stay alone"),
    ((-1, 1, False), [], "stay alone"),
]


@pytest.mark.parametrize(("federated", "tuned", "told"), TABLE)
def test_the_table(federated: tuple, tuned: list, told: str) -> None:
    assert advise(Standing(*federated), [Standing(*one) for one in tuned]) == told


def test_a_loss_that_is_not_certain_is_no_reason_to_join() -> None:
    everywhere = pairs([60] * 3, [2] * 3)
    federated = {"federated": Compared(pairs([4, 4, 4], [4, 5, 9]), everywhere)}  # 0, -1, -5 points
    found = counsel(np.arange(3), federated, Rule(), 0)
    assert found.effects == ("no evidence",) * 3
    assert found.advice == ("join", "join", "not enough evidence")
    wide = counsel(np.arange(3), federated, Rule(margin=0.05), 0)
    assert wide.advice == ("join",) * 3


def pairs(beats: list[int], loses: list[int], examples: int = 100) -> Pairs:
    return Pairs(np.array(beats), np.array(loses), np.full(len(beats), examples))


def test_each_client_is_told_by_its_own_evidence() -> None:
    federated = Compared(pairs([40, 0, 3, 3, 0], [2, 40, 3, 3, 30]), pairs([50] * 5, [2] * 5))
    tuned = Compared(pairs([40, 0, 40, 3, 2], [2, 30, 2, 3, 2]), pairs([40] * 5, [2] * 5))
    found = counsel(np.arange(5), {"federated": federated, "fine_tuned": tuned}, Rule(), 0)
    assert found.effects == ("gains", "harmed", "no evidence", "no evidence", "harmed")
    assert found.advice == ("join", "stay alone", "personalise", "join", "personalise")
    assert (found.home.p_holm >= found.home.p_value).all()


def test_where_own_heads_stayed_at_home_elsewhere_is_unknown() -> None:
    federated = Compared(pairs([3, 0], [3, 40]), None)
    tuned = Compared(pairs([3, 3], [3, 3]), None)
    found = counsel(np.arange(2), {"federated": federated, "fine_tuned": tuned}, Rule(), 0)
    assert found.advice == ("not enough evidence", "stay alone")


def test_a_client_without_tests_has_no_verdict_whatever_happens_elsewhere() -> None:
    home = Pairs(np.array([0, 30]), np.array([0, 1]), np.array([0, 90]))
    found = counsel(np.arange(2), {"federated": Compared(home, pairs([90, 90], [0, 0]))}, Rule(), 0)
    assert found.effects == (None, "gains")
    assert found.advice == (ADVICE[3], "join")
    assert np.isnan(found.home.p_holm[0])


def test_thresholds_are_the_scenarios() -> None:
    federated = {"federated": Compared(pairs([12], [3]), None)}  # +9 points, p = 0.035
    assert counsel(np.arange(1), federated, Rule(), 0).effects == ("gains",)
    assert counsel(np.arange(1), federated, Rule(level=0.01), 0).effects == ("no evidence",)
    assert counsel(np.arange(1), federated, Rule(margin=0.1), 0).effects == ("no evidence",)
    strict = Rule(test="bootstrap", draws=200, level=0.001)
    assert counsel(np.arange(1), federated, strict, 0).effects == ("no evidence",)


def test_more_clients_need_more_evidence_each() -> None:
    federated = {"federated": Compared(pairs([12] * 9, [3] * 9), None)}
    assert set(counsel(np.arange(9), federated, Rule(), 0).effects) == {"no evidence"}
