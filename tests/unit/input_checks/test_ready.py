"""What ready features are looked at for."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from fedtl.build import open_data, population_of
from fedtl.clients.alignment import align
from fedtl.evaluation.quick_head import accuracy, quick_answers
from fedtl.input_checks import check_inputs
from fedtl.ready_features import OpenedData, make_features
from fedtl.scenario.schema import Scenario


def opened(x: Any, tmp_path: Any) -> OpenedData:
    """Three clients with 100 rows each."""
    y, client = np.arange(300) % 3, np.repeat(["a", "b", "c"], 100)
    np.savez(tmp_path / "x.npz", x=x.astype(np.float32), y=y, client=client)
    scenario = Scenario.model_validate(
        {
            "name": "ready",
            "data": {"source": "arrays", "path": str(tmp_path / "x.npz"), "leakage": "allow"},
            "clients": {"partition": "natural"},
            "backbone": {"name": "identity"},
        }
    )
    return open_data(scenario)


def told(x: Any, tmp_path: Any, *, measure: bool = True) -> list[dict[str, Any]]:
    data = opened(x, tmp_path)
    return check_inputs(data, make_features(data), 1, lambda: None, measure=measure)


@pytest.fixture
def x() -> Any:
    rng = np.random.default_rng(2)
    x = rng.normal(size=(300, 6))
    x[np.arange(300), np.arange(300) % 3] += 2
    return x


def test_sound_features_are_left_in_peace(x: Any, tmp_path: Any) -> None:
    assert told(x, tmp_path) == []


def test_a_constant_column_is_a_note(x: Any, tmp_path: Any) -> None:
    x[:, 4] = 7
    (one,) = told(x, tmp_path)
    assert one["what"].startswith("1 of 6 features are the same")
    assert (one["severity"], one["gain"]) == ("note", None)


def test_units_are_told_and_what_scaling_gains(x: Any, tmp_path: Any) -> None:
    x[:, 5] *= 1e4
    (one,) = told(x, tmp_path)
    assert "differ in scale" in one["what"]
    assert one["severity"] == "warning"
    assert one["gain"] > 0.2, "ridge leans on the one large column and sees nothing else"
    assert "p = " in one["gain_note"]
    (unmeasured,) = told(x, tmp_path, measure=False)
    assert (unmeasured["gain"], unmeasured["gain_note"]) == (None, "Not measured.")


def test_a_client_in_another_unit_is_named(x: Any, tmp_path: Any) -> None:
    x[200:] *= 20
    (one,) = told(x, tmp_path)
    assert one["clients"] == ["c"]
    assert 'adaptation.features = "standardise"' in one["change"]
    assert one["gain"] is not None


def test_everything_constant_is_no_crash(tmp_path: Any) -> None:
    (one,) = told(np.ones((300, 3)), tmp_path)
    assert one["what"].startswith("3 of 3 features")


def test_standardising_is_tried_with_the_statistics_of_a_run(x: Any, tmp_path: Any) -> None:
    """All of a client's training rows make its map, whatever is in the sample."""
    x[200:] *= 20
    (one,) = told(x, tmp_path)
    features = make_features(opened(x, tmp_path))
    people, _ = align(population_of(features), "standardise")
    before, after = (accuracy(quick_answers(own)) for own in (population_of(features), people))
    assert before is not None
    assert after is not None
    assert one["gain"] == pytest.approx(after - before)
