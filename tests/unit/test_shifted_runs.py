"""Runs over shifted images: told, repeatable, stored apart, and copies are still found."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fedtl.build import open_data
from fedtl.data.leakage import find_leaks
from fedtl.data.shifts import ShiftedImages
from fedtl.ready_features import make_features
from fedtl.scenario.load import load_scenario

SCENARIO = """name = "mine"
rounds = 1
[data]
source = "folder"
path = "pictures"
[clients]
num = 3
[shift]
kinds = ["noise", "rotation"]
fraction = 0.7
[backbone]
name = "squeezenet1_1"
weights = "none"
image_size = 32
extraction = "torch"
[training]
local_epochs = 1
[evaluation]
references = []
"""


@pytest.fixture
def pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two classes of fifteen small pictures and a scenario that shifts two clients of three."""
    generator = np.random.default_rng(0)
    for name in ("cat", "dog"):
        (tmp_path / "pictures" / name).mkdir(parents=True)
        for i in range(15):
            pixels = generator.integers(0, 255, (40, 40, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "pictures" / name / f"{i:02}.png")
    (tmp_path / "mine.toml").write_text(SCENARIO)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_shifted_run_says_who_is_shifted_and_repeats_itself(fedtl, pictures: Path) -> None:
    first = fedtl("run", "mine.toml", "--json", "--out", "first")
    assert first.returncode == 0, first.stderr
    assert "shift noise at severity 3: 1 of 3 clients (client-000" in first.stderr
    assert "shift rotation at severity 3: 1 of 3 clients (client-000" in first.stderr
    again = fedtl("run", "mine.toml", "--json", "--out", "again", "--set", "engine.threads=1")
    assert json.loads(first.stdout)["final"] == json.loads(again.stdout)["final"]


def test_features_of_shifted_clients_differ_and_of_the_others_do_not(pictures: Path) -> None:
    plain = open_data(load_scenario("mine.toml", ["seed=5", "shift.kinds=[]"]))
    opened = open_data(load_scenario("mine.toml", ["seed=5"]))
    images = opened.examples.images
    assert isinstance(images, ShiftedImages)
    before, after = make_features(plain), make_features(opened)
    assert not after.facts["cached"]
    same = [
        (before.matrix[opened.split.train.of(k)] == after.matrix[opened.split.train.of(k)]).all()
        for k in range(3)
    ]
    assert sorted(same) == [False, False, True]
    assert (before.content == after.content).all()
    again = make_features(open_data(load_scenario("mine.toml", ["seed=5"])))
    assert again.facts["cached"]
    assert (again.matrix == after.matrix).all()
    harder = open_data(load_scenario("mine.toml", ["seed=5", "shift.severity=4"]))
    assert not make_features(harder).facts["cached"]


def test_copies_are_found_under_the_noise(pictures: Path) -> None:
    for i in range(6):
        folder = pictures / "pictures" / "cat"
        shutil.copy(folder / f"{i:02}.png", folder / f"copy{i:02}.png")
    everybody = ["shift.kinds=['noise']", "shift.fraction=1.0"]
    found = []
    for overrides in (everybody, ["shift.kinds=[]"]):
        features = make_features(open_data(load_scenario("mine.toml", overrides)))
        found.append(find_leaks(features.content, features.split, features.examples))
    assert found[0].train_test + found[0].between_clients > 0
    assert found[0] == found[1]


def test_a_checked_scenario_with_shifts(fedtl, pictures: Path) -> None:
    done = fedtl("check", "mine.toml")
    assert done.returncode == 0, done.stderr
    assert "shift noise at severity 3" in done.stdout
