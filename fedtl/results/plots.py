"""Figures of a run, drawn by matplotlib from its tables: for notebooks and, as SVG, for pages.

Nothing here touches matplotlib's global state (pyplot). Every figure uses the colours of
``COLOURS`` alone, so that ``svg`` can hand them over to the page's style sheet, which has a light
and a dark value for each. All text is drawn as it is: no name is taken for a formula.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import wraps
from html import escape
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from fedtl.errors import printable
from fedtl.results.gaps import to_the_rest
from fedtl.results.report import client_frame, heads
from fedtl.results.tables import FEDERATED, RunTables

COLOURS = {
    "shared": "#2457a7",
    "alone": "#a8480f",
    "tuned": "#23713f",
    "pooled": "#6a6275",
    "ink": "#1b2330",
    "muted": "#566070",
    "rule": "#d5dae2",
}
"""By their names in the style sheet; the values are those on white paper."""

HEAD_COLOURS = {
    FEDERATED: "shared",
    "local_only": "alone",
    "fine_tuned": "tuned",
    "personal": "tuned",
}
"""Heads that have a colour of their own; the others have that of the pooled one."""

STYLE: Any = {
    "font.size": 10.5,
    "font.family": "sans-serif",
    "svg.fonttype": "none",
    "svg.hashsalt": "fedtl",
    "text.parse_math": False,
    "text.color": COLOURS["ink"],
    "axes.labelcolor": COLOURS["muted"],
    "axes.edgecolor": COLOURS["rule"],
    "axes.facecolor": "none",
    "figure.facecolor": "white",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 10.5,
    "axes.titlelocation": "left",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": COLOURS["rule"],
    "grid.linewidth": 0.6,
    "xtick.color": COLOURS["muted"],
    "ytick.color": COLOURS["muted"],
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "legend.frameon": False,
}

NAMED = 40
"""Clients that get a line of their own, with their name; more are drawn as one curve."""

CUT = 24
"""Characters of a name that are drawn; tables have it whole."""


ENLARGED = 1.3
"""Points of a figure as pixels of the page: its text then has the size of a table's."""


