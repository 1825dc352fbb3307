"""What whoever runs the server sees before the first round: who is there, who is missing, how long
it will still be waited, and what each client does to get ready."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from contextlib import suppress
from typing import Any

from fedtl.deployment.class_table import ClassTable
from fedtl.deployment.gathering import GatheringObserver
from fedtl.terminal import Terminal, shown

REMINDER_SECONDS = 30.0
"""Between two lines that say the same, where nothing moves on the screen."""


class RollCall(GatheringObserver):
    """Prints the gathering of clients; on a terminal the countdown moves."""

    def __init__(self, terminal: Terminal) -> None:
        self._console = terminal.console
        self._status = self._console.status("")
        self._present: set[str] = set()
        self._missing: frozenset[str] = frozenset()
        self._reminder = float("inf")
        self._steps: dict[str, tuple[int, int]] = {}

    def joined(self, name: str, facts: Mapping[str, Any]) -> None:
        """One line on a client."""
        self._present.add(name)
        with_cores = f"{facts['threads']} threads" if facts["device"] == "cpu" else "GPU"
        self._say(
            f"[green]here[/] {shown(name)}: {facts['examples']:,} examples, "
            f"{len(facts['classes'])} classes, {with_cores}"
        )

    def left(self, name: str, reason: str) -> None:
        """One line on a client that is gone."""
        self._present.discard(name)
        self._say(f"[yellow]gone[/] {shown(name)}: {shown(reason)}")

    def refused(self, name: str, reason: str) -> None:
        """One line on a client that cannot take part."""
        self._say(f"[yellow]refused[/] {shown(name or 'somebody')}: {shown(reason)}")

    def waiting(self, names: Collection[str], seconds_left: float) -> None:
        """A countdown on a terminal, elsewhere a line now and then."""
        missing = frozenset(names)
        text = f"waiting for {shown(', '.join(sorted(missing)) or 'clients to be approved')}"
        text += f": {len(self._present)} here, {seconds_left:.0f} s left"
        if self._console.is_terminal:
            self._move(text)
        elif missing != self._missing or seconds_left <= self._reminder - REMINDER_SECONDS:
            self._missing, self._reminder = missing, seconds_left
            self._say(text)

    def classes(self, table: ClassTable) -> None:
        """The classes, and who lacks which."""
        self._say(f"{len(table.classes)} classes: {shown(', '.join(table.classes))}")
        for line in table.lines():
            self._say(f"  {line}")

    def sending_weights(self, name: str, done: int, total: int) -> None:
        """How far the backbone is."""
        self._step(name, "backbone on its way", done, total)

    def preparing(self, name: str, done: int, total: int) -> None:
        """How far the features are."""
        self._step(name, "examples through the trunk", done, total)

    def prepared(self, name: str, facts: Mapping[str, Any]) -> None:
        """One line on a client that is ready."""
        self._say(
            f"[green]ready[/] {shown(name)}: {facts['train']:,} to train on, "
            f"{facts['test']:,} to be judged on"
        )

    def close(self) -> None:
        """Leave the screen in order."""
        with suppress(OSError):
            self._status.stop()

    def _step(self, name: str, what: str, done: int, total: int) -> None:
        if self._console.is_terminal:
            self._move(f"{shown(name)}: {what}, {done:,} of {total:,}")
        elif done == total and self._steps.get(name + what) != (done, total):
            self._say(f"{shown(name)}: {what}, all {total:,}")
        self._steps[name + what] = done, total

    def _move(self, text: str) -> None:
        self._status.update(text)
        self._status.start()

    def _say(self, line: str) -> None:
        self._console.print(line, highlight=False, soft_wrap=True)
