"""The command that chooses hyper-parameters."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fedtl.options import AsJson, EngineName, Overrides, ScenarioName, again, console_for

if TYPE_CHECKING:
    from fedtl.tune.rates import Curve
    from fedtl.tune.search import Search, Trial

app = typer.Typer()

BAR = 40
"""Columns of the longest bar of a curve in the terminal."""

SHOWN = 10
"""Trials in the table at the end."""


@app.command()
def tune(
    scenario: ScenarioName,
    over: Annotated[
        list[str] | None,
        typer.Option(
            "--over",
            metavar="KEY=VALUES",
            help="Search over LOW:HIGH (add :log or :linear) or A,B,C; repeatable.",
        ),
    ] = None,
    trials: Annotated[int, typer.Option(min=1, max=10_000, help="Trials in all.")] = 20,
    rate: Annotated[
        bool, typer.Option("--lr", help="Learning-rate range test instead of a search.")
    ] = False,
    lowest: Annotated[float, typer.Option("--from", help="--lr: first rate.")] = 1e-4,
    highest: Annotated[float, typer.Option("--to", help="--lr: last rate.")] = 10.0,
    steps: Annotated[int, typer.Option("--steps", max=1000, help="--lr: rates tried.")] = 40,
    engine: EngineName = None,
    overrides: Overrides = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder for what is found; default tunes/<scenario>-<hash>."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Choose hyper-parameters by the clients' own validation parts, never by their tests."""
    from fedtl.errors import InputError
    from fedtl.interrupts import Interrupts

    if rate and over:
        raise InputError("--lr is a test by itself", where="--over", do="Give one of the two")
    console = console_for(as_json)
    with Interrupts() as interrupts:
        if rate:
            curve, folder = _rates(
                scenario, overrides, engine, out, interrupts, (lowest, highest, steps)
            )
            facts = {**curve.facts, "folder": str(folder)}
            _show_curve(console, curve, folder)
            settings: Sequence[str] = facts["set"]
        else:
            search = _search(
                scenario, overrides, engine, over or (), trials, out, interrupts, console
            )
            facts = {**search.facts, "folder": str(search.path)}
            _show_best(console, search)
            settings = facts["best"]["set"]
    facts["command"] = f"fedtl run {again(scenario, [*(overrides or ()), *settings], engine)}"
    console.print(f"\nnext: {facts['command']}", markup=False, soft_wrap=True)
    if as_json:
        typer.echo(json.dumps(facts, indent=2))


def _rates(
    scenario: str,
    overrides: Sequence[str] | None,
    engine: str | None,
    out: Path | None,
    interrupts: Any,
    span: tuple[float, float, int],
) -> tuple[Curve, Path]:
    from fedtl.results.files import write_atomic
    from fedtl.scenario.load import load_scenario
    from fedtl.tune.rates import find_rates
    from fedtl.tune.validation import Trials

    chosen = load_scenario(scenario, overrides or (), engine=engine)
    folder = out or Path("tunes") / f"{chosen.name}-{chosen.hash()[:8]}-lr"
    folder.mkdir(parents=True, exist_ok=True)
    curve = find_rates(chosen, Trials(folder, interrupts), *span)
    write_atomic(folder / "rates.json", (json.dumps(curve.facts, indent=2) + "\n").encode())
    curve.draw(folder / "rates.png")
    return curve, folder


def _search(
    scenario: str,
    overrides: Sequence[str] | None,
    engine: str | None,
    over: Sequence[str],
    trials: int,
    out: Path | None,
    interrupts: Any,
    console: Any,
) -> Search:
    from fedtl.tune.search import JUDGED_BY, Asked, run_search
    from fedtl.tune.space import read_dimension

    asked = Asked(scenario, overrides or (), engine, [read_dimension(one) for one in over], trials)

    def begun(search: Search) -> None:
        for one in asked.space:
            console.print(f"{one.key}: {one.words}", markup=False)
        console.print(f"judged by {JUDGED_BY}", markup=False)
        if search.trials:
            console.print(f"{len(search.trials)} trials are done already", markup=False)

    def done(search: Search, trial: Trial) -> None:
        values = " ".join(search.settings(trial))
        told = trial.reason or _percent(trial.accuracy)
        state = "" if trial.state == "complete" else f" {trial.state}"
        line = f"{trial.number + 1:>3} of {asked.total}  {told}{state}  {values}"
        console.print(line, markup=False, soft_wrap=True)

    return run_search(asked, out, interrupts, begun, done)


def _percent(accuracy: float | None) -> str:
    return "-" if accuracy is None else f"{100 * accuracy:.1f} %"


def _show_best(console: Any, search: Search) -> None:
    """The best trials, best first."""
    from rich.table import Table

    table = Table("trial", "accuracy", *(one.key for one in search.asked.space))
    whole = [one for one in search.trials if one.state == "complete"]
    for one in sorted(whole, key=lambda one: -(one.accuracy or 0.0))[:SHOWN]:
        values = [f"{one.values[each.key]}" for each in search.asked.space]
        table.add_row(str(one.number + 1), _percent(one.accuracy), *values)
    console.print(table)
    console.print(f"all {len(search.trials)} trials are in {search.path}", markup=False)


def _show_curve(console: Any, curve: Curve, folder: Path) -> None:
    """A bar for each rate, as long as its smoothed loss."""
    smooth = curve.smooth
    longest = max(smooth)
    for rate, loss in zip(curve.rates, smooth, strict=True):
        bar = "█" * max(1, round(BAR * loss / longest)) if longest > 0 else ""
        mark = " lowest" if rate == curve.lowest else ""
        mark += " steepest" if rate == curve.steepest else ""
        console.print(f"{rate:>9.2g}  {loss:>7.4f}  {bar}{mark}", markup=False)
    console.print(
        f"suggestion: training.learning_rate = {curve.suggestion:g}, a third of the rate with the "
        f"lowest loss; curve in {folder}/rates.png",
        markup=False,
        soft_wrap=True,
    )
