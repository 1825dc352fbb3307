"""Tables that commands print once: choices, findings, stored features, seeds, certificates."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from datetime import datetime
from math import prod
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from fedtl.doctor import Finding
from fedtl.results.heads import judged_heads
from fedtl.terminal import HEADS, percent, plain_table, shown, size
from fedtl.transfer.features import FeatureStore, StoreEntry

if TYPE_CHECKING:
    from fedtl.transfer.cuts import CutPoint  # imports torch


def print_attempt(console: Console, engine: str, seconds: float, reason: str | None) -> None:
    """One engine of ``fedtl parity`` is done."""
    console.print(f"[dim]{shown(engine)}: {shown(reason or f'{seconds:.1f} s')}[/]")


def print_certificate(console: Console, facts: Mapping[str, Any]) -> None:
    """``fedtl parity``: what each engine gave, and whether all gave the same."""
    console.print(
        f"\n[bold]{shown(facts['name'])}[/] [dim]scenario {facts['scenario_hash'][:16]}[/]"
    )
    table = plain_table("engine", "head", "cohorts", "batches", "bytes", "s")
    for one in facts["engines"]:
        if one["not_run"]:
            table.add_row(shown(one["engine"]), "not run", "", "", "", "")
            continue
        hashes = [one[key][:8] for key in ("head_sha256", "cohorts_blake2b", "batches_blake2b")]
        moved = f"{one['bytes_up'] + one['bytes_down']:,}"
        table.add_row(shown(one["engine"]), *hashes, moved, f"{one['seconds']:.1f}")
    console.print(table)
    if facts["equal"]:
        ran = sum(not one["not_run"] for one in facts["engines"])
        console.print(f"[bold green]equal[/]: {ran} ways to run it, one answer to the last bit")
        head = next(one["head_sha256"] for one in facts["engines"] if not one["not_run"])
        console.print(f"head {head}", soft_wrap=True)
    else:
        console.print("[bold red]not equal[/]")


def print_choices(console: Console, found: Mapping[str, list[str]]) -> None:
    """``fedtl list``."""
    for kind, names in found.items():
        console.print(f"[bold]{kind}[/]")
        console.print(f"  {shown(', '.join(names))}\n", highlight=False)


def print_cuts(console: Console, points: Sequence[CutPoint]) -> None:
    """``fedtl cuts``."""
    table = plain_table("cut", "first module behind", "activations", "each", "parameters", "MFLOPs")
    for point in points:
        shape = " x ".join(map(str, point.shape))
        table.add_row(
            str(point.blocks),
            shown(point.name),
            shape,
            size(4 * prod(point.shape)),
            f"{point.parameters:,}",
            f"{point.flops / 1e6:,.1f}",
        )
    console.print(table)
    console.print("parameters and MFLOPs of one example: behind the cut, without the head")
    console.print("In a scenario: transfer.cut = a number or a name, transfer.mode = how it trains")


def print_findings(console: Console, findings: Sequence[Finding]) -> None:
    """``fedtl doctor`` and ``fedtl client check``."""
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(min_width=2)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for finding in findings:
        mark = "[green]ok[/]" if finding.ok else "[red]no[/]"
        table.add_row(mark, finding.what, shown(finding.detail))
        if not finding.ok and finding.fix:
            table.add_row("", "", shown(finding.fix))
    console.print(table)


def print_entries(console: Console, store: FeatureStore, entries: Sequence[StoreEntry]) -> None:
    """``fedtl cache ls``."""
    table = plain_table("key", "backbone", "examples", "size", "last used")
    for entry in entries:
        used = f"{datetime.fromtimestamp(entry.last_used):%Y-%m-%d %H:%M}"
        table.add_row(
            entry.key[:16], shown(entry.backbone), f"{entry.images:,}", size(entry.num_bytes), used
        )
    console.print(table if entries else "the store is empty")
    console.print(shown(str(store.root)), soft_wrap=True)


def print_seeds(console: Console, summaries: Sequence[Mapping[str, Any]]) -> None:
    """Accuracy over several seeds: mean and standard deviation, not one lucky draw."""
    seeds = ", ".join(str(summary["seed"]) for summary in summaries)
    console.print(f"\n[bold]Mean over seeds {seeds}[/]")
    table = plain_table("head", "own tests", "deviation", "everybody's", "deviation")
    judged = [judged_heads(one) for one in summaries]
    for name in HEADS:
        found = [heads[name] for heads in judged if name in heads]
        if len(found) == len(summaries):
            columns = [[one[metric] for one in found] for metric in METRICS]
            table.add_row(HEADS[name], *(cell for column in columns for cell in _spread(column)))
    console.print(table)


METRICS = ("accuracy", "accuracy_everyone")


def _spread(values: Sequence[float | None]) -> tuple[str, str]:
    """Mean and standard deviation over seeds, undefined where one of them is."""
    known = [value for value in values if value is not None]
    if len(known) < len(values):
        return percent(None), percent(None)
    return percent(statistics.mean(known)), percent(statistics.stdev(known))


def print_runs_compared(console: Console, facts: Mapping[str, Any]) -> None:
    """``fedtl compare``: the runs, what they differ in, and which differences are certain."""
    table = plain_table("run", "strategy", "seeds", "rounds", "own tests", "worst 10 %", "all")
    for run in facts["runs"]:
        rounds = sorted(set(run["rounds"]))
        mark = " (interrupted)" if run["interrupted"] else ""
        table.add_row(
            shown(run["name"]),
            shown(str(run["strategy"])),
            str(len(run["seeds"])),
            "-".join(map(str, rounds[:1] + rounds[1:][-1:])) + mark,
            *(percent(run[key]) for key in ("home", "worst_decile", "everywhere")),
        )
    console.print(table)
    if facts["differences"]:
        console.print("\n[bold]They differ in[/]")
    for one in facts["differences"]:
        values = ", ".join("unset" if v is None else str(v) for v in one["values"])
        console.print(f"  {shown(one['key'])}: {shown(values)}", soft_wrap=True)
    console.print()
    table = plain_table("pair", "by", "own tests", "interval", "p (Holm)", "all", "p (Holm)")
    for pair in facts["pairs"]:
        count = "+".join(map(str, pair["n"])) if isinstance(pair["n"], list) else pair["n"]
        home, everywhere = pair["home"], pair["everywhere"]
        ends = home["interval"]
        table.add_row(
            f"{shown(pair['b'])} - {shown(pair['a'])}",
            f"{count} {pair['unit']}" + ("" if pair["paired"] else ", unpaired"),
            _points(home["difference"]),
            "-" if ends is None else f"{_points(ends[0])} to {_points(ends[1])}",
            _p_value(home["p_holm"]),
            _points(everywhere["difference"]),
            _p_value(everywhere["p_holm"]),
        )
    console.print(table)
    for pair in facts["pairs"]:
        console.print(
            f"[bold]{shown(pair['b'])} and {shown(pair['a'])}[/]: {shown(pair['says'])}",
            soft_wrap=True,
        )
    for note in facts["notes"]:
        console.print(f"[yellow]note[/] {shown(note)}", soft_wrap=True)


def _points(difference: float | None) -> str:
    return "-" if difference is None else f"{100 * difference:+.1f}"


def _p_value(value: float | None) -> str:
    if value is None:
        return "-"
    return "< 0.001" if value < 0.001 else f"{value:.3f}"
