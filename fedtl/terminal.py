"""What a person sees: the plan, a live table with a progress bar, the verdict.

On a terminal it moves; elsewhere (a log file, CI) it is plain lines, one a round.
"""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from fedtl.cost_card import cost_line
from fedtl.errors import printable
from fedtl.evaluation.verdicts import Verdict
from fedtl.forecast import Forecast, called, cut_words, seen_words
from fedtl.privacy_card import privacy_lines, privacy_words
from fedtl.ready_features import OpenedData
from fedtl.results.heads import judged_heads
from fedtl.scenario.compatibility import CLOSED_FORMS
from fedtl.scenario.schema import Scenario
from fedtl.scenario.strategies import Flower
from fedtl.transfer.views import in_views
from fedtl.types import ClientUpdates

ROWS_SHOWN = 10
"""Rounds in the live table; all of them are in rounds.parquet."""

FAILURES_SHOWN = 5
"""Missing clients named under a round; all of them are in clients.parquet."""

COLUMNS = (
    "round",
    "accuracy",
    "balanced",
    "worst 10 %",
    "  loss",
    "  clients",
    "     moved",
    "  s",
)
"""Of the table of rounds; the widths hold where it is printed line by line."""

ALIGNED = 50
"""Characters of the longest command that others' explanations are moved to the right for."""

SPARED = frozenset({COLUMNS[2], COLUMNS[6], COLUMNS[7]})
"""Columns that a narrow terminal does without."""


def shown(text: str) -> str:
    """Text from outside, as it is: no markup, no control character."""
    return escape(printable(text))


def size(count: float) -> str:
    """Bytes in a unit that reads well."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024 or unit == "GiB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    raise AssertionError("unreachable")


def duration(seconds: float | None) -> str:
    """Seconds in a form that reads well; an estimate that is not known is said to be so."""
    if seconds is None:
        return "unknown"
    if seconds < 1:
        return "under 1 s" if seconds > 0 else "none"
    if seconds < 120:
        return f"about {seconds:.0f} s"
    minutes = seconds / 60
    return f"about {minutes:.0f} min" if minutes < 120 else f"about {minutes / 60:.1f} h"


def _plain_row(cells: Sequence[str]) -> str:
    return "  ".join(cell.rjust(len(name)) for cell, name in zip(cells, COLUMNS, strict=True))


def percent(value: Any) -> str:
    """A fraction as per cent; undefined as a dash."""
    return "-" if value is None else f"{100 * value:.1f} %"


def loss_text(value: float | None) -> str:
    """A loss in five characters or so."""
    if value is None:
        return "-"
    return f"{value:.3f}" if value < 1000 else f"{value:.1e}"


def plain_table(*columns: str) -> Table:
    """A table without frame, numbers to the right: easy to read and to copy."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i == 0 else "right", no_wrap=True)
    return table


def sentences(rows: Sequence[tuple[str, str]]) -> Table:
    """What each sentence is of, with markup, and the sentence: wrapped beside it, not under it."""
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 1, 0, 0))
    for what, sentence in rows:
        table.add_row(what, shown(sentence))
    return table


def plan_table(opened: OpenedData, plan: Forecast) -> Table:
    """What will happen and what it will cost."""
    scenario, backbone = opened.scenario, opened.backbone
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    domains = f" in {plan.domains} domains" if plan.domains > 1 else ""
    what = called(opened)
    rows = {
        "data": f"{scenario.data.source}: {plan.examples:,} {what}, {plan.classes} classes, "
        f"{plan.train:,} to train on{in_views(scenario.augmentation)}, "
        f"{plan.test:,} to be judged on",
        "clients": f"{plan.clients}{domains}, {scenario.clients.partition} split, "
        f"{plan.cohort} in each round",
        "backbone": f"{backbone.label}, weights {backbone.weights_source}, "
        + ("frozen, " if opened.tail is None else "frozen up to the cut, ")
        + ("features are in the store" if plan.cached else seen_words(backbone)),
        "cut": cut_words(opened.tail, plan, size(plan.stored_each)),
        "training": f"{strategy_words(scenario, plan)}, {scenario.head.kind} head of "
        f"{plan.head_parameters - plan.tail_parameters:,} parameters",
        "traffic": f"{size(plan.bytes_down)} down, {size(plan.bytes_up)} up",
        "memory": f"about {size(plan.memory_bytes)}, features {size(plan.feature_bytes)} on disk",
        "time": f"trunk {duration(plan.extract_seconds)}, rounds {duration(plan.train_seconds)}"
        + (f", from scratch {duration(plan.scratch_seconds)}" if plan.scratch_epochs else "")
        + " (estimates)",
        "privacy": privacy_words(scenario, plan.epsilon),
    }
    for name, text in rows.items():
        if text is not None:
            table.add_row(f"[bold]{name}[/]", shown(text))
    return table


