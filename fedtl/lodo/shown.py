"""What a person sees while domains are left out, and at the end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fedtl.forecast import Forecast
from fedtl.interrupts import Interrupts
from fedtl.ready_features import OpenedData
from fedtl.terminal import percent, plain_table, shown


class Progress:
    """Says which run is in which round, and gathers what the runs have to note."""

    def __init__(self, console: Any, interrupts: Interrupts) -> None:
        self._console, self._interrupts = console, interrupts
        self._status = console.status("")
        self._what, self._rounds = "", 0
        self.notes: list[str] = []

    def begin(self, what: str) -> None:
        """The next run."""
        self._what = what
        self._say(what)

    def planned(self, opened: OpenedData, plan: Forecast) -> None:
        """How many rounds there will be."""
        self._rounds = plan.rounds

    def extracting(self, done: int, total: int) -> None:
        """Pictures through the trunk, once for all runs."""
        self._say(f"examples through the trunk: {done:,} of {total:,}", quiet=done < total)
        self._interrupts.check("interrupted while examples went through the trunk")

    def ready(self, notes: Sequence[str], names: Sequence[str]) -> None:
        """Gathers notes."""
        self.notes += notes

    def round_done(self, row: Mapping[str, Any], updates: Any) -> None:
        """Moves on."""
        self._say(f"{self._what}: round {row['round']} of {self._rounds}", quiet=True)

    def noted(self, note: str) -> None:
        """Gathers one."""
        self.notes.append(note)

    def comparing(self, reference: str) -> None:
        """There are no references here."""

    def finished(self, summary: Mapping[str, Any], verdict: Any, folder: Path) -> None:
        """One run is whole."""

    def close(self) -> None:
        """Leaves the screen in order."""
        self._status.stop()

    def _say(self, text: str, *, quiet: bool = False) -> None:
        if self._console.is_terminal:
            self._status.update(shown(text))
            self._status.start()
        elif not quiet:
            self._console.print(shown(text), soft_wrap=True)


def show(console: Any, facts: Mapping[str, Any], out: Path) -> None:
    """The table of ``fedtl lodo``."""
    several = len(facts["domains"][0]["seeds"]) > 1
    table = plain_table(
        "left out", "n", "accuracy", "95 %", *(["spread"] if several else []),
        "own tests", "with it", "its own",
    )  # fmt: skip
    for one in facts["domains"]:
        low, high = one["interval"]
        table.add_row(
            shown(one["domain"]),
            f"{one['examples']:,}",
            percent(one["accuracy"]),
            f"{100 * low:.1f} - {100 * high:.1f}",
            *([percent(one["spread"])] if several else []),
            *(percent(value) for value in one["references"].values()),
        )
    console.print(table)
    console.print(f"mean over domains {percent(facts['mean'])}")
    for note in facts["notes"]:
        console.print(f"[yellow]note[/] {shown(note)}")
    console.print(f"{shown(str(out))}", soft_wrap=True)
