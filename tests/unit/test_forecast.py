"""What the plan says of the one reference that takes long."""

from __future__ import annotations

import pytest

from fedtl import machine
from fedtl.build import open_data
from fedtl.forecast import forecast
from fedtl.planning import scratch_rates
from fedtl.scenario.schema import Scenario
from fedtl.terminal import plan_table


def scenario(**evaluation) -> Scenario:
    return Scenario.model_validate(
        {
            "name": "planned",
            "rounds": 4,
            "clients": {"num": 3},
            "backbone": {"image_size": 64},
            "training": {"local_epochs": 2, "schedule": "cosine"},
            "evaluation": evaluation,
            "engine": {"device": "cpu", "threads": 2},
        }
    )


def test_from_scratch_is_in_the_plan_and_grows_with_its_epochs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(machine, "gpu_present", lambda: False)
    plans = {}
    for epochs in (None, 1, 3):
        asked = scenario(references=["from_scratch"], scratch_epochs=epochs)
        opened = open_data(asked)
        plans[epochs] = forecast(opened)
    assert [plan.scratch_epochs for plan in plans.values()] == [8, 1, 3]
    assert plans[1].scratch_seconds
    assert plans[3].scratch_seconds == pytest.approx(3 * plans[1].scratch_seconds)
    table = plan_table(opened, plans[3])
    assert any("from scratch about" in str(cell) for cell in table.columns[1].cells)
    without = forecast(open_data(scenario(references=["local_only"])))
    assert (without.scratch_epochs, without.scratch_seconds) == (0, 0.0)


def test_its_learning_rates_are_the_rounds_own() -> None:
    rates = scratch_rates(scenario())
    assert len(rates) == 8
    assert rates[0] == rates[1] == 0.05 > rates[2] > rates[7] > 0
    fewer = scratch_rates(scenario(scratch_epochs=3))
    assert len(fewer) == 3
    assert fewer[0] == rates[0]
    assert set(fewer) <= set(rates)
