"""Candidates are compared on the same pictures; who cannot be run is told, not a crash."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from fedtl.backbone_choice import pareto, parse_candidate, rank_backbones
from fedtl.build import open_data, population_of
from fedtl.errors import InputError
from fedtl.evaluation.quick_head import accuracy, quick_answers
from fedtl.interrupts import Interrupts
from fedtl.ready_features import make_features
from fedtl.scenario.schema import Backbone, Scenario

NETWORK = "squeezenet1_1"


@pytest.fixture
def scenario(tmp_path: Path) -> Scenario:
    rng = np.random.default_rng(1)
    for name, level in (("dim", 70), ("bright", 150)):
        (tmp_path / "pictures" / name).mkdir(parents=True)
        for i in range(15):
            pixels = rng.normal(level, 60, (40, 40, 3)).clip(0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(tmp_path / "pictures" / name / f"{i}.png")
    return Scenario.model_validate(
        {
            "name": "choice",
            "data": {"source": "folder", "path": str(tmp_path / "pictures")},
            "clients": {"num": 2},
            "backbone": {"name": NETWORK, "weights": "none", "image_size": 64},
        }
    )


def rank(scenario: Scenario, *names: str, out: Path | None = None) -> tuple[dict[str, Any], str]:
    told = io.StringIO()
    console = Console(file=told, width=80)
    facts = rank_backbones(scenario, names, "choice", console, Interrupts(), out=out)
    return facts, told.getvalue()


def test_one_table_of_what_can_be_run_and_why_the_rest_cannot(
    scenario: Scenario, tmp_path: Path
) -> None:
    names = [NETWORK, f"{NETWORK}:32", f"alexnet@{tmp_path / 'missing.pth'}"]
    facts, told = rank(scenario, *names, out=tmp_path / "ranked.json")
    assert json.loads((tmp_path / "ranked.json").read_text()) == facts
    rows = {row["name"]: row for row in facts["backbones"]}
    assert set(rows) == set(names)
    missing = rows[names[2]]
    assert (missing["accuracy"], missing["pareto"]) == (None, False)
    assert "missing.pth" in missing["note"] or "no such" in missing["note"]
    assert facts["backbones"][-1] is missing
    for name, size in ((NETWORK, 64), (f"{NETWORK}:32", 32)):
        row = rows[name]
        own = scenario.backbone.model_copy(update={"image_size": size})
        features = make_features(open_data(scenario.model_copy(update={"backbone": own})))
        assert row["accuracy"] == accuracy(quick_answers(population_of(features)))
        assert row["feature_bytes"] == 4 * 512
        assert row["weights_bytes"] == 4 * 722_496, "squeezenet's published size without its head"
        assert row["images_per_second"] > 0
        assert f"{size} px" in row["note"]
        assert 0 <= row["h_score"] <= 1
    assert any(row["pareto"] for row in rows.values())
    assert any("all 30" in note for note in facts["notes"])
    assert "fedtl gap choice --set backbone.name=squeezenet1_1" in told
    assert max(map(len, told.split("\nsqueezenet1_1: ")[0].splitlines())) <= 80


def test_names_are_read_as_a_user_means_them() -> None:
    own = Backbone(name="mobilenet_v2", weights="/w/m.pth", sha256="b0353104", image_size=96)
    kept = parse_candidate("mobilenet_v2", own)
    assert kept == own
    native = parse_candidate("mobilenet_v2:native", own)
    assert (native.weights, native.sha256, native.image_size) == ("/w/m.pth", "b0353104", None)
    other = parse_candidate("resnet18:128", own)
    assert (other.weights, other.sha256, other.image_size) == ("default", None, 128)
    random = parse_candidate("mobilenet_v2@none", own)
    assert (random.weights, random.sha256, random.image_size) == ("none", None, 96)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("mobilnet_v2", "Did you mean 'mobilenet_v2'"),
        ("resnet18:4", "greater than or equal to 8"),
        ("resnet18:big", "not a backbone"),
        ("identity", "unknown backbone"),
    ],
)
def test_a_wrong_name_is_refused_before_anything_is_run(name: str, says: str) -> None:
    with pytest.raises(InputError, match=says):
        parse_candidate(name, Backbone())


def test_nothing_that_can_be_run_is_an_error(scenario: Scenario, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="none of these"):
        rank(scenario, f"alexnet@{tmp_path / 'missing.pth'}")
    with pytest.raises(InputError, match="no backbone to rank"):
        rank(scenario)
    features = scenario.model_copy(update={"backbone": Backbone(name="identity")})
    with pytest.raises(InputError, match="features already"):
        rank(features, NETWORK)


def test_a_typing_error_on_the_command_line(fedtl: Any, small: Path) -> None:
    done = fedtl("gap", "quickstart", "--backbones", "resnt18")
    assert done.returncode == 2
    assert "Did you mean 'resnet18'" in done.stderr
    done = fedtl("gap", str(small), "--backbones", "resnet18")
    assert done.returncode == 2
    assert "features already" in done.stderr
    assert "Traceback" not in done.stderr


def row(accuracy: float | None, speed: float, features: int, weights: int) -> dict[str, Any]:
    return {
        "accuracy": accuracy,
        "images_per_second": speed,
        "feature_bytes": features,
        "weights_bytes": weights,
    }


def test_pareto_means_beaten_by_nobody() -> None:
    best = row(0.9, 100, 4, 4)
    slower = row(0.8, 50, 4, 4)
    quicker = row(0.7, 400, 4, 4)
    noise = row(0.85, 105, 4, 4)
    smaller = row(0.6, 50, 2, 4)
    equal = dict(best)
    rows = [best, slower, quicker, noise, smaller, equal, row(None, 0, 0, 0)]
    assert [pareto(one, rows) for one in rows] == [True, False, True, False, True, True, False]
