"""``fedtl server ...``: what whoever runs the federation types."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from fedtl.options import AsJson, Overrides, ScenarioName, again, console_for

app = typer.Typer(no_args_is_help=True, help="Run a federation of real clients.")

Folder = Annotated[Path, typer.Option("--folder", help="The federation's folder.")]
Least = Annotated[
    int | None,
    typer.Option("--min-clients", min=1, help="Begin with as few, once the wait is over."),
]

FOLDER = Path("federation")


@app.command()
def init(
    address: Annotated[
        str | None,
        typer.Option(metavar="HOST:PORT", help="Where clients reach the server."),
    ] = None,
    names: Annotated[
        list[str] | None,
        typer.Option("--name", metavar="DNS|IP", help="Further names of the server; repeatable."),
    ] = None,
    folder: Folder = FOLDER,
    again: Annotated[
        bool, typer.Option("--renew", help="Only make a new server certificate.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Make a federation: authority, server certificate, keys and the join file."""
    from fedtl.deployment.certificates import fingerprint
    from fedtl.deployment.federation import Federation, create_federation, renew
    from fedtl.deployment.join import is_loopback
    from fedtl.engines.flower_app import build_app

    if again:
        federation = Federation(folder)
        join = renew(federation, address, names or ())
    else:
        federation = create_federation(
            folder, address or "localhost:8443", names or (), build_app()
        )
        join = federation.join()
    shown = fingerprint(join.certificate())
    if as_json:
        facts = {"join": str(federation.join_path), "address": join.address}
        typer.echo(json.dumps({**facts, "ca_fingerprint": shown}, indent=2))
        return
    typer.echo(f"{folder} holds the federation's keys: only you can read it, and it must stay here")
    typer.echo(f"address      {join.address}")
    typer.echo(f"authority    {shown}")
    if is_loopback(join.host):
        typer.echo("Only this machine can reach that address; for others give --address HOST:PORT.")
    if again:
        same = address is None
        typer.echo("\nA new certificate, for the next 'fedtl server run'.")
        typer.echo(
            "Clients go on with the join file they have."
            if same
            else f"Give {federation.join_path} to every client again: the address is a new one."
        )
        return
    typer.echo(f"\nGive {federation.join_path} to every client. Then, for each key they send:")
    typer.echo("  fedtl server approve NAME.pub")


@app.command()
def approve(
    file: Annotated[Path, typer.Argument(metavar="NAME.pub", help="A client's public key.")],
    folder: Folder = FOLDER,
    as_json: AsJson = False,
) -> None:
    """Let a client in. Its name is the file's; a waiting server takes it in at once."""
    from fedtl.deployment.federation import Federation

    federation = Federation(folder)
    name, key = federation.approve(file)
    count = len(federation.approved())
    if as_json:
        facts = {"name": name, "fingerprint": key.fingerprint, "approved": count}
        typer.echo(json.dumps(facts, indent=2))
    else:
        typer.echo(f"approved {name}  {key.fingerprint}  ({count} in all)")
        typer.echo("Compare the fingerprint with the client's, by phone.")


@app.command()
def run(
    scenario: ScenarioName,
    overrides: Overrides = None,
    out: Annotated[
        Path | None, typer.Option(help="Run folder; default runs/<scenario>-<time>.")
    ] = None,
    least: Least = None,
    folder: Folder = FOLDER,
    as_json: AsJson = False,
) -> None:
    """Run a scenario with the approved clients: wait for them, rounds, verdict."""
    from fedtl.deployment.federation import Federation
    from fedtl.deployment.running import Deployment, run_deployed
    from fedtl.interrupts import Interrupts
    from fedtl.scenario.load import load_scenario
    from fedtl.simulation import new_run_path
    from fedtl.terminal import Terminal

    chosen = load_scenario(scenario, overrides or (), engine="flower")
    with Interrupts() as interrupts, Terminal(console_for(as_json)) as terminal:
        deployment = Deployment(Federation(folder), least, terminal, interrupts)
        summary = run_deployed(chosen, out or new_run_path(chosen), deployment)
    if as_json:
        typer.echo(json.dumps(summary, indent=2))


@app.command()
def gap(
    scenario: ScenarioName,
    overrides: Overrides = None,
    least: Least = None,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="FILE", help="Keep the figures as JSON.")
    ] = None,
    html: Annotated[
        Path | None, typer.Option("--html", metavar="FILE", help="Also write a page.")
    ] = None,
    folder: Folder = FOLDER,
    as_json: AsJson = False,
) -> None:
    """Show how far the approved clients lie apart, from sums they make at home; train nothing."""
    from fedtl.deployment.federation import Federation
    from fedtl.deployment.gaps import gap_deployed
    from fedtl.interrupts import Interrupts
    from fedtl.scenario.load import load_scenario
    from fedtl.terminal import Terminal

    chosen = load_scenario(scenario, overrides or (), engine="flower")
    command = again(scenario, overrides)
    with Interrupts() as interrupts, Terminal(console_for(as_json)) as terminal:
        facts = gap_deployed(
            chosen, command, Federation(folder), least, terminal, interrupts, html=html, out=out
        )
    if as_json:
        typer.echo(json.dumps(facts, indent=2))


@app.command()
def resume(
    run: Annotated[str, typer.Argument(metavar="RUN", help="A run folder, its name, or 'last'.")],
    least: Least = None,
    folder: Folder = FOLDER,
    allow: Annotated[
        bool, typer.Option("--allow", help="Go on although data or versions changed.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Go on with an interrupted run from its last commit, with the same clients."""
    from fedtl.deployment.federation import Federation
    from fedtl.deployment.running import Deployment, resume_deployed
    from fedtl.interrupts import Interrupts
    from fedtl.simulation import find_run
    from fedtl.terminal import Terminal

    with Interrupts() as interrupts, Terminal(console_for(as_json)) as terminal:
        deployment = Deployment(Federation(folder), least, terminal, interrupts)
        summary = resume_deployed(find_run(run), deployment, allow_changes=allow)
    if as_json:
        typer.echo(json.dumps(summary, indent=2))
