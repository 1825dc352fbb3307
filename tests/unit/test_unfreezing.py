"""Which part of the network is trained in which round, and what a request may ask of training."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from fedtl.engines.protected import flaw_of
from fedtl.planning import local_training, training_at_end
from fedtl.plans import RoundPlan
from fedtl.scenario.schema import Scenario
from fedtl.types import TAIL, LocalTraining


def scenario(**transfer: Any) -> Scenario:
    return Scenario.model_validate(
        {"name": "cut", "data": {"source": "folder", "path": "pictures"}, "transfer": transfer}
    )


def opened(**transfer: Any) -> list[tuple[tuple[str, ...], int]]:
    asked = scenario(**{"mode": "last_blocks", **transfer})
    trainings = [local_training(asked, round) for round in range(1, 8)]
    return [(training.still, training.unfrozen) for training in trainings]


def test_the_head_warms_up_then_blocks_open_from_the_back() -> None:
    shut, all_open = ((TAIL,), 0), ((), 0)
    assert opened() == [all_open] * 7
    assert opened(warmup_rounds=2) == [shut] * 2 + [all_open] * 5
    opening = [((), n) for n in (1, 1, 2, 2, 3)]
    assert opened(warmup_rounds=2, unfreeze_every=2) == [shut] * 2 + opening


def test_after_the_last_round_clients_train_what_was_open_then_at_the_first_rate() -> None:
    asked = scenario(mode="last_blocks", warmup_rounds=2, unfreeze_every=2)
    asked = asked.model_copy(update={"rounds": 5})
    training = asked.training.model_copy(update={"schedule": "cosine"})
    asked = asked.model_copy(update={"training": training})
    first, last, end = local_training(asked, 1), local_training(asked, 5), training_at_end(asked)
    assert first.learning_rate > last.learning_rate
    assert end == replace(last, learning_rate=first.learning_rate)
    assert (end.still, end.unfrozen) == ((), 2)


def test_rates_and_pulls_are_those_behind_the_cut() -> None:
    behind = local_training(scenario(mode="full", rate_factor=0.1, l2_pretrained=0.5), 1)
    assert (behind.tail_rate, behind.l2_pretrained) == (0.1, 0.5)
    assert local_training(scenario(), 1) == replace(
        behind, tail_rate=1.0, l2_pretrained=0.0, still=(), unfrozen=0
    )


@pytest.mark.parametrize(
    "wrong",
    [
        {"still": (1,)},
        {"unfrozen": -1},
        {"dropout": 1.0},
        {"validation_fraction": 1.5},
        {"label_smoothing": -0.1},
        {"mixup": -1.0},
        {"tail_rate": float("inf")},
        {"l2_pretrained": -1.0},
        {"noise": -1.0},
        {"early_stopping": -1},
    ],
)
def test_a_request_for_impossible_training_is_refused(wrong: dict[str, Any]) -> None:
    nobody = np.empty(0, np.int64)
    fine = LocalTraining(1, 8, 0.1, still=(TAIL,), unfrozen=2, dropout=0.5)
    plan = RoundPlan(1, nobody, nobody.astype(np.uint64), fine)
    assert flaw_of(plan) is None
    found = flaw_of(replace(plan, training=replace(fine, **wrong)))
    assert found is not None
    assert found.startswith("its training")
