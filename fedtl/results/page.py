"""A run's page: one HTML file that asks nobody for anything, from the run's tables."""

from __future__ import annotations

import base64
import functools
import hashlib
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from fedtl.errors import printable
from fedtl.results import answer, gaps, plots, provenance, report
from fedtl.results.privacy import privacy
from fedtl.results.tables import RunTables, number

TEMPLATES = Path(__file__).parent / "templates"

NO_BREAK = "\u00a0"
"""The space in "76 %"."""

ROUNDS_SHOWN = 200
"""Rows of the table of rounds; of more rounds every so many is shown."""

PAIRS_SHOWN = 40
"""Clients whose distances to each other are shown as a table."""


def run_page(
    run: RunTables, examples: Sequence[Mapping[str, Any]] = (), notes: Sequence[str] = ()
) -> str:
    """The page of a run.

    Args:
        examples: per client ``name`` and ``images``, each with ``source`` (a data URI) and
            ``label``.
        notes: what could not be made for this page, in sentences.

    Returns:
        HTML, with style, figures and images inside.
    """
    frame = report.client_frame(run)
    verdict = answer.verdict(run)
    gain = gaps.gap_and_gain(run)
    content = {
        "title": f"{run.name}: {verdict['headline']}",
        "name": run.name,
        "about": _about(run),
        "verdict": verdict,
        "state": answer.state(run),
        "notes": list(notes),
        "places": report.at_home_and_everywhere(run),
        "heads": report.heads(run),
        "forgetting": report.forgetting(run),
        "source_task": report.source_task(run),
        "level": report.level_of(run),
        "tuned": report.tuned_head(run) is not None,
        "br": Markup("<br>"),
        "clients": records(frame),
        **_rounds(run),
        "holdings": _heat(report.who_has_what(run)),
        "gain": None if gain is None else _gain(run, gain),
        "gap_command": None if run.real else f"fedtl report {run.path.name} --gap",
        "domains": report.by_domain(run),
        "classes": report.by_class(run),
        "calibration": report.calibration(run),
        "examples": list(examples),
        "privacy": privacy(run),
        "cost": provenance.cost(run),
        "assumptions": provenance.assumptions(run),
        "warnings": provenance.warnings(run),
        "reproduce": provenance.reproduce(run),
        "figures": _figures(run, frame),
    }
    return render("run.html.j2", {**content, "contents": _contents(content)})


def render(template: str, content: Mapping[str, Any]) -> str:
    """One of the templates with the house's style and script inside."""
    script = (TEMPLATES / "sort.js").read_text()
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return (
        _environment()
        .get_template(template)
        .render(
            script=Markup(script),
            script_hash=f"sha256-{digest}",
            style=Markup((TEMPLATES / "style.css").read_text()),
            **content,
        )
    )


@functools.cache
def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_shown,
    )
    environment.filters |= {
        "percent": report.percent,
        "points": report.points,
        "pvalue": p_text,
        "decimals": decimals,
        "count": count,
        "raw": raw,
        "capfirst": lambda text: text[:1].upper() + text[1:],
        "int_if": lambda value: int(value) if value == int(value) else value,
        "bytes": provenance.bytes_text,
    }
    return environment


def _shown(value: Any) -> Any:
    """Text as it can be read: control characters are told by their codes."""
    if type(value) is not str:  # numbers, and markup of our own
        return value
    return NO_BREAK.join(map(printable, value.split(NO_BREAK)))


def p_text(value: Any) -> str:
    """A p-value."""
    found = number(value)
    if found is None:
        return "undefined"
    return "< 0.001" if found < 0.001 else f"{found:.3f}"


def decimals(value: Any, digits: int) -> str:
    """A number with so many decimals; small ones with as many figures."""
    found = number(value)
    if found is None:
        return "undefined"
    if abs(found) >= 1e5 or 0 < abs(found) < 0.5 * 10**-digits:
        return f"{found:.{digits}g}".replace("-", "−")
    return f"{found:,.{digits}f}".replace("-", "−")


def count(value: Any) -> str:
    """A whole number."""
    found = number(value)
    return "undefined" if found is None else f"{found:,.0f}"


def raw(value: Any) -> str:
    """The number itself, for sorting; empty where undefined."""
    found = number(value)
    return "" if found is None else f"{found:.12g}"


def figure(drawn: Any, name: str, told: str, caption: str = "") -> dict[str, Any]:
    """A figure for the templates: its SVG, which holds no text but what matplotlib escaped."""
    return {"svg": Markup(plots.svg(drawn, name, printable(told))), "caption": caption}


def records(frame: pd.DataFrame) -> list[dict[str, Any]]:
    """Rows as dicts, undefined as None."""
    return [
        {str(k): None if isinstance(v, float) and math.isnan(v) else v for k, v in row.items()}
        for row in frame.to_dict("records")
    ]


