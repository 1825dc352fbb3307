"""An audit on a terminal, in plain words."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from fedtl.results.audit_file import AUDIT
from fedtl.terminal import percent, plain_table, sentences, shown

NAMES = {"loss": "small loss", "lira": "likelihood ratio"}


def print_audit(facts: Mapping[str, Any], path: Path, console: Console) -> None:
    """Print what ``audit.json`` holds, most important first."""
    console.print(f"[bold]Audit[/] of {shown(path.name)}\n")
    lower, unit = facts["lower"], facts["unit"]
    upper = "nothing" if facts["upper"] is None else f"epsilon at most {facts['upper']:.3g}"
    found = "no lower bound"
    if lower["epsilon"] is not None:
        found = (
            f"epsilon at least {lower['epsilon']:.3g} "
            f"({percent(lower['confidence'])} sure; {lower['correct']} of {lower['guesses']} "
            f"guesses about {lower['canaries']} coins were right)"
        )
    rows = [("promised", f"{upper}, for each {unit}"), ("shown", found)]
    console.print(sentences([*rows, *([("", lower["note"])] if lower["note"] else [])]))
    console.print("\n[bold]Who was in the training, by the head alone[/]")
    table = plain_table("attack", "AUC", "by chance", "found at 1 % false", "at 0.1 %")
    for attack in facts["membership"]:
        chance = attack["chance"]
        table.add_row(
            NAMES.get(attack["attack"], shown(attack["attack"])),
            "-" if attack["auc"] is None else f"{attack['auc']:.3f}",
            "-" if chance is None else f"0.5 +- {chance:.3f}",
            percent(attack["tpr_at_1%"]),
            percent(attack["tpr_at_0.1%"]),
        )
    console.print(table)
    if facts["leakage"]:
        console.print("\n[bold]What round 1 gave away of single clients[/]")
    for fact in facts["leakage"]:
        console.print(f"{shown(fact['what'])}: {shown(fact['found'])}")
        console.print(f"[dim]  {shown(fact['note'])}[/]")
    console.print()
    below = [("[yellow]note[/]", note) for note in facts["notes"]]
    below += [("[bold red]warning[/]", warning) for warning in facts["warnings"]]
    if below:
        console.print(sentences(below))
    console.print(f"The figures are in {shown(str(path / AUDIT))}", soft_wrap=True)
