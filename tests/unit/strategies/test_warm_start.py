"""A closed-form start loses nothing of either strategy."""

from __future__ import annotations

import numpy as np
import pytest

from fedtl.strategies import STRATEGIES
from fedtl.strategies.closed_form import Fed3R
from fedtl.strategies.warm_start import WarmStart

HEAD = {"weight": np.zeros((3, 4), np.float32), "bias": np.zeros(3, np.float32)}
REQUIRED = {"fltrust": {"root": 0}, "flower": {"class_": "FedAdam"}}
LATER = [name for name, build in STRATEGIES.items() if not hasattr(build, "absorb")]


@pytest.mark.parametrize("name", LATER)
def test_the_slots_of_both_are_kept_apart(name: str) -> None:
    then = STRATEGIES[name](**REQUIRED.get(name, {}))
    warm = WarmStart(Fed3R(), then)
    state = warm.init(HEAD, 5)
    for mine, theirs in (
        (warm._sums(state).slots, Fed3R().init(HEAD, 5).slots),
        (warm._own(state).slots, then.init(HEAD, 5).slots),
    ):
        assert {n: t.shape for n, t in mine.items()} == {n: t.shape for n, t in theirs.items()}
