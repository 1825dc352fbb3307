"""What the gate kept back is told in numbers, and an empty sum is refused."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from fedtl.errors import PolicyStop
from fedtl.scenario.privacy import Privacy
from fedtl.strategies.base import ServerState
from fedtl.strategies.class_gate import kept_back


def told(counts: Any, least: int = 4, mechanism: str = "none", reported: Any = (1, 1, 0)):
    given = {"epsilon": 1.0} if mechanism != "none" else {}
    privacy = Privacy.model_validate(
        {"min_class_examples": least, "mechanism": mechanism, "unit": "client", **given}
    )
    scenario: Any = SimpleNamespace(privacy=privacy)
    roster: Any = SimpleNamespace(train=np.array([10, 20, 40]))
    slots = {"counts": np.array(counts), "reported": np.array(reported)}
    return kept_back(scenario, roster, ServerState({}, slots))


def test_the_examples_that_stayed_are_counted_of_those_who_reported() -> None:
    (line,) = told([12, 0, 9])
    assert line.endswith(
        "fewer than 4 examples stayed at that client: 9 of 30 examples are not in the head"
    )
    (by_client,) = told([[8, 0, 0], [0, 0, 20], [0, 0, 0]])  # as FedCOF keeps them
    assert "2 of 30" in by_client


def test_nothing_is_told_where_nothing_was_asked() -> None:
    assert told([12, 0, 9], least=1) == []
    assert told([0, 0, 0], reported=(0, 0, 0)) == []


def test_under_differential_privacy_the_number_is_not_told() -> None:
    (line,) = told([12, 0, 9], mechanism="release")
    assert "not told" in line
    assert not any(part.isdigit() for part in line.replace("fewer than 4", "").split())


def test_an_empty_sum_is_refused() -> None:
    with pytest.raises(PolicyStop, match="no client has 4 examples of any class") as stop:
        told([0, 0, 0])
    assert stop.value.where == "privacy.min_class_examples"
