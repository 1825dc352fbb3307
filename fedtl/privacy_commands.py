"""Commands that say what a scenario promises, and attack what a run has trained."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from fedtl.options import AsJson, Overrides, RunName, ScenarioName, again, console_for

app = typer.Typer()


@app.command()
def privacy(
    scenario: ScenarioName,
    overrides: Overrides = None,
    epsilon: Annotated[
        float | None, typer.Option("--epsilon", metavar="E", help="The noise that this takes.")
    ] = None,
    noise: Annotated[
        float | None, typer.Option("--noise", metavar="Z", help="What this multiplier promises.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show what a scenario promises its clients, and what noise that takes, before any training."""
    from fedtl.privacy_plan import check_amount, show_privacy
    from fedtl.scenario.load import load_scenario

    check_amount(epsilon, noise)
    given = list(overrides or ())
    amounts = {"privacy.epsilon": epsilon, "privacy.noise_multiplier": noise}
    told = [f"{key}={value!r}" for key, value in amounts.items() if value is not None]
    if told and "privacy.mechanism" in map(_key, given):  # which is refused without an amount
        given = [*(one for one in given if _key(one) not in amounts), *told]
    chosen = load_scenario(scenario, given)
    command, console = again(scenario, overrides), console_for(as_json)
    facts = show_privacy(chosen, command, console, epsilon=epsilon, noise=noise)
    if as_json:
        typer.echo(json.dumps(facts, indent=2))


def _key(override: str) -> str:
    return override.partition("=")[0].strip()


@app.command()
def audit(run: RunName, as_json: AsJson = False) -> None:
    """Attack the head of a run, and say how much of its promise that refutes."""
    from fedtl.audit import audit_run
    from fedtl.interrupts import Interrupts
    from fedtl.simulation import find_run

    with Interrupts() as interrupts:
        facts = audit_run(find_run(run), console_for(as_json), interrupts)
    if as_json:
        typer.echo(json.dumps(facts, indent=2))
