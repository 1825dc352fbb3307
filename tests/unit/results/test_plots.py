"""Figures show what is in the tables, in the page's colours, without global state."""

from __future__ import annotations

import re
import subprocess
import sys
import xml.etree.ElementTree as ET
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import matplotlib as mpl
import numpy as np
import pytest
from matplotlib.figure import Figure

from fedtl.results import plots
from fedtl.results.report import client_frame, heads
from fedtl.results.tables import RunTables, read_run

DRAWN: list[Callable[[RunTables], Figure]] = [
    plots.learning_curves,
    plots.home_and_everywhere,
    plots.differences,
    plots.gap_and_gain,
]


@pytest.mark.parametrize("draw", DRAWN, ids=lambda f: f.__name__)
def test_svg_belongs_to_the_page(draw: Callable[[RunTables], Figure], made: Path) -> None:
    text = plots.svg(draw(read_run(made)), "one", 'told "so" <b>')
    root = ET.fromstring(text)
    assert root.get("role") == "img"
    assert root.get("aria-label") == 'told "so" <b>'
    ids = re.findall(r'\bid="([^"]*)"', text)
    assert len(ids) == len(set(ids)) > 5
    assert all(name.startswith("one-") for name in ids)
    for used in re.findall(r'url\(#([^)]*)\)|href="#([^"]*)"', text):
        assert "".join(used) in ids
    assert not re.search(r"#[0-9a-f]{6}\b", text)  # each colour is the style sheet's
    assert not re.search("<style|<script|<metadata|http|font-family", text)


def test_svg_is_the_same_each_time(made: Path) -> None:
    run = read_run(made)
    first, second = (plots.svg(plots.learning_curves(run), "a", "x") for _ in range(2))
    assert first == second


def test_names_are_drawn_as_they_are(made: Path) -> None:
    text = plots.svg(plots.differences(read_run(made)), "one", "x")
    assert "$x^2$ {{ 7*7 }}" in text
    assert "\\u202e" in text  # turned text is told, not obeyed


def test_differences_stand_where_the_frame_says(made: Path) -> None:
    run = read_run(made)
    axes = plots.differences(run).axes[0]
    drawn = np.asarray(axes.collections[-1].get_offsets())[:, 0]
    frame = client_frame(run)["difference"].dropna()
    assert drawn.tolist() == pytest.approx(sorted(100 * frame))


def test_bars_are_the_heads(made: Path) -> None:
    run = read_run(made)
    home, far = plots.home_and_everywhere(run).axes
    rows = heads(run)[::-1]
    assert [bar.get_width() for bar in home.patches] == pytest.approx([r["home"] for r in rows])
    assert [bar.get_width() for bar in far.patches] == pytest.approx(
        [r["everywhere"] for r in rows]
    )


def test_many_clients_are_one_curve(made_runs: ModuleType, tmp_path: Path) -> None:
    run = read_run(made_runs.write_run(tmp_path / "run", clients=60, rounds=2, gap=False))
    axes = plots.differences(run).axes[0]
    assert axes.get_yticks().size == 0
    assert "59 clients" in axes.get_ylabel()


def test_what_was_not_measured_cannot_be_drawn(made_runs: ModuleType, tmp_path: Path) -> None:
    run = read_run(made_runs.write_run(tmp_path / "run", gap=False))
    with pytest.raises(ValueError, match="no gap was measured"):
        plots.gap_and_gain(run)


def test_an_unknown_kind_of_gap(made: Path) -> None:
    with pytest.raises(ValueError, match="not measured: nonsense"):
        plots.gap_and_gain(read_run(made), "nonsense")


def test_the_callers_style_stays(made: Path) -> None:
    before = dict(mpl.rcParams)
    plots.learning_curves(read_run(made))
    assert dict(mpl.rcParams) == before


def test_pyplot_is_not_imported() -> None:
    code = "import sys, fedtl.results.plots; sys.exit('matplotlib.pyplot' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_the_line_of_the_pooled_head_is_no_optimum(made: Path) -> None:
    """Behind a cut it is trained by steps; the tables call it pooled as well."""
    labels = [line.get_label() for line in plots.learning_curves(read_run(made)).axes[0].lines]
    assert "pooled, mean" in labels
    assert not any("optimum" in str(label) for label in labels)
