"""The gap on a terminal: most important first, what is undefined as a dash."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from fedtl.evaluation.gap_kinds import SAMPLED
from fedtl.evaluation.gap_words import domain_means
from fedtl.terminal import percent, plain_table, shown
from fedtl.types import Float64

MATRIX_CLIENTS = 12
"""Clients up to which every two are shown; more are summarised."""

ROWS_SHOWN = 12
NEAR_AND_FAR = 3
NAME_WIDTH = 24

CHANCE = 0.05


def print_gap(facts: Mapping[str, Any], console: Console, then: str) -> None:
    """Print what ``fedtl.gap.measure_gap``, or ``fedtl server gap``, found.

    Args:
        then: the commands to type next.
    """
    num, domains = len(facts["clients"]), set(facts["domains"]) - {""}
    inside = f" in {len(domains)} domains" if len(domains) > 1 else ""
    backbone = facts["backbone"]
    console.print(
        f"[bold]{shown(facts['name'])}[/] [dim]gaps before training[/]: {num} "
        f"client{'s' if num > 1 else ''}{inside}, {sum(facts['examples']):,} training examples, "
        f"{len(facts['classes'])} classes, features of {shown(backbone['name'])} "
        f"(weights {shown(backbone['weights'])})\n"
    )
    _print_pairs(facts, console)
    console.print("[bold]Each client against all others together[/]")
    console.print(_rest_table(facts))
    console.print(f"[dim]{_legend(facts)}[/]\n")
    console.print("[bold]How well the backbone's features suit the task[/]")
    console.print(_score_table(facts))
    console.print(
        "[dim]Higher is better: for choosing a backbone, with fedtl gap --backbones. Between "
        "clients scores also follow from how many classes and examples each has.[/]\n"
    )
    if facts["checks"]:
        console.print("[bold]What goes into the backbone[/]")
    for found in facts["checks"]:
        _print_check(found, console)
    if facts["checks"]:
        console.print()
    for note in facts["notes"]:
        console.print(f"[yellow]note[/] {shown(note)}")
    console.print(f"[dim]{_how_made(facts)}[/]")
    console.print(f"\n[bold]What to expect[/] {shown(facts['expectation'])}")
    console.print(f"\nNext: {shown(then)}")


def _print_pairs(facts: Mapping[str, Any], console: Console) -> None:
    if facts["pairs"] is None or len(facts["clients"]) < 2:
        return
    for name, question in (
        ("conditional", "Feature gap: how differently the same class looks at two clients"),
        ("js", "Label gap: how differently the classes are mixed"),
    ):
        matrix = _array(facts["pairs"][name])
        console.print(f"[bold]{question}[/]")
        if len(matrix) <= MATRIX_CLIENTS:
            console.print(_matrix(facts, matrix))
        else:
            _summarise(facts, matrix, console)
        inside, between = domain_means(facts["domains"], matrix)
        if np.isfinite(between):
            console.print(f"Mean within a domain {figure(inside)}, between {figure(between)}")
        console.print(f"[dim]{shown(facts['kinds'][name]['range'])}[/]\n")


def _matrix(facts: Mapping[str, Any], matrix: Float64) -> Table:
    """Every two clients; columns carry the numbers of the rows."""
    table = plain_table("", *(str(i + 1) for i in range(len(matrix))))
    for i, name in enumerate(facts["clients"]):
        cells = ["." if i == j else figure(matrix[i, j]) for j in range(len(matrix))]
        table.add_row(f"{i + 1} {_short(name)}", *cells)
    return table


def _summarise(facts: Mapping[str, Any], matrix: Float64, console: Console) -> None:
    """Many clients: means by domain, the nearest and the farthest two."""
    names, domains = facts["clients"], np.array(facts["domains"])
    kinds = sorted(set(domains.tolist()))
    if 1 < len(kinds) <= MATRIX_CLIENTS:
        table = plain_table("mean between", *map(_short, kinds))
        off = np.where(np.eye(len(matrix), dtype=bool), np.nan, matrix)
        for one in kinds:
            blocks = [off[np.ix_(domains == one, domains == other)] for other in kinds]
            table.add_row(_short(one), *(figure(_mean(block)) for block in blocks))
        console.print(table)
    rows, columns = np.triu_indices(len(matrix), 1)
    values = matrix[rows, columns]
    known = np.flatnonzero(np.isfinite(values))
    if not len(known):
        console.print("undefined for every two clients")
        return
    order = known[np.argsort(values[known], kind="stable")]
    quartiles = np.quantile(values[known], [0, 0.25, 0.5, 0.75, 1])
    words = ("smallest", "lower quartile", "median", "upper quartile", "largest")
    spread = ", ".join(f"{word} {figure(q)}" for word, q in zip(words, quartiles, strict=True))
    console.print(f"{len(known):,} pairs: {spread}")
    for word, places in (("nearest", order[:NEAR_AND_FAR]), ("farthest", order[::-1][:3])):
        shown_pairs = [
            f"{_short(names[rows[p]])} - {_short(names[columns[p]])} {figure(values[p])}"
            for p in places.tolist()
        ]
        console.print(f"{word}: {'; '.join(shown_pairs)}")


def _rest_table(facts: Mapping[str, Any]) -> Table:
    """The farthest clients first, where there are many."""
    rest = {name: _array(values) for name, values in facts["rest"].items()}
    variance = facts["scale"]["variance"] or np.nan
    order = np.arange(len(facts["clients"]))
    if len(order) > ROWS_SHOWN:
        order = np.argsort(-np.nan_to_num(rest["conditional"], nan=-1.0), kind="stable")
    named = zip(facts["clients"], facts["domains"], strict=True)
    told = not all(name.startswith(domain) for name, domain in named)
    columns = ("examples", "labels", "features", "Frechet", "A-dist.", "MMD p")
    table = plain_table("client", *(["domain"] if told else []), *columns)
    for k in order[:ROWS_SHOWN].tolist():
        table.add_row(
            _short(facts["clients"][k]),
            *([_short(facts["domains"][k])] if told else []),
            f"{facts['examples'][k]:,}",
            figure(rest["js"][k]),
            figure(rest["conditional"][k]),
            percent(_known(rest["frechet"][k] / variance)),
            figure(rest["a_distance"][k]),
            figure(rest["mmd_p"][k], 3),
        )
    if len(order) > ROWS_SHOWN:
        table.add_row(f"and {len(order) - ROWS_SHOWN} more")
    return table


def _legend(facts: Mapping[str, Any]) -> str:
    text = (
        "Labels: label gap. Features: feature gap, within classes. Frechet "
        "in per cent of the features' variance, A-distance 0 (cannot be told apart) to 2 (always) "
        "and MMD see both gaps together."
    )
    p = _array(facts["rest"]["mmd_p"])
    known = np.isfinite(p)
    if known.any():
        text += (
            f" MMD: {int((p[known] < CHANCE).sum())} of {int(known.sum())} clients differ from the "
            f"rest at p < {CHANCE}; chance alone would give about {CHANCE * known.sum():.1g}."
        )
    return text


def _score_table(facts: Mapping[str, Any]) -> Table:
    scores, found = facts["scores"], facts["transferability"]
    table = plain_table("client", *(scores[name]["title"] for name in scores))
    table.add_row("everybody", *(figure(_known(found["all"][name]), 3) for name in scores))
    clients = found["clients"]
    order = np.arange(len(clients))
    if len(order) > ROWS_SHOWN:
        worst = [own["logme"] for own in clients]
        order = np.argsort(np.nan_to_num(_array(worst), nan=np.inf), kind="stable")
    for k in order[:ROWS_SHOWN].tolist():
        cells = (figure(_known(clients[k][name]), 3) for name in scores)
        table.add_row(_short(facts["clients"][k]), *cells)
    if len(order) > ROWS_SHOWN:
        table.add_row(f"and {len(order) - ROWS_SHOWN} more with a higher LogME, or none")
    return table


def _print_check(found: Mapping[str, Any], console: Console) -> None:
    colour = "red" if found["severity"] == "warning" else "yellow"
    clients = found["clients"]
    more = f" and {len(clients) - 5} more" if len(clients) > 5 else ""
    who = f" ({', '.join(clients[:5])}{more})" if clients else ""
    console.print(f"[{colour}]{found['severity']}[/] {shown(found['what'] + who)}")
    console.print(f"  {shown(found['change'])} {shown(found['gain_note'] or '')}")


def _how_made(facts: Mapping[str, Any]) -> str:
    sampling, kinds = facts["sampling"], (*facts["kinds"].values(), *facts["scores"].values())
    titles = ", ".join(kind["title"] for kind in kinds if kind["made_from"] == SAMPLED)
    if not sampling:
        return (
            "All of it is made from what each client summed up at home. Not here, for they need "
            f"rows side by side: {titles}."
        )
    rows = f"up to {sampling['most_rows']} training rows of each client, seed {sampling['seed']}"
    if "source_rows" in sampling:
        rows += f"; NCE and LEEP {sampling['source_rows']:,} in all"
    return (
        f"Made from rows side by side, so in simulation only ({rows}): {titles}. All else is made "
        "from what each client sums up at home, so it can be had of real clients too. It took "
        f"{facts['seconds']:.1f} s."
    )


def figure(value: Any, digits: int = 2) -> str:
    """A number for a table; undefined as a dash, tiny as below the last digit."""
    if value is None or not np.isfinite(value):
        return "-"
    return f"{value:.{digits}f}" if abs(value) < 100 else f"{value:.0f}"


def _array(values: Sequence[Any]) -> Float64:
    return np.array(values, dtype=np.float64)  # None becomes NaN


def _known(value: Any) -> float | None:
    return None if value is None or not np.isfinite(value) else float(value)


def _mean(values: Float64) -> float:
    known = values[np.isfinite(values)]
    return float(known.mean()) if len(known) else np.nan


def _short(name: str) -> str:
    return shown(name if len(name) <= NAME_WIDTH else name[: NAME_WIDTH - 1] + "…")