def strategy_words(scenario: Scenario, plan: Forecast) -> str:
    """The strategy and what it has clients do, in half a line."""
    section = scenario.strategy
    name = f"{section.name} {section.class_}" if isinstance(section, Flower) else section.name
    if plan.task == "statistics":
        return f"{name}, each client sums statistics once"
    if plan.task == "gradient":
        return f"{name}, up to {plan.rounds} rounds of one gradient"
    head = scenario.head
    first = f"{head.initial.replace('_', ' ')} first, " if head.from_statistics else ""
    epochs = scenario.training.local_epochs
    return (
        f"{first}{name}, {plan.rounds} round{'s' * (plan.rounds != 1)} of {epochs} local "
        f"epoch{'s' * (epochs != 1)}"
    )


class PatientConsole(Console):
    """Goes on in silence when nobody reads any more: a run is not lost to ``| head``."""

    def __init__(self, **options: Any) -> None:
        super().__init__(highlight=False, emoji=False, **options)  # text is shown as it is

    def on_broken_pipe(self) -> None:
        """Point the stream to nowhere, so that nothing later fails on it."""
        self.quiet = True
        with open(os.devnull, "w") as nowhere, suppress(OSError, ValueError):
            os.dup2(nowhere.fileno(), self.file.fileno())


class Terminal:
    """Shows one run on a console. Use as a context, so that the screen is left in order."""

    def __init__(self, console: Console, command: str | None = None) -> None:
        self.console = console
        self._command = command  # what the user called, for commands to type next; None: none
        self._scenario = Scenario(name="unnamed")
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=console,
        )
        self._task = self._bar.add_task("", total=None, visible=False)
        self._rows: list[tuple[str, ...]] = []
        self._names: Sequence[str] = ()
        self._live: Live | None = None
        self._rounds, self._what = 0, "examples"

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()

    def planned(self, opened: OpenedData, plan: Forecast) -> None:
        """Prints the plan."""
        self._rounds, self._scenario = plan.rounds, opened.scenario
        self._what = called(opened)
        self.console.print(f"[bold]{shown(opened.scenario.name)}[/] [dim]the plan[/]")
        self.console.print(plan_table(opened, plan))
        self.console.print()

    def begin(self, scenario: Scenario) -> None:
        """For a run whose data are elsewhere: there is no plan to print."""
        self._rounds, self._scenario = scenario.rounds, scenario

    def extracting(self, done: int, total: int) -> None:
        """Moves the bar of examples."""
        if not self.console.is_terminal:
            if done == total:
                self.console.print(f"{total:,} {self._what} went through the trunk once")
            return
        self._show(f"{self._what} through the trunk", done, total)

    def ready(self, notes: Sequence[str], names: Sequence[str]) -> None:
        """Says what was found on the way."""
        self._stop()
        self._names = names
        for note in notes:
            self.noted(note)
        if not self.console.is_terminal:
            self.console.print(_plain_row(COLUMNS), style="bold")

    def round_done(self, row: Mapping[str, Any], updates: ClientUpdates) -> None:
        """Adds a line to the table."""
        moved = row["bytes_up"] + row["bytes_down"]
        cells = (
            str(row["round"]),
            percent(row["accuracy"]),
            percent(row["balanced_accuracy"]),
            percent(row["worst_decile_accuracy"]),
            loss_text(row["loss"]),
            f"{row['accepted']}/{row['cohort']}",
            size(moved),
            f"{row['seconds']:.2f}",
        )
        self._rows.append(cells)
        failed = updates.failures
        for failure in failed[:FAILURES_SHOWN]:
            name = shown(self._names[failure.client])
            self.console.print(f"[yellow]{name}[/] {shown(failure.reason)}", soft_wrap=True)
        if len(failed) > FAILURES_SHOWN:
            more = len(failed) - FAILURES_SHOWN
            self.console.print(f"and {more} more clients are missing, see clients.parquet")
        if self.console.is_terminal:
            self._show("rounds", row["round"], self._rounds)
        else:
            self.console.print(_plain_row(cells))

    def noted(self, note: str) -> None:
        """Prints a line above the table."""
        self.console.print(sentences([("[yellow]note[/]", note)]))

    def comparing(self, reference: str) -> None:
        """Says which reference is being trained."""
        if self.console.is_terminal:
            self._show(f"reference {reference}", None, None)

    def finished(self, summary: Mapping[str, Any], verdict: Verdict, folder: Path) -> None:
        """Prints the comparison, the verdict and what to type next."""
        self._stop()
        self.console.print()
        self.console.print(comparison_table(summary))
        self.console.print(f"\n[bold]{shown(verdict.headline)}[/]")
        for line in verdict.lines:
            self.console.print(shown(line), highlight=False)
        if (rate := summary["final"].get("backdoor_success")) is not None:
            self.console.print(
                f"The backdoor works on {percent(rate)} of the honest clients' triggered examples.",
                highlight=False,
            )
        if (excess := summary["final"].get("excess_loss")) is not None:
            self.console.print(
                f"The federated head's training loss is {max(0.0, excess):.3g} above that of the "
                "pooled optimum.",
                highlight=False,
            )
        for line in privacy_lines(summary):
            self.console.print(shown(line), highlight=False)
        if (facts := summary.get("privacy")) is not None:
            assumed = [("  assumed:", sentence) for sentence in facts["assumptions"]]
            self.console.print(sentences(assumed))
        seconds = summary["seconds"]
        self.console.print(
            f"Moved {size(summary['bytes_up'] + summary['bytes_down'])} "
            f"in {seconds['total']:.1f} s (trunk {seconds['extract']:.1f}, "
            f"rounds {seconds['train']:.1f}, references {seconds['references']:.1f}); "
            f"everything is in {shown(str(folder))}",
            highlight=False,
            soft_wrap=True,
        )
        if (cost := cost_line(summary.get("cost"))) is not None:
            self.console.print(cost, highlight=False, soft_wrap=True)
        if self._command is None:
            return
        self.console.print("\n[bold]Next[/]")
        for command in next_commands(self._scenario, self._command, folder):
            self.console.print(f"  {shown(command)}", highlight=False, soft_wrap=True)

    def _table(self) -> Table:
        wide = self.console.width >= sum(len(name) + 2 for name in COLUMNS)
        kept = [i for i, name in enumerate(COLUMNS) if wide or name not in SPARED]
        table = plain_table(*(COLUMNS[i] for i in kept))
        for cells in self._rows[-ROWS_SHOWN:]:
            table.add_row(*(cells[i] for i in kept))
        return table

    def _show(self, what: str, done: int | None, total: int | None) -> None:
        if what != self._bar.tasks[-1].description:
            self._bar.remove_task(self._task)
            self._task = self._bar.add_task(what, total=total)
        self._bar.update(self._task, completed=done or 0)
        content = Group(self._table(), self._bar) if self._rows else self._bar
        if self._live is None:
            self._live = Live(content, console=self.console, refresh_per_second=8)
            self._live.start()
        self._live.update(content)

    def _stop(self) -> None:
        if self._live is not None:
            self._live.update(self._table() if self._rows else "", refresh=True)
            self._live.stop()
            self._live = None


