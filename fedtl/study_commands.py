"""Commands that look at data before training, and at runs after it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from fedtl.options import AsJson, Overrides, RunName, ScenarioName, again, console_for

app = typer.Typer()

Html = Annotated[Path | None, typer.Option("--html", metavar="FILE", help="Also write a page.")]


@app.command()
def split(
    scenario: ScenarioName,
    overrides: Overrides = None,
    html: Html = None,
    write: Annotated[
        Path | None,
        typer.Option(
            "--write", metavar="FILE", help="Keep who holds what, for clients.split_file."
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show who has what, before any training."""
    from fedtl.scenario.load import load_scenario
    from fedtl.split import show_split

    chosen = load_scenario(scenario, overrides or ())
    facts = show_split(chosen, again(scenario, overrides), console_for(as_json), html, write)
    if as_json:
        typer.echo(json.dumps(facts, indent=2))


@app.command()
def gap(
    scenario: ScenarioName,
    overrides: Overrides = None,
    backbones: Annotated[
        str | None,
        typer.Option("--backbones", metavar="A,B,C", help="Rank these backbones instead."),
    ] = None,
    html: Html = None,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="FILE", help="Keep the figures as JSON.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show how far the clients' domains lie from each other and from the backbone's."""
    from fedtl.backbone_choice import rank_backbones
    from fedtl.gap import show_gap
    from fedtl.interrupts import Interrupts
    from fedtl.scenario.load import load_scenario

    chosen = load_scenario(scenario, overrides or ())
    command, console = again(scenario, overrides), console_for(as_json)
    with Interrupts() as interrupts:
        if backbones is not None:
            names = [name.strip() for name in backbones.split(",") if name.strip()]
            facts = rank_backbones(chosen, names, command, console, interrupts, html=html, out=out)
        else:
            facts = show_gap(chosen, command, console, interrupts, html=html, out=out)
    if as_json:
        typer.echo(json.dumps(facts, indent=2))


@app.command()
def lodo(
    scenario: ScenarioName,
    overrides: Overrides = None,
    seeds: Annotated[
        int, typer.Option(min=1, help="Run this many seeds, counted up from the scenario's.")
    ] = 1,
    out: Annotated[
        Path | None, typer.Option(help="Folder for the runs; default runs/<scenario>-lodo-<time>.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Leave each domain out in turn: train on the others, judge on it."""
    from fedtl.interrupts import Interrupts
    from fedtl.lodo import leave_one_domain_out
    from fedtl.scenario.load import load_scenario

    chosen = load_scenario(scenario, overrides or ())
    with Interrupts() as interrupts:
        facts = leave_one_domain_out(chosen, out, seeds, console_for(as_json), interrupts)
    if as_json:
        typer.echo(json.dumps(facts, indent=2))


@app.command()
def report(
    run: RunName,
    gap: Annotated[
        bool | None,
        typer.Option(
            "--gap/--no-gap", help="Measure the gaps for the page; default: where that is quick."
        ),
    ] = None,
    open_it: Annotated[bool, typer.Option("--open", help="Show it in the browser.")] = False,
) -> None:
    """Make one offline page of a run: join, stay alone, or personalise?"""
    from fedtl.interrupts import Interrupts
    from fedtl.report import write_report
    from fedtl.simulation import find_run

    with Interrupts() as interrupts:
        page = write_report(find_run(run), interrupts, gap=gap)
    typer.echo(str(page))
    if open_it:
        typer.launch(page.resolve().as_uri())


@app.command()
def compare(
    runs: Annotated[
        list[str], typer.Argument(metavar="RUN RUN...", help="Folders, names, 'last'.")
    ],
    unlike: Annotated[
        bool, typer.Option("--allow-unlike", help="Compare although data or clients differ.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Say whether one run is really better than another, or that the evidence is not enough."""
    from fedtl.listings import print_runs_compared
    from fedtl.results.compare import compare_runs
    from fedtl.simulation import find_run

    comparison = compare_runs([find_run(run) for run in runs], allow_unlike=unlike)
    print_runs_compared(console_for(as_json), comparison.as_facts())
    if as_json:
        typer.echo(json.dumps(comparison.as_facts(), indent=2))


@app.command()
def episodes(
    scenario: ScenarioName,
    overrides: Overrides = None,
    ways: Annotated[int, typer.Option(help="Classes of an episode.")] = 5,
    shots: Annotated[
        str, typer.Option(metavar="N,N", help="Examples of a class to learn from.")
    ] = "1,5",
    queries: Annotated[int, typer.Option(help="Others of a class to be judged on.")] = 15,
    count: Annotated[int, typer.Option("--episodes", help="Episodes of each kind.")] = 600,
    as_json: AsJson = False,
) -> None:
    """Show how far a few examples get on the backbone's features, with intervals."""
    from fedtl.few_shot import show_episodes
    from fedtl.interrupts import Interrupts
    from fedtl.options import whole_numbers
    from fedtl.scenario.load import load_scenario

    chosen = load_scenario(scenario, overrides or ())
    numbers = whole_numbers("--shots", shots)
    with Interrupts() as interrupts:
        facts = show_episodes(
            chosen, ways, numbers, queries, count, console_for(as_json), interrupts
        )
    if as_json:
        typer.echo(json.dumps(facts, indent=2))
