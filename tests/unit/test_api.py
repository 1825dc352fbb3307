"""fedtl from Python gives what the command line gives."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from matplotlib.figure import Figure

import fedtl
from fedtl.errors import InputError, ScenarioError
from fedtl.scenario.load import load_scenario


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> fedtl.Run:
    """A run of a few features, through the public door."""
    folder = tmp_path_factory.mktemp("api")
    rng = np.random.default_rng(0)
    y = rng.integers(0, 3, 200)
    np.savez(folder / "small.npz", x=rng.normal(size=(200, 6)).astype(np.float32), y=y)
    scenario = {
        "name": "small",
        "data": {"source": "arrays", "path": str(folder / "small.npz")},
        "clients": {"num": 5},
        "backbone": {"name": "identity"},
        "training": {"local_epochs": 1, "batch_size": 8},
        "evaluation": {"references": ["local_only"]},
    }
    return fedtl.run(
        scenario, rounds=3, strategy={"name": "fedprox"}, training={"batch_size": 16},
        out=folder / "run",
    )  # fmt: skip


def test_import_is_light() -> None:
    heavy = ("torch", "ray", "flwr", "numpy", "pandas", "matplotlib", "fedtl.api")
    code = f"import sys, fedtl; sys.exit(bool(set({heavy}) & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_unknown_names_are_attribute_errors() -> None:
    with pytest.raises(AttributeError, match="nonsense"):
        _ = fedtl.nonsense
    assert all(callable(getattr(fedtl, name)) for name in fedtl.__all__)


def test_overrides_reach_the_scenario(run: fedtl.Run) -> None:
    scenario = load_scenario(str(run.path / "scenario.toml"))
    assert scenario.rounds == 3
    assert scenario.strategy.name == "fedprox"
    assert scenario.training.batch_size == 16
    assert scenario.training.local_epochs == 1


def test_tables_are_the_parquet_files(run: fedtl.Run) -> None:
    for name in ("rounds", "clients"):
        expected = pq.read_table(run.path / f"{name}.parquet").to_pandas()
        pd.testing.assert_frame_equal(getattr(run, name), expected)
    assert run.summary is not None
    assert run.summary["rounds_completed"] == 3
    assert run.head["weight"].shape == (3, 6)
    assert run.verdict


def test_figures(run: fedtl.Run) -> None:
    for plot in (run.plot_learning_curves, run.plot_home_and_everywhere, run.plot_differences):
        assert isinstance(plot(), Figure)


def test_a_gap_can_be_drawn_once_the_page_has_measured_it(run: fedtl.Run) -> None:
    page = run.report()
    assert page == run.path / "report.html"
    assert run.gap is not None
    assert isinstance(run.plot_gap(), Figure)
    with pytest.raises(InputError, match="nonsense"):
        run.plot_gap("nonsense")


def test_what_notebooks_show_is_escaped(made: Path) -> None:
    run = fedtl.load(made)
    assert "3 of 12 should join" in run._repr_html_()
    assert "<script>" not in run._repr_html_()
    assert "3 of 12 should join" in repr(run)
    assert isinstance(run.plot_who_has_what(), Figure)
    with pytest.raises(InputError, match="no head"):
        _ = run.head


def test_bad_input_is_told_as_on_the_command_line(tmp_path: Path) -> None:
    with pytest.raises(ScenarioError, match="rounds"):
        fedtl.run({"name": "x"}, rounds=-1)
    with pytest.raises(ScenarioError, match="training"):
        fedtl.run("quickstart", training={"learning_rat": 1})
    with pytest.raises(InputError, match="no scenario of this name"):
        fedtl.run("nonsense")
    with pytest.raises(InputError, match="not a run folder"):
        fedtl.load(tmp_path)