HEADS = {
    "federated": "federated",
    "personal": "each client's own, from it",
    "fine_tuned": "each client's own, tuned from it",
    "local_only": "each client alone",
    "best_client": "best of these, for all",
    "centralised": "everybody pooled",
    "ridge": "pooled ridge",
    "unprotected": "the same, without privacy",
    "from_scratch": "everybody pooled, from scratch",
    "start": "before any training",
}
"""What is compared at the end of a run, in the order and the words in which it is shown."""


def comparison_table(summary: Mapping[str, Any]) -> Table:
    """Federated beside its references, each judged at home and on everybody's examples."""
    table = plain_table("head", "own tests", "everybody's", "worst 10 %", "spread")
    heads = judged_heads(summary)
    for name, facts in sorted(heads.items(), key=lambda one: [*HEADS].index(one[0])):
        table.add_row(
            HEADS[name],
            percent(facts["accuracy"]),
            percent(facts["accuracy_everyone"]),
            percent(facts["worst_decile_accuracy"]),
            percent(facts["spread"]),
        )
    return table


def next_commands(scenario: Scenario, name: str, folder: Path) -> list[str]:
    """Commands worth typing after this run, each with the question it answers."""
    other = "fedprox" if scenario.strategy.name == "fedavg" else "fedavg"
    quoted = shlex.quote(str(folder))
    commands = [
        (f"fedtl report {quoted}", "join, stay alone or personalise?"),
        (f"fedtl run {name} --seeds 3", "was it luck?"),
    ]
    asked = scenario.privacy
    if asked.mechanism != "none" or asked.secure_aggregation != "none":  # not all go with these
        commands.append((f"fedtl audit {quoted}", "what would attacks find in this head?"))
        if asked.mechanism != "none":
            planned = re.sub(r" --engine \S+", "", name)  # it is the same on every engine
            commands.append((f"fedtl privacy {planned}", "what would other noise cost?"))
        return _explained(commands)
    commands.append(
        (f"fedtl run {name} --set strategy.name={other}", "is there a better strategy?")
    )
    if scenario.clients.partition == "dirichlet":
        alpha = scenario.clients.alpha / 5
        commands.append((f"fedtl run {name} --set clients.alpha={alpha:g}", "and with more skew?"))
    elif scenario.strategy.name in CLOSED_FORMS:
        commands.append((f"fedtl run {name} --set strategy.name=lbfgs", "and the exact head?"))
    else:
        rate = scenario.training.learning_rate / 5
        commands.append(
            (f"fedtl run {name} --set training.learning_rate={rate:g}", "and in smaller steps?")
        )
    return _explained(commands)


def _explained(commands: Sequence[tuple[str, str]]) -> list[str]:
    width = max((len(one) for one, _ in commands if len(one) <= ALIGNED), default=0)
    return [f"{command.ljust(width)}  # {why}" for command, why in commands]