def shades(values: Sequence[Sequence[Any]]) -> list[list[tuple[int, Any]]]:
    """Each value with its shade, 0 to 100 of the largest; None has none."""
    table = np.array([[np.nan if v is None else v for v in row] for row in values], float)
    largest = np.nanmax(table) if np.isfinite(table).any() else 0.0
    scaled = np.nan_to_num(100 * table / largest if largest > 0 else table).clip(0, 100).astype(int)
    return [list(zip(shade, row)) for shade, row in zip(scaled.tolist(), values)]  # noqa: B905


def _heat(table: dict[str, Any] | None) -> dict[str, Any] | None:
    return None if table is None else {**table, "cells": shades(table["values"])}


def _about(run: RunTables) -> list[str]:
    strategy = run.scenario.get("strategy", {}).get("name", "fedavg")
    backbone = run.scenario.get("backbone", {}).get("name", "")
    domains = run.own["domain"].nunique()
    real = "real clients" if run.real else "clients (simulated)"
    facts = [f"{len(run.own):,} {real}" + (f" in {domains} domains" if domains > 1 else "")]
    facts += [f"{run.done_rounds} rounds of {strategy}"]
    return [*facts, *([f"backbone {backbone}"] if backbone else [])]


def _rounds(run: RunTables) -> dict[str, Any]:
    every = max(1, math.ceil(len(run.rounds) / ROUNDS_SHOWN))
    frame = run.rounds.iloc[::-1].iloc[::every].iloc[::-1]  # so that the last is among them
    told = f"{len(run.rounds):,} rounds." + (f" Every {every}th is shown." if every > 1 else "")
    return {"rounds": records(frame), "rounds_shown": told}


def _gain(run: RunTables, gain: dict[str, Any]) -> dict[str, Any]:
    gap = run.gap or {}
    names, titles = gap["clients"], gap.get("kinds") or {}
    first = plots.first_kind(gap)
    matrices = [
        {
            "title": f"{titles[kind]['title']}: distance between every two clients "
            f"({titles[kind]['made_from']}; {titles[kind]['range']})",
            "rows": names,
            "columns": names,
            "cells": shades(pairs),
        }
        for kind, pairs in sorted((gap.get("pairs") or {}).items(), key=lambda one: one[0] != first)
        if kind in titles and kind != "mmd_p" and len(names) <= PAIRS_SHOWN
    ]
    return {**gain, "matrices": matrices, "checks": gap.get("checks", [])}


def _figures(run: RunTables, frame: pd.DataFrame) -> dict[str, list[dict[str, Any]]]:
    found: dict[str, list[dict[str, Any]]] = {
        "places": [], "differences": [], "learning": [], "gap": []
    }  # fmt: skip
    if len(run.heads) > 1:
        told = "; ".join(
            f"{row['title']}: {report.percent(row['home'])} at home, "
            f"{report.percent(row['everywhere'])} everywhere"
            for row in report.heads(run)
        )
        for place in ("home", "everywhere"):
            drawn = plots.home_and_everywhere(run, place)
            found["places"].append(figure(drawn, place, f"Accuracy {place}. {told}."))
    if frame["difference"].notna().any():
        better = int((frame["difference"] > 0).sum())
        told = (
            f"Shared minus alone for {len(frame)} clients: above zero for {better}. "
            "The table below has all figures."
        )
        caption = "Dots: the difference; lines: its interval. Blue gains, orange is harmed."
        found["differences"].append(figure(plots.differences(run), "differences", told, caption))
    if len(run.curves):
        first, last = run.curves.iloc[0], run.curves.iloc[-1]
        told = (
            f"Mean accuracy over clients from {report.percent(first['mean'])} in round "
            f"{first['round']:.0f} to {report.percent(last['mean'])} in round {last['round']:.0f}."
        )
        found["learning"].append(figure(plots.learning_curves(run), "learning", told))
    if run.gap is not None and plots.first_kind(run.gap) != "none":
        drawn = plots.gap_and_gain(run)
        told = "Each client's distance to the others against its gain. The tables have all figures."
        found["gap"].append(figure(drawn, "gap", told))
    return found


def _contents(content: Mapping[str, Any]) -> list[tuple[str, str]]:
    warned = len(content["warnings"])
    titles = {
        "places": "At home and everywhere",
        "clients": "Client by client",
        "learning": "Training",
        "holdings": "Who has what",
        "gaps": "Distances",
        "fairness": "Fairness",
        "examples": "Example images",
        "privacy": "Privacy and cost",
        "warnings": f"Warnings ({warned})",
        "reproduce": "Make it again",
    }
    absent = {key for key in ("holdings", "examples") if not content[key]}
    return [(anchor, title) for anchor, title in titles.items() if anchor not in absent]