@contextmanager
def _styled() -> Iterator[None]:
    with mpl.rc_context(STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")  # the reader's fonts draw
        yield


def _figure(draw: Callable[..., Figure]) -> Callable[..., Figure]:
    """Draws in the house's style, whatever the caller's is."""

    @wraps(draw)
    def styled(*arguments: Any, **options: Any) -> Figure:
        with _styled():
            return draw(*arguments, **options)

    return styled


@_figure
def learning_curves(run: RunTables) -> Figure:
    """Accuracy on the clients' own tests over the rounds: mean, worst tenth, band over clients.

    Lines across: the pooled head, and the mean of the clients alone, where they are known.
    """
    figure, axes = _one(4.6, 4.0)
    curves, rounds = run.curves, run.rounds
    shared = COLOURS["shared"]
    axes.fill_between(
        curves["round"], curves["low"], curves["high"], color=shared, alpha=0.16, lw=0,
        label="middle 80 % of clients",
    )  # fmt: skip
    axes.plot(
        curves["round"], curves["mean"], color=shared, lw=2, label="shared, mean over clients",
        marker="o" if len(curves) == 1 else "",
    )  # fmt: skip
    worst = rounds[rounds["worst_decile_accuracy"].notna()]
    axes.plot(
        worst["round"], worst["worst_decile_accuracy"], color=shared, lw=1.3, ls=(0, (4, 2)),
        label="shared, worst tenth of clients",
    )  # fmt: skip
    for row in heads(run):
        if row["head"] in ("local_only", "centralised"):
            colour = COLOURS["alone" if row["head"] == "local_only" else "pooled"]
            words = "alone" if row["head"] == "local_only" else "pooled"
            style = (0, (1, 1.5)) if row["head"] == "centralised" else "-"
            axes.axhline(row["mean"], color=colour, lw=1.4, ls=style, label=f"{words}, mean")
    _accuracy_axis(axes.yaxis)
    axes.set_xlabel("round")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_title("Accuracy on the clients' own tests")
    figure.legend(loc="outside lower left")
    return figure


@_figure
def home_and_everywhere(run: RunTables, place: str | None = None) -> Figure:
    """Every head at home and everywhere: a dot for each client, a bar for all together.

    Args:
        place: "home" or "everywhere" for one of the two panels alone.
    """
    places = ["home", "everywhere"] if place is None else [place]
    rows = heads(run)[::-1]
    height = 0.75 + 0.42 * len(rows)
    figure = _new(4.3 * len(places), height)
    all_axes = figure.subplots(1, len(places), squeeze=False, sharey=True)[0]
    for axes, one in zip(all_axes, places, strict=True):
        _panel(axes, run, rows, one)
    return figure


def _panel(axes: Axes, run: RunTables, rows: Sequence[Mapping[str, Any]], place: str) -> None:
    frame = run.own if place == "home" else run.everyone
    rng = np.linspace(-0.26, 0.26, max(1, len(frame)))
    for i, row in enumerate(rows):
        colour = COLOURS[HEAD_COLOURS.get(row["head"], "pooled")]
        value = row[place]
        if np.isnan(value):
            axes.text(0.01, i, "undefined", va="center", color=COLOURS["muted"], fontsize=9.5)
            continue
        axes.barh(i, value, height=0.62, color=colour, alpha=0.22, lw=0)
        axes.plot([value, value], [i - 0.31, i + 0.31], color=colour, lw=2.4)
        column = "accuracy" if row["head"] == FEDERATED else f"{row['head']}_accuracy"
        each = frame[column].to_numpy(float)
        if len(each) <= 200 and np.nanmin(each) < np.nanmax(each):
            axes.plot(each, i + rng, ".", ms=3.5, color=colour, alpha=0.7, mew=0)
        axes.text(1.02, i, f"{100 * value:.1f} %", va="center", fontsize=10)
    axes.set_yticks(range(len(rows)), [row["title"] for row in rows])
    for label in axes.get_yticklabels():
        label.set_color(COLOURS["ink"])
    axes.set_xlim(0, 1.2)
    axes.set_xticks([0, 0.25, 0.5, 0.75, 1.0])
    axes.xaxis.set_major_formatter(PercentFormatter(1, 0))
    axes.grid(axis="y", visible=False)
    axes.spines["bottom"].set_visible(False)
    title = "At home: own tests" if place == "home" else "Everywhere: all clients' tests"
    axes.set_title(title, fontweight="bold")


@_figure
def differences(run: RunTables) -> Figure:
    """Shared minus alone at home, client by client with intervals, in percentage points."""
    frame = client_frame(run)
    frame = frame[frame["difference"].notna()].sort_values("difference", kind="stable")
    named = len(frame) <= NAMED
    figure, axes = _one(4.6, 0.9 + (0.24 * len(frame) if named else 2.6))
    axes.axvline(0, color=COLOURS["muted"], lw=1)
    colour = {"gains": "shared", "harmed": "alone"}
    colours = [COLOURS[colour.get(str(word), "pooled")] for word in frame["verdict"]]
    y = np.arange(len(frame))
    there = frame["low"].notna().to_numpy()
    axes.hlines(
        y[there], 100 * frame["low"][there], 100 * frame["high"][there],
        colors=[c for c, ok in zip(colours, there, strict=True) if ok],
        lw=1.6 if named else 0.5, alpha=0.55,
    )  # fmt: skip
    axes.scatter(100 * frame["difference"], y, c=colours, s=22 if named else 4, lw=0, zorder=3)
    if named:
        axes.set_yticks(y, [_short(name) for name in frame["name"]])
        axes.set_ylim(-0.7, len(frame) - 0.3)
    else:
        axes.set_yticks([])
        axes.set_ylabel(f"{len(frame):,} clients, in order")
    axes.grid(axis="y", visible=False)
    axes.set_xlabel("points:  ← alone better · shared better →")
    axes.set_title("Shared minus alone, at home")
    return figure


@_figure
def gap_and_gain(run: RunTables, kind: str | None = None) -> Figure:
    """Each client's distance to the others against what federating gains it at home.

    Args:
        kind: a measure of ``gap.json``; by default its first that is defined.

    Raises:
        ValueError: no gap was measured, or this kind was not.
    """
    if run.gap is None:
        raise ValueError(f"no gap was measured: type 'fedtl report {run.path.name} --gap'")
    kind = kind or first_kind(run.gap)
    if kind not in (run.gap.get("kinds") or {}):
        raise ValueError(f"this kind of gap was not measured: {kind}")
    gains = dict(zip(run.own["name"], client_frame(run)["difference"], strict=True))
    names = run.gap["clients"]
    x = to_the_rest(run.gap, kind)
    y = 100 * np.array([gains.get(name, np.nan) for name in names], float)
    figure, axes = _one(4.6, 3.2)
    axes.axhline(0, color=COLOURS["muted"], lw=1)
    axes.scatter(x, y, s=26, color=COLOURS["shared"], alpha=0.8, lw=0)
    if np.isfinite(x * y).sum() <= 12:
        for name, a, b in zip(names, x, y, strict=True):
            if np.isfinite(a * b):
                axes.annotate(
                    _short(name, 14), (a, b), xytext=(5, 3), textcoords="offset points",
                    fontsize=8.5, color=COLOURS["muted"],
                )  # fmt: skip
    axes.margins(x=0.12, y=0.12)
    axes.set_xlabel(f"distance to the others ({run.gap['kinds'][kind]['title']})")
    axes.set_title("Percentage points gained at home by federating")
    return figure


@_figure
def matrix(
    rows: Sequence[str], columns: Sequence[str], values: Sequence[Sequence[Any]], title: str
) -> Figure:
    """A table of figures as shades: who has what, or who is how far from whom; None stays empty."""
    table = np.array([[np.nan if v is None else v for v in row] for row in values], float)
    figure, axes = _one(1.8 + 0.34 * min(len(columns), 40), 1.2 + 0.26 * min(len(rows), 60))
    shades = LinearSegmentedColormap.from_list("shared", ["#ffffff", COLOURS["shared"]])
    image = axes.imshow(table, cmap=shades, aspect="auto", interpolation="nearest")
    figure.colorbar(image, ax=axes, fraction=0.05, pad=0.02).outline.set_visible(False)
    axes.grid(visible=False)
    if len(rows) <= 60:
        axes.set_yticks(range(len(rows)), [_short(name) for name in rows])
    if len(columns) <= 40:
        axes.set_xticks(range(len(columns)), [_short(c, 14) for c in columns], rotation=90)
    axes.set_title(title)
    return figure


@_figure
def backbones(facts: Mapping[str, Any]) -> Figure:
    """Accuracy of the closed-form head against images per second; filled: none is better in all."""
    figure, axes = _one(4.6, 3.0)
    for one in facts["backbones"]:
        if one["accuracy"] is None or one["images_per_second"] is None:
            continue
        colour = COLOURS["shared" if one["pareto"] else "pooled"]
        x, y = one["images_per_second"], one["accuracy"]
        axes.scatter(
            [x],
            [y],
            s=46,
            lw=1.8,
            edgecolors=colour,
            facecolors=colour if one["pareto"] else "none",
        )
        axes.annotate(
            _short(one["name"]), (x, y), xytext=(7, 4), textcoords="offset points", fontsize=9
        )
    _accuracy_axis(axes.yaxis)
    axes.margins(x=0.2, y=0.15)
    axes.set_xlabel("images per second on this machine")
    axes.set_title("Accuracy of a quick head")
    return figure


def first_kind(gap: Mapping[str, Any]) -> str:
    """The measure that is shown first: of the features rather than of the labels."""
    kinds = [kind for kind in gap.get("kinds") or {} if np.isfinite(to_the_rest(gap, kind)).any()]
    wanted = [
        kind for kind in ("conditional", "frechet", "coral", "a_distance", "mmd2") if kind in kinds
    ]
    return (wanted or kinds or ["none"])[0]


def svg(figure: Figure, name: str, told: str) -> str:
    """A figure as SVG inside a page, in the page's colours and font.

    Args:
        name: makes the ids of this figure its own, letters and digits.
        told: what it shows, for who cannot see it.
    """
    buffer = io.StringIO()
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    figure.patch.set_visible(False)  # the page is the paper
    with _styled():
        FigureCanvasSVG(figure).print_svg(buffer, metadata=nothing)  # type: ignore[no-untyped-call]
    figure.patch.set_visible(True)
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(
        r"<(metadata|style).*?</\1>", "", text, flags=re.S
    )  # a style would reach the page
    text = re.sub(r'\bid="([^"]*)"', rf'id="{name}-\1"', text)
    text = re.sub(r"url\(#([^)]*)\)", rf"url(#{name}-\1)", text)
    text = re.sub(r'xlink:href="#([^"]*)"', rf'href="#{name}-\1"', text)
    text = re.sub(r"font-family:[^;]*; ", "", text)
    for colour, value in COLOURS.items():
        text = text.replace(value, f"var(--{colour})")
    drawn = text[text.index(">") + 1 :]
    width, height = 72 * figure.get_size_inches()
    return (
        f'<svg role="img" aria-label="{escape(told)}" viewBox="0 0 {width:.2f} {height:.2f}" '
        f'style="width: {width * ENLARGED:.0f}px">{drawn}'
    )


def _new(width: float, height: float) -> Figure:
    return Figure(figsize=(width, height), layout="constrained")


def _one(width: float, height: float) -> tuple[Figure, Axes]:
    figure = _new(width, height)
    return figure, figure.subplots()


def _accuracy_axis(axis: Any) -> None:
    axis.set_major_formatter(PercentFormatter(1, 0))


def _short(name: str, length: int = CUT) -> str:
    text = printable(str(name))
    return text if len(text) <= length else text[: length - 1] + "…"
