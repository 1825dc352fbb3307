"""``fedtl report`` prepares what tables lack, and goes without where it cannot."""

from __future__ import annotations

import base64
import io
import json
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

import numpy as np
import pytest
from PIL import Image

import fedtl as fedtl_api
from fedtl.build import open_data
from fedtl.errors import InputError, Interrupted
from fedtl.interrupts import Interrupts
from fedtl.report import SIDE, example_images, write_report
from fedtl.scenario.load import load_scenario

Command = Callable[..., "CompletedProcess[str]"]


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real run of a small federation, beside its data."""
    folder = tmp_path_factory.mktemp("original")
    rng = np.random.default_rng(0)
    y = rng.integers(0, 3, 200)
    np.savez(folder / "small.npz", x=rng.normal(size=(200, 6)).astype(np.float32), y=y)
    scenario = {
        "name": "small",
        "data": {"source": "arrays", "path": str(folder / "small.npz")},
        "clients": {"num": 5},
        "backbone": {"name": "identity"},
        "training": {"local_epochs": 1, "batch_size": 8},
    }
    fedtl_api.run(scenario, rounds=2, out=folder / "run")
    return folder


@pytest.fixture
def trained(original: Path, tmp_path: Path) -> Path:
    """A copy of that run, with data of its own."""
    shutil.copytree(original, tmp_path, dirs_exist_ok=True)
    scenario = tmp_path / "run" / "scenario.toml"
    scenario.write_text(scenario.read_text().replace(str(original), str(tmp_path)))
    return tmp_path / "run"


def test_a_real_run_gets_its_page(trained: Path, fedtl: Command) -> None:
    done = fedtl("report", "run")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().endswith("report.html")
    text = (trained / "report.html").read_text()
    gap = json.loads((trained / "gap.json").read_text())  # features are at hand: measured unasked
    assert gap["clients"][0] in text
    assert "Not measured in this run" not in text
    assert "could not be looked at" not in text
    assert fedtl("report", "run").returncode == 0  # again, over the old one


def test_without_its_data_the_page_says_so(trained: Path) -> None:
    (trained.parent / "small.npz").unlink()
    page = write_report(trained, Interrupts(), gap=True)
    text = page.read_text()
    assert "The data of this run could not be looked at" in text
    assert str(trained.parent) not in text
    assert not (trained / "gap.json").exists()


def test_other_data_are_not_taken_for_the_runs(trained: Path) -> None:
    content = dict(np.load(trained.parent / "small.npz"))
    np.savez(trained.parent / "small.npz", x=content["x"] + 1, y=content["y"])
    text = write_report(trained, Interrupts(), gap=True).read_text()
    assert "they are not those the run was made with" in text


def test_no_gap_is_measured_where_it_is_not_wanted(trained: Path) -> None:
    text = write_report(trained, Interrupts(), gap=False).read_text()
    assert not (trained / "gap.json").exists()
    assert "fedtl report run --gap" in text


def test_a_bug_in_the_gap_does_not_take_the_page_away(
    trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr("fedtl.gap.measure_gap", broken)
    text = write_report(trained, Interrupts(), gap=None).read_text()
    assert "could not be looked at (ZeroDivisionError)" in text


def test_an_interrupt_stops_it(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(*_: object) -> None:
        raise Interrupted("stop")

    monkeypatch.setattr("fedtl.gap.measure_gap", stopped)
    with pytest.raises(Interrupted):
        write_report(trained, Interrupts(), gap=None)
    assert not (trained / "report.html").exists()


def test_an_interrupt_while_the_page_is_made_leaves_none(
    trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (trained / "report.html").unlink(missing_ok=True)

    def signalled(*args: object) -> str:
        signal.raise_signal(signal.SIGTERM)
        return "page"

    monkeypatch.setattr("fedtl.report.run_page", signalled)
    with Interrupts() as interrupts, pytest.raises(Interrupted) as caught:
        write_report(trained, interrupts, gap=False)
    assert caught.value.exit_code == 143
    assert not (trained / "report.html").exists()


def test_what_is_no_run_is_refused(tmp_path: Path, fedtl: Command) -> None:
    with pytest.raises(InputError, match="not a run folder"):
        write_report(tmp_path, Interrupts(), gap=None)
    done = fedtl("report", "nothing-here")
    assert done.returncode == 2
    assert "not a run folder" in done.stderr
    done = fedtl("compare", "nothing-here", "nor-here")
    assert done.returncode == 2


def test_compare_through_the_command_line(trained: Path, fedtl: Command) -> None:
    shutil.copytree(trained, trained.parent / "other")
    done = fedtl("compare", "run", "other", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["pairs"][0]["home"]["difference"] == 0
    assert "not enough evidence" in done.stderr
    assert fedtl("compare", "run").returncode == 2


def test_example_images_are_the_clients_own_and_small() -> None:
    opened = open_data(load_scenario("quickstart"))
    found = example_images(opened, 2, Interrupts())
    assert [one["name"] for one in found] == list(opened.split.names)
    assert opened.examples.images is not None
    for client, one in enumerate(found):
        labels = {
            opened.examples.classes[i]
            for i in opened.examples.labels[opened.split.train.of(client)]
        }
        assert len(one["images"]) == 2
        assert {image["label"] for image in one["images"]} <= labels
    head, _, content = found[0]["images"][0]["source"].partition(",")
    assert head == "data:image/jpeg;base64"
    image = Image.open(io.BytesIO(base64.b64decode(content)))
    assert max(image.size) <= SIDE
    assert not image.getexif()
    assert found == example_images(opened, 2, Interrupts())
